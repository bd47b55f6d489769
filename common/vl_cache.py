"""Features of a frozen Qwen2.5-VL: computed by one class, stored one file per session, refused when anything that
shapes them differs.

File <cache_root>/qwen_vl_features/<data set>__<task>__<episode>__<fingerprint>.pt:
    features (n_ticks, 1, D) float16, NaN at ticks without a complete set of images
    meta {recipe, session, instruction, stride, tick_times [s], frame_index {view: [image number, -1: none]},
          frames {view: [[path in the session, bytes, mtime_ns, sha256] of the images used]}}
    checksum of both
The fingerprint is a hash of meta without places and times. A reader needs neither the VLM nor an image: it compares
meta with its settings and with the images' sizes and times; where these moved, the image's content decides.
"""

import functools
import glob
import hashlib
import json
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import MissingFile, UserError, hub, qwen_vl, require
from common import checkpoint as ckpt

FORMAT = 2
FOLDER = "qwen_vl_features"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
SHAPE_NOTHING = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures", "use_cache")
MAX_IMAGE_AGE = 1.5  # seconds


class CacheMismatch(UserError):
    """The cache was made with other settings or images, or is damaged; the message says what, and the command."""


# ---- the model's side ------------------------------------------------------------------------------------------------


class VLEncoder:
    """Images of all views and an instruction -> features. Qwen2.5-VL is loaded at the first encode, frozen, and for
    layer >= 0 only the layers below.

    One user turn: the images, sorted by view, then the instruction, through the chat template, no generation prompt.
    Every image is squashed to height x width, rounded down to whole tokens (28 pixels): 360 x 640 gives 336 x 616, 264
    tokens. `layer` -1: the last, normed state; k: the state after k layers. The feature is its mean over all tokens.
    """

    def __init__(self, model, views, height=360, width=640, layer=-1, dtype="fp16", device="cpu", compute_dtype="auto"):
        self.device, self.views, self.layer = torch.device(device), sorted(set(views)), layer
        require(self.views, "views is empty: name at least one, e.g. --views View1 View5")
        self.folder, self.dtype = hub.local_folder(model), DTYPES[dtype]
        config, self.tokenizer, *moments = qwen_vl.open_backbone(self.folder)
        text, vision, self.image_token_id = config.text_config, config.vision_config, config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.width, self.patch, self.merge = text.hidden_size, vision.patch_size, vision.spatial_merge_size
        depth, side, self._rows = text.num_hidden_layers, self.patch * self.merge, {}
        require(-1 <= layer <= depth, f"layer is {layer}: expected -1 (the last, normed) or 0 to {depth}")
        asked = f"image_resize_height x image_resize_width is {height} x {width}"
        require(min(height, width) >= side, f"{asked}: expected at least {side} x {side} pixels")
        self.grid = (height // side, width // side)  # (rows, columns) of tokens per image
        self.size = (self.grid[0] * side, self.grid[1] * side)  # (height, width) in pixels
        auto = "bf16" if self.device.type == "cuda" else "fp32"
        compute_dtype = auto if compute_dtype == "auto" else compute_dtype
        self.compute_dtype = DTYPES[compute_dtype]
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1).to(self.device) * 255 for values in moments)
        self._recipe = dict(format_version=FORMAT, model=hub.stored_source(model), weights=model_digest(self.folder))
        self._recipe |= dict(views=self.views, height=height, width=width, layer=layer, dtype=dtype)
        self._recipe |= dict(compute_dtype=compute_dtype, pixels=list(self.size), mean_and_std=moments)
        self._recipe |= dict(prompt=self.text("{instruction}"))

    @functools.cached_property
    def vlm(self):
        """The backbone: vision tower and language model, in which every weight was found. Tensor by tensor to the
        device: the host never holds it whole."""
        kind = (self.compute_dtype, qwen_vl.pick_attention("auto", self.device), ["lm_head.weight"], self.device)
        vlm = qwen_vl.load_backbone(self.folder, *kind)
        vlm = vlm.model
        if self.layer >= 0:
            vlm.language_model.layers = vlm.language_model.layers[: self.layer]
            vlm.language_model.norm = torch.nn.Identity()
        return vlm.requires_grad_(False).eval()

    def warm_up(self):
        """Load the backbone now, instead of at the first encode."""
        return self.vlm

    def recipe(self):
        """Everything but the images and the instruction that changes a feature, as plain values."""
        return dict(self._recipe)

    @classmethod
    def from_recipe(cls, recipe, device="cpu", model=None):
        """The encoder that made features of this recipe; `model`: where the backbone is now. Another is refused."""
        same = {key: recipe[key] for key in ("views", "height", "width", "layer", "dtype", "compute_dtype")}
        encoder = cls(model or recipe["model"], device=device, **same)
        differs = "; ".join(different(recipe, encoder.recipe()))
        another = f"model '{encoder.folder}' is not the one the features were made with: {differs}"
        require(not differs, f"{another}. Give the right one with --model", CacheMismatch)
        return encoder

    def text(self, instruction):
        """The prompt, with one image token per view."""
        return qwen_vl.chat_text(self.tokenizer, self.image_token, len(self.views), instruction)

    def _row(self, instruction):
        """-> (ids (L,), rope positions (3, L)) of the prompt, every image place expanded to its tokens."""
        if instruction not in self._rows:
            expanded = self.image_token * (self.grid[0] * self.grid[1])
            text = self.text(instruction).replace(self.image_token, expanded)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._rows[instruction] = np.array(ids), qwen_vl.rope_positions(ids, self.image_token_id, self.grid)
        return self._rows[instruction]

    def load(self, image):
        """Path or (h, w, 3) uint8 RGB -> (height, width, 3) uint8, the size the model sees. The one image preprocessing
        of cache, training and predict."""
        image = image if isinstance(image, np.ndarray) else read_image(image)
        wrong = f"an image is {image.dtype} {image.shape}: expected uint8 (height, width, 3), RGB"
        require(image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, wrong)
        if image.shape[:2] == self.size:
            return image
        return np.asarray(Image.fromarray(image).resize(self.size[::-1], Image.BICUBIC))

    @torch.no_grad()
    def encode(self, observations):
        """list of (images {view: path or (h, w, 3) uint8 RGB}, instruction) -> (B, 1, D) float32 on the CPU,
        rounded to the stored dtype."""
        pictures = []
        for images, _ in observations:
            pictures += [images[view] for view in self.views]
        pictures = torch.from_numpy(np.stack(in_threads(self.load, pictures))).to(self.device)
        rows = [self._row(instruction) for _, instruction in observations]
        length = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id or 0)
        positions = np.zeros((3, len(rows), length), np.int64)
        for b, (row, position) in enumerate(rows):  # padded on the right: causal attention never looks there
            ids[b, : len(row)], positions[:, b, : len(row)] = row, position
        ids, positions = torch.from_numpy(ids).to(self.device), torch.from_numpy(positions).to(self.device)
        grid = torch.tensor([[1, self.grid[0] * self.merge, self.grid[1] * self.merge]])  # on the CPU
        patches = qwen_vl.image_patches(pictures, self.mean, self.std, self.patch, self.merge)
        seen = torch.cat(self.vlm.get_image_features(patches, grid.repeat(len(pictures), 1)).pooler_output)
        embeds = self.vlm.get_input_embeddings()(ids)  # (B, L, D); seen is (B * views * tokens per image, D)
        embeds = embeds.masked_scatter((ids == self.image_token_id)[..., None], seen.to(embeds.dtype))
        inputs = dict(inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False)
        hidden = self.vlm.language_model(**inputs).last_hidden_state.float()  # (B, L, D)
        pooled = torch.stack([hidden[b, : len(row)].mean(0, keepdim=True) for b, (row, _) in enumerate(rows)])
        return pooled.to(self.dtype).float().cpu()


def in_threads(function, items):
    """[function(item)] by threads: Pillow decodes and resizes without Python's lock."""
    with ThreadPoolExecutor(8, "pictures") as pool:
        return list(pool.map(function, items))


def read_image(path):
    """-> (h, w, 3) uint8 RGB; an image that cannot be read is an error with its path."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        how = "Copy it again from the recorder, or delete it and run create_datapkl.py again"
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}: {error}). {how}") from error


# ---- what makes a feature --------------------------------------------------------------------------------------------


def model_digest(model):
    """24 hex digits of what shapes a model's features: its weights, and the fields of its configuration, tokenizer,
    chat template, image mean and std. None for a hub model that is not on this machine."""
    if (folder := hub.folder_here(model)) is None:
        return None
    texts = [folder / name for name in ("vocab.json", "merges.txt", "chat_template.jinja")]
    words, chat = _read_json(folder, "tokenizer.json"), ("tokenizer_config.json", "chat_template.json")
    images = _read_json(folder, "preprocessor_config.json") or _read_json(folder, "processor_config.json")
    images = images.get("image_processor", images)
    facts = dict(
        weights=hub.weight_digest(folder),
        config=_read_json(folder, "config.json", SHAPE_NOTHING),
        words=[words.get(key) for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")],
        texts=[path.read_text(encoding="utf-8") for path in texts if path.is_file()],
        chat=[_read_json(folder, name).get("chat_template") for name in chat],
        images=[images.get("image_mean"), images.get("image_std")],
    )
    return digest_of(facts)


def _read_json(folder, name, without=()):
    """Content of a JSON file, its nested objects too without some fields; {} where there is none."""
    path = Path(folder) / name
    text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k not in without})


def digest_of(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def image_facts(session, view, indices, known=None):
    """[[path in the session, bytes, mtime_ns, sha256]] of these images. `known` {path: such a row}: an image whose size
    and time are still those is not read again."""
    names, rows = session.view(view)[0], []
    for name in (str(names[i]) for i in indices):
        path = f"{session.path}/{name}"
        try:
            rows.append([name, *hub.content_facts(path, (known or {}).get(name, [])[1:])])
        except FileNotFoundError:
            how = f"Copy it back, or run create_datapkl.py --dataset-dirs {session.path} --force"
            only = "Where cache and data.pkl are all there is, train with --no-check-pictures"
            raise MissingFile(f"{path} is in data.pkl but not on the disk. {how}. {only}") from None
    return rows


def different(then, now):
    """Two dicts -> ["key was ..., now ..."]; a model's weights identify it, its path does not."""
    keys = sorted({*then, *now} - {"model"})
    return [f"{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in keys if then.get(k) != now.get(k)]


# ---- files -----------------------------------------------------------------------------------------------------------


def stem_of(session):
    """How the names of a session's feature files begin: <stem>__<24 digits>.pt."""
    return session.name.replace("/", "__")


def checksum(features, meta):
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    digest.update(features.contiguous().numpy())
    return digest.hexdigest()


class FeatureFile:
    """Features of one session: `features` (n_ticks, 1, D) in the stored dtype, mapped from the file by the process
    that reads them, `shape`, `meta`. Opening compares the checksum; a file that is not what was written is refused."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            content = ckpt.load_state(path)
            self.shape, self.meta = tuple(content["features"].shape), content["meta"]
            whole = content["checksum"] == checksum(content["features"], self.meta)
        except (UserError, KeyError, TypeError, AttributeError):  # no such file, or of another program
            whole = False
        require(whole, f"{path} is damaged, or of another version of this program", CacheMismatch)

    @functools.cached_property
    def features(self):
        return ckpt.load_state(self.path)["features"]

    def __getstate__(self):  # another process maps the file again
        return {k: v for k, v in self.__dict__.items() if k != "features"}


def files_of(cache_root, session):
    """Paths of a session's feature files, the newest first."""
    pattern = f"{glob.escape(stem_of(session))}__{'[0-9a-f]' * 24}.pt"
    return sorted((Path(cache_root) / FOLDER).glob(pattern), key=os.path.getmtime, reverse=True)


def command(program, **flags):
    """A command line that works when it is copied; flags that are None are left out."""
    words = ["python", program]
    for key, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [] if value is None else [f"--{key.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


def read_features(cache_root, sessions, expected, reuse, max_image_age=MAX_IMAGE_AGE, pictures=True):
    """Open the features of all `sessions` -> ({session name: FeatureFile}, recipe). Loads no VLM and decodes no image.

    `expected`: the recipe's keys that the caller knows, e.g. {model, views, height, width}; the others may have any
    value, the same in all sessions. `reuse`: steps per feature; the cache's stride must divide it. `pictures`: compare
    with the images; False for a machine that has cache and data.pkl only. MissingFile lists sessions without a file; a
    file made with other settings, instruction or images is a CacheMismatch. Both name the command to build them."""
    wanted = {key: value for key, value in expected.items() if value is not None}
    if "views" in wanted:
        wanted["views"] = sorted(set(wanted["views"]))
    build = dict(dataset_dirs="DATA", cache_root=cache_root, vlm_reuse_count=reuse, max_image_age=max_image_age)
    build |= {key: wanted.get(key) for key in ("model", "views", "layer", "dtype")}
    build |= dict(image_resize_height=wanted.get("height"), image_resize_width=wanted.get("width"))
    how = f"Build them: {command('build_vl_cache.py', **build)}"
    if digest := model_digest(wanted["model"]) if "model" in wanted else None:
        wanted["weights"] = digest
    kinds, refused, missing = {}, [], []  # kinds {stride and recipe as text: {session: file}}
    for session in sessions:
        paths, reasons = files_of(cache_root, session), []
        for path in paths:
            try:
                file = FeatureFile(path)
                require_fit(file, session, wanted, reuse, max_image_age, pictures)
            except CacheMismatch as error:
                reasons.append(str(error))
            else:
                kind = json.dumps([file.meta["stride"], file.meta["recipe"] | dict(model="")], sort_keys=True)
                kinds.setdefault(kind, {}).setdefault(session.name, file)
        if not paths:
            missing.append(session.name)
        elif len(reasons) == len(paths):
            refused.append(f"{session.name}: {reasons[0]}")
    for names, kind, what in ((refused, CacheMismatch, "that fit"), (missing, MissingFile, "at all")):
        shown = "\n  ".join(names[:5] + [f"and {len(names) - 5} more"] * (len(names) > 5))
        require(not names, f"no features {what} of {len(names)} of {len(sessions)} sessions:\n  {shown}\n{how}", kind)
    whole = [json.loads(kind) for kind, files in kinds.items() if len(files) == len(sessions)]
    shown = [{key: recipe[key] for key in ("layer", "dtype", "compute_dtype", "views")} for _, recipe in whole]
    several = f"{cache_root} has {len(whole)} kinds of features that all sessions have, expected one: {shown}"
    keep = "Keep one, with build_vl_cache.py --prune, or give each its own --cache-root"
    same = whole and all(recipe == whole[0][1] for _, recipe in whole)
    require(same, f"{several}. {keep}", CacheMismatch)
    files = kinds[json.dumps(max(whole, key=lambda kind: kind[0]), sort_keys=True)]  # of several strides the coarsest
    return files, next(iter(files.values())).meta["recipe"]


def require_fit(file, session, wanted, reuse, max_image_age, pictures):
    """CacheMismatch says why `file` cannot serve."""
    meta, recipe = file.meta, file.meta["recipe"]
    now = {key: value for key, value in wanted.items() if key != "model"} | dict(format_version=FORMAT)
    differs = different({key: recipe.get(key) for key in now}, now)
    model = wanted.get("model", recipe["model"])
    if "weights" not in now and Path(model).name != Path(recipe["model"]).name:
        differs.append(f"model was {recipe['model']}, now {model}")  # not on this machine: its name is all there is
    differs += different(dict(instruction=meta["instruction"]), dict(instruction=session.instruction))
    if reuse % meta["stride"]:
        differs.append(f"stride was {meta['stride']}, of which vlm_reuse_count {reuse} is no multiple")
    require(not differs, "; ".join(differs), CacheMismatch)
    ticks = session.ticks(meta["stride"], recipe["views"], max_image_age)
    moved = f"ticks were {len(meta['tick_times'])}, now {len(ticks)} at other times: a new data.pkl"
    require(meta["tick_times"] == ticks.tick_time.tolist(), moved, CacheMismatch)
    for view in recipe["views"]:
        had, want = np.array(meta["frame_index"][view]), np.where(ticks.complete, ticks.frame_index[view], -1)
        if len(other := np.flatnonzero((want >= 0) & (want != had))):
            tick = other[0]
            raise CacheMismatch(f"image of {view} at tick {tick} was number {had[tick]}, now {want[tick]}")
        if pictures:
            rows, used = meta["frames"][view], sorted(set(want.tolist()) - {-1})
            facts, same = image_facts(session, view, used, {r[0]: r for r in rows}), {(r[0], r[3]) for r in rows}
            changed = [name for name, _, _, digest in facts if (name, digest) not in same]
            said = f"image {''.join(changed[:1])} changed, one of {len(changed)} of {view}"
            require(not changed, said, CacheMismatch)
