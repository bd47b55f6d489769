"""Features of a frozen Qwen2.5-VL: computed by one class, stored one file per session, refused when anything that shapes them differs.

File <cache_root>/qwen_vl_features/<data set>__<task>__<episode>__<fingerprint>.pt:
    features (n_ticks, tokens, D) float16, NaN at ticks without a complete set of images | tick_timestamps (n_ticks,) float64 | frame_index {view: (n_ticks,) int32}
    meta {recipe, session, instruction, stride, frame_index {view: [...]}, frames {view: [[path relative to the session, size, mtime_ns or sha256]]} of the images used, hashed}
The fingerprint is a hash of all of meta: model, prompt, views, size, layer, pooling, dtype, and per image its path, size and modification time.
A reader needs neither the VLM nor an image: it compares the file's meta with the settings it was given and with the image files' sizes and times.
"""

import functools
import hashlib
import json
import sys
from pathlib import Path

try:
    import torchvision  # noqa: F401  not used here, but transformers imports it where it is installed ...
except (ImportError, OSError, RuntimeError, AttributeError):
    sys.modules["torchvision"] = None  # ... and would break over one that does not fit this torch

import numpy as np
import torch
from PIL import Image

from common import checkpoint as ckpt
from common.qwen_vl import batch_vision_attention, image_patches, pick_attention, rope_positions

FORMAT = 1
FOLDER = "qwen_vl_features"
PLACE = "{instruction}"  # stands for the instruction in a recipe's prompt
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n"  # where the tokenizer has no chat template


class CacheMismatch(ValueError):
    """The cache was made with other settings or other images; the message names what differs and the command to build it."""


# ---- the model's side ------------------------------------------------------------------------------------------------


class VLEncoder:
    """Images of all views and an instruction -> features. Qwen2.5-VL is loaded at the first encode, frozen, without lm_head, and for layer >= 0 only the layers below.

    One user turn: the images in the order of `views`, then the instruction, through the chat template, no generation prompt. Every image is squashed to
    height x width, rounded down to whole tokens (28 pixels): 360 x 640 gives 336 x 616, 264 tokens. `layer` -1: the last, normed state; k: the state after k layers.
    `pooling` "mean": over all tokens of the row; with `tokens` = n > 1 over n equal stretches of it, in order.
    """

    def __init__(
        self,
        model,
        views,
        height=360,
        width=640,
        layer=-1,
        pooling="mean",
        tokens=1,
        dtype="fp16",
        device="cpu",
        compute_dtype="auto",
        attention="auto",
    ):
        from transformers import AutoConfig, AutoTokenizer

        device = torch.device(device)
        if pooling != "mean" or tokens < 1 or dtype not in ("fp16", "fp32"):
            raise ValueError(
                f"pooling is {pooling}, tokens {tokens}, dtype {dtype}: expected mean, 1 or more, fp16 or fp32"
            )
        if not views:
            raise ValueError("views is empty: name at least one, e.g. --views View1 View5")
        download(model)
        try:
            config, self.tokenizer = AutoConfig.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"model '{model}' is neither a directory with config.json and tokenizer files nor reachable on the hub. "
                f"Set --model to a local directory; make_demo.py writes a tiny one ({str(error).splitlines()[0]})"
            ) from error
        if config.model_type != "qwen2_5_vl":
            raise ValueError(f"model '{model}' is a {config.model_type}; the features are those of a qwen2_5_vl")
        layers = config.text_config.num_hidden_layers
        if not -1 <= layer <= layers:
            raise ValueError(f"layer is {layer}: expected -1 (the last, normed) or 0 to {layers}")
        vision, about = config.vision_config, read_preprocessor(model)
        side = vision.patch_size * vision.spatial_merge_size
        self.grid = (height // side, width // side)  # (rows, columns) of tokens per image
        if min(self.grid) < 1:
            raise ValueError(
                f"image_resize_height x image_resize_width is {height} x {width}: expected at least {side} x {side} pixels"
            )
        self.views, self.device, self.patch, self.merge, self.tokens = (
            list(views),
            device,
            vision.patch_size,
            vision.spatial_merge_size,
            tokens,
        )
        self.size = (self.grid[0] * side, self.grid[1] * side)  # (height, width) in pixels
        compute_dtype = compute_dtype if compute_dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
        self.model, self.layer, self.compute_dtype, self.attention = (
            str(model),
            layer,
            DTYPES[compute_dtype],
            pick_attention(attention, device),
        )
        self.image_token_id, self.width, self._rows = config.image_token_id, config.text_config.hidden_size, {}
        self.mean, self.std = (
            torch.tensor(about[key]).view(3, 1, 1).to(device) * 255 for key in ("image_mean", "image_std")
        )
        self._recipe = dict(
            format_version=FORMAT,
            model=self.model,
            weights=weight_fingerprint(model),
            views=self.views,
            height=height,
            width=width,
            pixels=list(self.size),
            resample="bicubic",
            image_mean=[float(v) for v in about["image_mean"]],
            image_std=[float(v) for v in about["image_std"]],
            prompt=self.text(PLACE),
            layer=layer,
            pooling=pooling,
            tokens=tokens,
            dtype=dtype,
            compute_dtype=compute_dtype,
        )

    @functools.cached_property
    def vlm(self):
        """The backbone: vision tower and language model."""
        from transformers import Qwen2_5_VLForConditionalGeneration
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # its bars break ours
        batch_vision_attention()
        vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            self.model, dtype=self.compute_dtype, attn_implementation=self.attention
        ).model
        if self.layer >= 0:
            vlm.language_model.layers = vlm.language_model.layers[: self.layer]
            vlm.language_model.norm = torch.nn.Identity()
        return vlm.requires_grad_(False).eval().to(self.device)

    @classmethod
    def from_recipe(cls, recipe, device="cpu", model=None):
        """The encoder that made features of this recipe; `model`: where the backbone is now. Another model or prompt is refused."""
        encoder = cls(
            model or recipe["model"],
            device=device,
            **{
                k: recipe[k]
                for k in ("views", "height", "width", "layer", "pooling", "tokens", "dtype", "compute_dtype")
            },
        )
        if differs := different(recipe | dict(model=encoder._recipe["model"]), encoder._recipe):
            raise CacheMismatch(
                f"model '{encoder._recipe['model']}' is not the one the features were made with: {'; '.join(differs)}. Give the right one with --model"
            )
        return encoder

    def recipe(self):
        """Everything but the images and the instruction that changes a feature, as plain values."""
        return dict(self._recipe)

    def text(self, instruction):
        """The prompt, with one <|image_pad|> per view."""
        image = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        if self.tokenizer.chat_template is None:  # an older snapshot keeps it in the processor's files
            return PROMPT.format(images=f"<|vision_start|>{image}<|vision_end|>" * len(self.views), text=instruction)
        content = [{"type": "image"} for _ in self.views] + [{"type": "text", "text": instruction}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=False
        )

    def _row(self, instruction):
        """-> (ids (L,), rope positions (3, L)) of the prompt, every image place expanded to its tokens."""
        if instruction not in self._rows:
            image, text = self.tokenizer.convert_ids_to_tokens(self.image_token_id), self.text(instruction)
            if text.count(image) != len(self.views):
                raise ValueError(
                    f"the prompt has {text.count(image)} image places for {len(self.views)} views: {text!r}"
                )
            ids = self.tokenizer(text.replace(image, image * (self.grid[0] * self.grid[1])), add_special_tokens=False)[
                "input_ids"
            ]
            self._rows[instruction] = np.array(ids), rope_positions(ids, self.image_token_id, self.grid)
        return self._rows[instruction]

    def load(self, image):
        """Path or (h, w, 3) uint8 RGB -> (height, width, 3) uint8, the size the model sees. The one image preprocessing of cache, training and predict."""
        if not isinstance(image, np.ndarray):
            image = read_image(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is {image.dtype} {image.shape}: expected uint8 (height, width, 3), RGB")
        return (
            image
            if image.shape[:2] == self.size
            else np.asarray(Image.fromarray(image).resize(self.size[::-1], Image.BICUBIC))
        )

    @torch.no_grad()
    def encode(self, observations):
        """list of (images {view: path or (h, w, 3) uint8 RGB}, instruction) -> (B, tokens, D) float32 on the CPU, rounded to the stored dtype."""
        pictures = torch.from_numpy(np.stack([self.load(images[v]) for images, _ in observations for v in self.views]))
        rows = [self._row(instruction) for _, instruction in observations]
        length = max(len(ids) for ids, _ in rows)
        ids, positions = (
            np.full((len(rows), length), self.tokenizer.pad_token_id or 0),
            np.zeros((3, len(rows), length), np.int64),
        )
        for b, (row, position) in enumerate(
            rows
        ):  # padded on the right: causal attention never looks there, so no mask is needed
            ids[b, : len(row)], positions[:, b, : len(row)] = row, position
        ids, positions = torch.from_numpy(ids).to(self.device), torch.from_numpy(positions).to(self.device)
        grid = torch.tensor([[1, self.grid[0] * self.merge, self.grid[1] * self.merge]], device=self.device).repeat(
            len(pictures), 1
        )
        patches = image_patches(pictures.to(self.device), self.mean, self.std, self.patch, self.merge)
        seen = torch.cat(self.vlm.get_image_features(patches, grid).pooler_output)  # (B * views * tokens per image, D)
        embeds = self.vlm.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == self.image_token_id)[..., None], seen.to(embeds.dtype))
        hidden = self.vlm.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False
        ).last_hidden_state.float()  # (B, L, D)
        pooled = torch.stack([pool(hidden[b, : len(row)], self.tokens) for b, (row, _) in enumerate(rows)])
        return pooled.to(DTYPES[self._recipe["dtype"]]).float().cpu()


def pool(hidden, tokens):
    """(L, D) real tokens of one row -> (tokens, D): means of `tokens` stretches that differ in length by at most one."""
    if len(hidden) < tokens:
        raise ValueError(f"tokens is {tokens}, but the prompt and its images have only {len(hidden)}")
    return torch.stack([part.mean(0) for part in torch.tensor_split(hidden, tokens)])


def read_image(path):
    """-> (h, w, 3) uint8 RGB; an image that cannot be read is an error with its path."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        raise ValueError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}). Copy it again from the recorder, or delete it and run create_datapkl.py again"
        ) from error


def model_folder(model):
    """Local directory of a complete model: itself, or the hub's copy on this machine; None where there is none."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    return folder if all((folder / shard).is_file() for shard in shards) else None  # an interrupted download is none


def download(model):
    """Fetch a hub model that is not on this machine, so that its files can be fingerprinted."""
    if model_folder(model) is None and "/" in str(model) and not str(model).startswith(("/", ".")):
        from huggingface_hub import snapshot_download

        try:
            snapshot_download(str(model), allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
        except Exception as error:  # the hub client raises a dozen types; all mean that it cannot be had
            raise FileNotFoundError(
                f"model '{model}' is neither a local directory nor reachable on the hub ({type(error).__name__}). "
                "Set --model to a directory with the downloaded files; make_demo.py writes a tiny one"
            ) from error


def read_preprocessor(model):
    """preprocessor_config.json (image mean and std) as a dict; read as a file, because the processor classes of some transformers releases need torchvision."""
    from huggingface_hub import hf_hub_download

    cause = None
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
    ):  # transformers 5 writes one file for the whole processor
        path = Path(model) / name
        if not Path(model).is_dir():
            try:
                path = Path(hf_hub_download(str(model), name))
            except Exception as error:  # the hub client raises a dozen types; all mean that the file cannot be had
                cause = error
                continue
        if path.is_file():
            about = json.loads(path.read_text())
            about = about.get("image_processor", about)
            if "image_mean" in about and "image_std" in about:
                return about
    raise FileNotFoundError(
        f"model '{model}' has no preprocessor_config.json with image_mean and image_std: expected a complete Qwen2.5-VL directory"
    ) from cause


def weight_fingerprint(model):
    """24 hex digits of a model's files: small ones whole, of each weight shard its name, size, header and 32 spots of 64 KiB. None if not on this machine."""
    folder = model_folder(model)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(
        p
        for p in folder.iterdir()
        if p.suffix in (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model") and p.is_file()
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as f:
            for spot in [0] if size <= 1 << 21 else np.linspace(0, size - (1 << 16), 33).astype(int):
                f.seek(spot)
                digest.update(f.read(1 << 21 if size <= 1 << 21 else 1 << 16))
    return digest.hexdigest()[:24]


# ---- files -----------------------------------------------------------------------------------------------------------


def image_facts(session, view, indices, hashed=False):
    """[[path relative to the session, size, mtime_ns or, if hashed, sha256]] of these images."""
    out = []
    for i in indices:
        name, path = session.view(view)[0][i], session.frame_path(view, i)
        try:
            s = path.stat()
            out.append([name, s.st_size, hashlib.sha256(path.read_bytes()).hexdigest() if hashed else s.st_mtime_ns])
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is in data.pkl but not on the disk. Copy it back, or run: python create_datapkl.py --dataset-dirs {session.path} --force"
            ) from None
    return out


def make_meta(recipe, session, ticks, hashed=False):
    """What a feature file must say about itself: plain values."""
    used = {view: ticks.frame_index[view][ticks.complete].tolist() for view in recipe["views"]}
    frames = {view: image_facts(session, view, sorted(set(i)), hashed) for view, i in used.items()}
    return dict(
        recipe=dict(recipe),
        session=session.name,
        instruction=session.instruction,
        stride=ticks.stride,
        frames=frames,
        hashed=hashed,
        frame_index={view: np.where(ticks.complete, ticks.frame_index[view], -1).tolist() for view in recipe["views"]},
    )


def fingerprint(meta):
    """24 hex digits that change with anything in make_meta's result. Where sessions and model lie on the disk changes nothing."""
    known = meta | dict(
        recipe={k: v for k, v in meta["recipe"].items() if k != "model" or meta["recipe"]["weights"] is None}
    )  # its files identify a model, not its path
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:24]


def stem_of(session):
    """How the names of a session's feature files begin."""
    return session.name.replace("/", "__")


def cache_path(cache_root, session, fp):
    return Path(cache_root) / FOLDER / f"{stem_of(session)}__{fp}.pt"


def write_features(cache_root, session, ticks, features, meta):
    """features (n_ticks, tokens, D) float32 -> file, atomically; returns its path."""
    stored = features.to(DTYPES[meta["recipe"]["dtype"]])
    complete = torch.from_numpy(ticks.complete)
    if not torch.isfinite(stored[complete]).all():
        raise ValueError(
            f"{session.name}: a feature is not finite in {meta['recipe']['dtype']}. Build with --dtype fp32, or look at the images of this session"
        )
    path = cache_path(cache_root, session, fingerprint(meta))
    content = dict(
        features=stored,
        tick_timestamps=torch.from_numpy(ticks.tick_time),
        frame_index={v: torch.tensor(i, dtype=torch.int32) for v, i in meta["frame_index"].items()},
        meta=meta,
    )
    with ckpt.atomic_path(path) as temporary:
        ckpt.save_state(temporary, content)
    return path


class FeatureFile:
    """Features of one session: `features` (n_ticks, tokens, D) in the stored dtype, mapped from the file by the process that reads them, `tick_timestamps`
    (n_ticks,) float64, `meta`. Unpickled in another process it maps the file again."""

    def __init__(self, path):
        self.path = Path(path)
        content = self._load()
        self.meta, self.tick_timestamps = content["meta"], content["tick_timestamps"].numpy()
        self.shape = tuple(content["features"].shape)

    def _load(self):
        content = ckpt.load_state(self.path)
        if (
            not isinstance(content, dict)
            or not {"features", "tick_timestamps", "frame_index", "meta"} <= set(content)
            or len(content["features"]) != len(content["tick_timestamps"])
        ):
            raise CacheMismatch(
                f"{self.path} is not a feature file of this program. Delete it and build it again: {build_command()}"
            )
        return content

    @functools.cached_property
    def features(self):
        return self._load()["features"]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "features"}


def build_command(recipe=None, cache_root=None, stride=None):
    """The command that builds a cache with these settings, as far as they are known."""
    recipe = recipe or {}
    flags = dict(
        cache_root=cache_root,
        model=recipe.get("model"),
        views=" ".join(recipe.get("views") or ()) or None,
        image_resize_height=recipe.get("height"),
        image_resize_width=recipe.get("width"),
        layer=recipe.get("layer") if recipe.get("layer", -1) != -1 else None,
        tokens=recipe.get("tokens") if recipe.get("tokens", 1) != 1 else None,
        vlm_reuse_count=stride,
    )
    return " ".join(
        [
            "python build_vl_cache.py --dataset-dirs DATA",
            *(f"--{k.replace('_', '-')} {v}" for k, v in flags.items() if v is not None),
        ]
    )


def different(a, b):
    """Two dicts -> ["key: a's value, now b's"] for the keys that differ; a model's weights identify it, its path does not."""
    keys = [k for k in sorted({*a, *b}) if k != "model" or a.get("weights") is None or b.get("weights") is None]
    return [f"{k} was {a.get(k)!r}, now {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]


def read_features(cache_root, sessions, expected, reuse, max_image_age=1.5):
    """Open the features of all `sessions` -> ({session name: FeatureFile}, recipe). Loads no VLM and opens no image.

    `expected`: the recipe's keys that the caller knows, e.g. {model, views, height, width}; keys left out (or None) may have any value, the same in all
    sessions. `reuse`: steps per feature wanted; the cache's stride must divide it. Sessions without a file: FileNotFoundError that lists them. A file made with
    other settings, another instruction or other images: CacheMismatch that names what differs. Both with the command to build it.
    """
    folder = Path(cache_root) / FOLDER
    expected = {k: v for k, v in expected.items() if v is not None}
    if "model" in expected:
        expected["weights"] = weight_fingerprint(expected["model"])
    available = {}
    for path in folder.glob("*.pt"):  # <stem>__<24 digits>.pt
        if not path.name.startswith(ckpt.TEMPORARY):  # glob finds these too
            available.setdefault(path.name[:-29], []).append(path)
    choices, missing, refused = {}, [], []  # {recipe and stride as text: {session: file}}
    for session in sessions:
        files = [
            FeatureFile(p)
            for p in sorted(available.get(stem_of(session), ()), key=lambda p: p.stat().st_mtime, reverse=True)
        ]
        reasons = [_why_not(f, session, expected, reuse, max_image_age) for f in files]
        for f, reason in zip(files, reasons):
            if not reason:
                choices.setdefault(json.dumps([f.meta["recipe"], f.meta["stride"]], sort_keys=True), {}).setdefault(
                    session.name, f
                )
        if not files:
            missing.append(session.name)
        elif all(reasons):
            refused.append(f"{session.name}: " + "; ".join(reasons[0]))
    command = build_command(expected, cache_root, reuse)
    if refused:
        raise CacheMismatch(
            f"the features of {len(refused)} of {len(sessions)} sessions do not fit:\n  "
            + "\n  ".join(refused[:5])
            + f"\nBuild them: {command}"
        )
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"{folder} has no features of {len(missing)} of {len(sessions)} sessions: {', '.join(missing[:5])}{more}. Build them: {command}\nor train with --cache online (slow)"
        )
    whole = {key: files for key, files in choices.items() if len(files) == len(sessions)}
    if not whole:
        a, b = (json.loads(k) for k in list(choices)[:2])
        raise CacheMismatch(
            f"{folder} has no single kind of features for all sessions: {'; '.join(different(a[0] | dict(stride=a[1]), b[0] | dict(stride=b[1])))}. Build one: {command}"
        )
    recipes = {json.dumps(json.loads(k)[0], sort_keys=True) for k in whole}
    if len(recipes) > 1:
        a, b = (json.loads(r) for r in sorted(recipes)[:2])
        raise CacheMismatch(
            f"{folder} has more than one kind of features that fit: {'; '.join(different(a, b)).replace('was', 'is').replace('now', 'and')}. "
            "Keep one: build_vl_cache.py --prune with the settings to keep, or give each its own --cache-root"
        )
    best = max(whole, key=lambda k: json.loads(k)[1])  # the same features at several strides: the coarsest that fits
    return whole[best], json.loads(best)[0]


def _why_not(file, session, expected, reuse, max_image_age):
    """Reasons why `file` cannot serve; [] if it can."""
    meta, recipe = file.meta, file.meta["recipe"]
    if recipe.get("format_version") != FORMAT:
        return [f"format_version was {recipe.get('format_version')}, now {FORMAT}"]
    known = dict(expected)
    if "model" in known and (
        known["weights"] is None or recipe["weights"] is None
    ):  # the model is not on this machine: all there is to compare is its name
        known.pop("weights")
        known["model"], mine = Path(known["model"]).name, recipe | dict(model=Path(recipe["model"]).name)
    else:
        mine = recipe
    reasons = [
        f"{k} was {mine.get(k)!r}, now {v!r}"
        for k, v in known.items()
        if mine.get(k) != v and not (k == "model" and "weights" in known)
    ]
    if meta["instruction"] != session.instruction:
        reasons.append(f"instruction was {meta['instruction']!r}, now {session.instruction!r}")
    if reuse % meta["stride"]:
        reasons.append(f"stride was {meta['stride']}, of which vlm_reuse_count {reuse} is no multiple")
    if reasons:
        return reasons
    ticks = session.ticks(meta["stride"], recipe["views"], max_image_age)
    if len(ticks) != len(file.tick_timestamps) or not np.array_equal(ticks.tick_time, file.tick_timestamps):
        return [f"ticks were {len(file.tick_timestamps)}, now {len(ticks)} at other times: data.pkl was made again"]
    for view in recipe["views"]:
        had, want = np.array(meta["frame_index"][view]), np.where(ticks.complete, ticks.frame_index[view], -1)
        if wrong := np.flatnonzero((want >= 0) & (want != had)).tolist():
            reasons.append(f"image of {view} at tick {wrong[0]} was number {had[wrong[0]]}, now {want[wrong[0]]}")
            continue
        used = sorted(set(had[had >= 0].tolist()))
        for old, new in zip(meta["frames"][view], image_facts(session, view, used)):
            if old[:2] != new[:2] or (not meta["hashed"] and old[2] != new[2]):
                reasons.append(
                    f"image {new[0]} changed: was {old[0]}, {old[1]} bytes, now {new[1]} bytes"
                    if old[:2] != new[:2]
                    else f"image {new[0]} was modified since"
                )
                break
    return reasons
