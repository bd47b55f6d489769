"""Features of a frozen Qwen2.5-VL: computed by VLEncoder, cached in one file per session, looked up by what made them.

File <cache_root>/qwen_vl_features/<data set>__<task>__<episode>__<digest of the recipe>.pt:
    features (n, 1, D) float16 or float32, one row per look: what the VLM sees at once, an image of every view
    meta {recipe, keys: n digests of instruction and images' contents, pictures {path: [bytes, mtime_ns, sha256]}}
    checksum of both
A feature of another image, instruction or setting has another key, so nothing stale can be served. A reader needs no
VLM and opens no image: one whose size and time are those in `pictures` is not even read."""

import functools
import glob
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from common import MissingFile, UserError, command, hub, qwen_vl, require
from common import checkpoint as ckpt
from common.frames import rgb
from common.log import progress

FORMAT = 3
FOLDER = "qwen_vl_features"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# a model's files, beside its weights, that shape its features
SHAPING = ("config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json")
SHAPING += ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


class CacheMismatch(UserError):
    """The cache was made with other settings or images, or is damaged; the message says what to do."""


# ---- encoder ---------------------------------------------------------------------------------------------------------
class VLEncoder:
    """Images of all views and an instruction -> one feature. Qwen2.5-VL is loaded, frozen, at the first encode.

    The prompt is one user turn: the images, sorted by view, then the instruction, in the chat template, without a
    generation prompt. Every image is resized, whatever its aspect, to height x width rounded down to whole tokens (28
    pixels): 360 x 640 gives 336 x 616, 264 tokens. `layer` -1: the last hidden state, normed; k: that after k layers
    (later ones are dropped). The feature is its mean over all tokens."""

    def __init__(self, model, views, height=360, width=640, layer=-1, dtype="fp16", device="cpu", compute_dtype=None):
        self.device, self.views, self.layer = torch.device(device), sorted(set(views)), layer
        self.folder, self.dtype = hub.local_folder(model), DTYPES[dtype]
        config, self.tokenizer, *moments = qwen_vl.open_backbone(self.folder)
        text, vision, self.image_token_id = config.text_config, config.vision_config, config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.width, self.patch, self.merge = text.hidden_size, vision.patch_size, vision.spatial_merge_size
        depth, side = text.num_hidden_layers, self.patch * self.merge
        require(-1 <= layer <= depth, f"layer is {layer}: expected -1 (the last, normed) or 0 to {depth}")
        self.grid = (height // side, width // side)  # (rows, columns) of an image's tokens
        self.size = (self.grid[0] * side, self.grid[1] * side)  # (height, width) in pixels
        compute_dtype = compute_dtype or ("bf16" if self.device.type == "cuda" else "fp32")
        self.compute_dtype = DTYPES[compute_dtype]
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1).to(self.device) * 255 for values in moments)
        # everything that shapes a feature, but images and instruction; and where the model was
        self.recipe = dict(format_version=FORMAT, model=hub.stored_source(model), weights=model_digest(self.folder))
        self.recipe |= dict(views=self.views, height=height, width=width, pixels=list(self.size), mean_and_std=moments)
        self.recipe |= dict(layer=layer, dtype=dtype, compute_dtype=compute_dtype, prompt=self.text("{instruction}"))

    @functools.cached_property
    def vlm(self):
        """The backbone: vision tower and language model. Loaded tensor by tensor to the device, so that the host never
        holds it in full; a missing weight is an error."""
        attention = qwen_vl.pick_attention("auto", self.device, self.compute_dtype)
        vlm = qwen_vl.load_backbone(self.folder, self.compute_dtype, attention, ["lm_head.weight"], self.device).model
        if self.layer >= 0:
            vlm.language_model.layers = vlm.language_model.layers[: self.layer]
            vlm.language_model.norm = torch.nn.Identity()
        return vlm.requires_grad_(False).eval()

    @classmethod
    def from_recipe(cls, recipe, device="cpu", model=None):
        """-> the encoder of this recipe; `model`: where the backbone is now. CacheMismatch if it is another one."""
        settings = {key: recipe[key] for key in ("views", "height", "width", "layer", "dtype", "compute_dtype")}
        encoder = cls(model or recipe["model"], device=device, **settings)
        differs = different(recipe, shaping(encoder.recipe))
        another = f"model '{encoder.folder}' is not the one the features were made with: {differs}"
        require(not differs, f"{another}. Give the right one with --model", CacheMismatch)
        return encoder

    def text(self, instruction):
        """The prompt, with one image token per view."""
        return qwen_vl.chat_text(self.tokenizer, self.image_token, len(self.views), instruction)

    def row(self, instruction):
        """-> (ids (L,), rope positions (L, 3)) of the prompt, with every image's placeholder expanded to its tokens."""
        tokens = self.grid[0] * self.grid[1]
        ids = qwen_vl.prompt_ids(self.tokenizer, self.text(instruction), self.image_token, tokens)
        return torch.tensor(ids), torch.from_numpy(qwen_vl.rope_positions(ids, self.image_token_id, self.grid).T)

    def load(self, image):
        """Path or (h, w, 3) uint8 RGB -> (height, width, 3) uint8, as the model sees it, in cache and predict alike."""
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
        rows, positions = zip(*(self.row(instruction) for _, instruction in observations), strict=True)
        # padded on the right, where causal attention never looks: no mask needed
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0).to(self.device)
        positions = pad_sequence(positions).permute(2, 1, 0).to(self.device)  # (3, B, L)
        grid = torch.tensor([[1, self.grid[0] * self.merge, self.grid[1] * self.merge]])  # stays on the CPU
        patches = qwen_vl.image_patches(pictures, self.mean, self.std, self.patch, self.merge)
        image_states = torch.cat(self.vlm.get_image_features(patches, grid.repeat(len(pictures), 1)).pooler_output)
        embeds = self.vlm.get_input_embeddings()(ids)  # (B, L, D); image_states (B * views * tokens per image, D)
        embeds = embeds.masked_scatter((ids == self.image_token_id)[..., None], image_states.to(embeds.dtype))
        inputs = dict(inputs_embeds=embeds, position_ids=positions, attention_mask=None, use_cache=False)
        hidden = self.vlm.language_model(**inputs).last_hidden_state.float()  # (B, L, D)
        pooled = torch.stack([hidden[b, : len(row)].mean(0, keepdim=True) for b, row in enumerate(rows)])
        return pooled.to(self.dtype).float().cpu()


def in_threads(function, *items):
    """-> [function(item, ...)], by threads: Pillow decodes and resizes without holding the GIL."""
    with ThreadPoolExecutor(8, "pictures") as pool:
        return list(pool.map(function, *items))


def read_image(path, size=None):
    """-> (h, w, 3) uint8 RGB; UserError names an image that cannot be read, or is not of `size` (h, w)."""
    try:
        with Image.open(path) as image:
            require(size in (None, image.size[::-1]), f"it is {image.size[::-1]}, the first one {size}", ValueError)
            return np.asarray(rgb(image))
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        advice = "Copy it again from the recorder, or delete it and run create_datapkl.py again"
        raise UserError(f"{path} cannot be read as an image ({type(error).__name__}: {error}). {advice}") from error


# ---- identity of a feature: model, settings, images, instruction -----------------------------------------------------
def model_digest(model):
    """-> digest of the files that shape a model's features; None for a hub model that is not on this machine."""
    if (folder := hub.folder_here(model)) is None:
        return None
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in SHAPING if (folder / name).is_file()}
    return digest_of([hub.weight_digest(folder), texts])


def digest_of(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def shaping(recipe):
    """-> the recipe without the model's path: `weights`, the digest of its files, identifies it."""
    return {key: value for key, value in recipe.items() if key != "model"}


def different(then, now):
    """Two dicts -> "key was ..., now ..." of the second's keys that differ; "" without any."""
    keys = [key for key in sorted(now) if then.get(key) != now[key]]
    return "; ".join(f"{key} was {then.get(key)!r}, now {now[key]!r}" for key in keys)


def picture_facts(session, looks, known):
    """-> {path in the session: [bytes, mtime_ns, sha256]} of the looks' images. `known`, of the same form: an image
    whose size and time are unchanged is not read again."""
    facts = {}
    for name in sorted(set().union(*looks)):
        try:
            facts[name] = hub.content_facts(f"{session.path}/{name}", known.get(name))
        except FileNotFoundError:
            advice = "copy it back, run create_datapkl.py again, or train with --no-check-pictures"
            raise MissingFile(f"{session.path}/{name} is in data.pkl but not on the disk: {advice}") from None
    return facts


def keys_of(session, looks, pictures):
    """-> {look: key of its feature in the file}. `pictures`: see picture_facts."""
    contents = {look: [pictures.get(name, [None])[-1] for name in look] for look in looks}
    return {look: digest_of([session.instruction, content]) for look, content in contents.items()}


# ---- files -----------------------------------------------------------------------------------------------------------
def checksum(features, meta):
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    digest.update(features.contiguous().numpy())
    return digest.hexdigest()


class FeatureFile:
    """Features of one session, memory-mapped: after fit(), file[look] is (1, D). CacheMismatch if it is damaged."""

    def __init__(self, path):
        self.path = Path(path)
        try:
            content = ckpt.load_state(path, check=False)  # it has its own checksum
            self.meta, self.shape = content["meta"], tuple(content["features"].shape)
            self.rows = {key: row for row, key in enumerate(self.meta["keys"])}
            same_format = self.meta["recipe"]["format_version"] == FORMAT
            intact = same_format and content["checksum"] == checksum(content["features"], self.meta)
            self.features = content["features"]  # set here, forked workers inherit it and need not open the file
        except (UserError, KeyError, TypeError, AttributeError):  # no such file, or of another program
            intact = False
        require(intact, f"{path} is damaged, or of another version of this program", CacheMismatch)

    @functools.cached_property
    def features(self):  # called in a process that got this object pickled, without the tensor
        content = ckpt.load_state(self.path, check=False)  # it may have been built again since, in another order
        self.rows = {key: row for row, key in enumerate(content["meta"]["keys"])}
        return content["features"]

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k != "features"}

    def __getitem__(self, look):
        return self.features[self.rows[self.keys[look]]]

    def fit(self, session, wanted, looks, check):
        """Find the features of these looks; CacheMismatch says why the file does not have them. `wanted`: values of its
        recipe; `check`: compare the images. Sets `content`, a digest of whatever shaped the features."""
        recipe, pictures = self.meta["recipe"], self.meta["pictures"]
        differs = different(recipe | dict(model=Path(recipe["model"]).name), wanted)
        require(not differs, differs, CacheMismatch)
        self.keys = keys_of(session, looks, picture_facts(session, looks, pictures) if check else pictures)
        lacks = [look for look, key in self.keys.items() if key not in self.rows]
        none = f"no feature of {len(lacks)} of {len(looks)} looks, e.g. at {', '.join([*lacks, ()][0])}"
        require(not lacks, f"{none}: another image, instruction or rate than when they were built", CacheMismatch)
        self.content = digest_of([self.path.stem[-24:], sorted(self.keys.values())])


def files_of(cache_root, session):
    """-> paths of a session's feature files, the newest first."""
    pattern = f"{glob.escape(session.name.replace('/', '__'))}__{'[0-9a-f]' * 24}.pt"
    return sorted((Path(cache_root) / FOLDER).glob(pattern), key=os.path.getmtime, reverse=True)


def file_of(cache_root, session, recipe):
    """-> path of a session's features of this recipe."""
    return Path(cache_root) / FOLDER / f"{session.name.replace('/', '__')}__{digest_of(shaping(recipe))}.pt"


def read_features(cache_root, sessions, expected, reuse, max_image_age=1.5, pictures=True, roots="DATA"):
    """Open the features of all `sessions`, for a VLM that runs every `reuse` steps -> ({session name: FeatureFile},
    recipe). Loads no VLM and decodes no image.

    `expected`: values that the recipe must have, e.g. of {model, views, height, width}; None and other keys: any value,
    the same in all sessions. `pictures`: compare the images; False for a machine that has cache and data.pkl only.
    MissingFile: sessions without a file; CacheMismatch: files without what is needed. Both say what differs and the
    command that builds it, for the folders `roots`."""
    wanted = {key: value for key, value in expected.items() if value is not None} | dict(format_version=FORMAT)
    if "views" in wanted:
        wanted["views"] = sorted(set(wanted["views"]))
    build = dict(dataset_dirs=roots, cache_root=cache_root, vlm_reuse_count=reuse, max_image_age=max_image_age)
    flags = dict(height="image_resize_height", width="image_resize_width")  # the recipe's key: the builder's flag
    build |= {flags.get(key, key): wanted.get(key) for key in ("model", "views", "layer", "dtype", "height", "width")}
    if digest := model_digest(wanted["model"]) if "model" in wanted else None:
        wanted = shaping(wanted) | dict(weights=digest)
    elif "model" in wanted:  # not on this machine: only its name can be compared
        wanted["model"] = Path(wanted["model"]).name
    kinds, reasons = {}, {}  # {digest of the recipe: {session: file}}, {session: why its newest file does not fit}
    for session in progress(sessions, "reading features", "session"):
        for path in files_of(cache_root, session):
            try:
                file = FeatureFile(path)
                views = file.meta["recipe"]["views"]
                file.fit(session, wanted, session.ticks(reuse, views, max_image_age).unique(), pictures)
                kinds.setdefault(path.stem[-24:], {})[session.name] = file
            except UserError as error:
                reasons.setdefault(session.name, str(error))
    most = max(kinds.values(), key=len, default={})  # the kind that most sessions have
    reasons |= dict.fromkeys(set().union(*kinds.values()) - set(most), "of other settings than those of the others")
    lacking = [f"{s.name}: {reasons.get(s.name, 'none at all')}" for s in sessions if s.name not in most]
    shown = "\n  ".join(lacking[:5] + [f"and {len(lacking) - 5} more"] * (len(lacking) > 5))
    none = f"no features that fit of {len(lacking)} of {len(sessions)} sessions:\n  {shown}"
    error = CacheMismatch if reasons else MissingFile
    require(not lacking, f"{none}\nBuild them: {command('build_vl_cache.py', **build)}", error)
    complete = [files for files in kinds.values() if len(files) == len(sessions)]
    recipes = [next(iter(files.values())).meta["recipe"] for files in complete]
    shown = [{key: recipe[key] for key in ("layer", "dtype", "compute_dtype", "views")} for recipe in recipes]
    several = f"{cache_root} has {len(complete)} kinds of features that all sessions have, expected one: {shown}"
    keep = "Choose with --views, keep one with build_vl_cache.py --prune, or give each its own --cache-root"
    require(len(complete) == 1, f"{several}. {keep}", CacheMismatch)
    return complete[0], recipes[0]
