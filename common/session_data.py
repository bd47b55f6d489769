"""Robot sessions as training samples: what train_async.py and train_diffusion.py agree on before and after their networks.

One sample is one 100 ms step k: the VL feature of the newest tick, the newest sensor rows -> the next H actions.
Letters in shapes: B batch, N VL tokens of a tick (1), V their width, W sensor rows (the window), H actions (the chunk).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from common import UserError, require, vl_cache
from common import sessions as ss
from common.run import to_device
from common.sampler import GlobalOrder
from common.stats import Normalizer

ACTIONS = [("dx", "mm"), ("dy", "mm"), ("dz", "mm"), ("da", "deg"), ("db", "deg"), ("dr", "deg"), ("gripper", "")]


# ---- sessions and features -------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Sessions of a run, split and described."""

    train: list  # common.sessions.Session, sorted by name
    validation: list
    stats: dict  # of the training sessions: action, sensor; open_features adds vl
    features: object  # Features
    fingerprint: str  # changes when the training samples, their features or their order would

    def open_features(self, dataset, run):
        """-> (the VLM's encoder, or None where the cache has everything; what a checkpoint tells about its data)."""
        encoder, shape, recipe = self.features.open(run.device)
        if "vl" not in self.stats:
            self.stats["vl"] = run.once(feature_stats, dataset, encoder)
        texts = sorted({s.instruction for s in self.train})
        about = dict(vl_shape=list(shape), recipe=recipe, stats=self.stats, instructions=texts)
        return encoder, about | dict(fingerprint=self.fingerprint)


class Features:
    """The VL features of the sessions: those of the cache's files, without opening an image; or, with --cache online,
    the images that the VLM is to see.

    `expected`: keys of the features' recipe that must be so; None: those of the config. `optional`: errors of the cache
    after which images are read instead, `missing` then says why."""

    def __init__(self, cfg, part, expected=None, optional=()):
        self.cfg, self.files, self.recipe, self.missing = cfg, None, None, None
        self.stride, self._ticks = cfg.vlm_reuse_count, {}
        size = dict(height=cfg.image_resize_height, width=cfg.image_resize_width)
        expected = expected or dict(model=cfg.model, views=cfg.views or None, **size)
        root = Path(cfg.cache_root or Path(cfg.dataset_dir[0]) / "cache")
        if cfg.cache == "required":
            try:
                found = vl_cache.read_features(root, part, expected, cfg.vlm_reuse_count, cfg.max_image_age)
                self.files, self.recipe = found
            except optional as error:
                self.missing = str(error)
        common, lacking = ss.common_views(part)
        self.views = self.recipe["views"] if self.files else list(expected["views"] or common)
        choose = "choose some with --views, or leave sessions out"
        require(self.views, f"no view is in all of the {len(part)} sessions: {choose}; missing: {lacking}")
        shown = f"views {', '.join(self.views)} at"
        self.about = f"{cfg.model}, {shown} {expected['height']}x{expected['width']}, computed in every step"
        if self.files:
            first, pixels = next(iter(self.files.values())), "x".join(map(str, self.recipe["pixels"]))
            self.stride, self.shape = first.meta["stride"], first.shape[1:]
            numbers = f"{self.shape[0]} x {self.shape[1]} numbers every {self.stride} steps"
            self.about = f"{self.recipe['model']}, {shown} {pixels}: {numbers}, {root}"

    def open(self, device):
        """-> (the VLM's encoder, or None where the cache has everything; (N, V); recipe of the features)."""
        if self.files:
            return None, self.shape, self.recipe
        c = self.cfg
        encoder = vl_cache.VLEncoder(c.model, self.views, c.image_resize_height, c.image_resize_width, device=device)
        return encoder, (encoder.tokens, encoder.width), encoder.recipe()

    def key(self, session):
        """What changes when the features of this session would."""
        if self.files:
            return self.files[session.name].path.stem[-24:]
        return [self.about, session.instruction]

    def usable(self, session):
        """-> (m,) steps whose tick has a fresh image of every view, (m,) their tick, (m,) steps since that tick."""
        c = self.cfg
        ticks = self._ticks[session.name] = session.ticks(self.stride, self.views, c.max_image_age)
        latency = c.vlm_latency_ms / 1000
        steps, at = session.usable_steps(self.stride, c.vlm_reuse_count, self.views, c.max_image_age, latency)
        return steps, at, steps - ticks.start[at]

    def read(self, session, tick):
        """-> dict(vl_features (N, V) float32), or dict(images {view: (h, w, 3) uint8}, instruction)."""
        if self.files:
            return dict(vl_features=self.files[session.name].features[tick].float())
        index = {view: int(self._ticks[session.name].frame_index[view][tick]) for view in self.views}
        images = {view: vl_cache.read_image(session.frame_path(view, i)) for view, i in index.items()}
        return dict(images=images, instruction=session.instruction)


def load_data(cfg, run=None, saved=None, optional=()):
    """Find, split and describe the sessions. `saved`: a checkpoint, whose statistics are kept where it was trained on
    these very sessions; `optional`: see Features."""
    found = ss.find_sessions(cfg.dataset_dir)
    for s in found:
        rate, again = s.metadata["action_hz"], f"python create_datapkl.py --dataset-dirs {s.path} --force"
        require(rate == ss.ACTION_HZ, f"{s.name} has actions at {rate:g} Hz, expected {ss.ACTION_HZ}: {again}")
    train, validation = ss.split_sessions(found, cfg.val_split)
    features = Features(cfg, found, optional=optional)
    old = f"has an image of {', '.join(features.views)} that is at most {cfg.max_image_age:g} s old"
    how = "choose other --views, or raise --max-image-age"
    some = any(len(features.usable(s)[0]) for s in train)
    require(some, f"no step of the {len(train)} training sessions {old}: {how}")
    facts = json.dumps([[s.name, content_hash(s), features.key(s)] for s in train])
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
    if saved and saved["fingerprint"] == fingerprint:
        stats = saved["stats"]
    else:  # reads a tenth of all sensor rows: once is enough
        stats = run.once(ss.session_stats, train) if run else ss.session_stats(train)
    require(not all(stats["action"]["constant"]), "no action dimension moves in the training sessions")
    return Data(train, validation, stats, features, fingerprint)


def content_hash(session):
    stamps = session.sensor_stamps.tobytes() if session.has_sensor else b""
    return hashlib.sha256(session.action.tobytes() + session.starts.tobytes() + stamps).hexdigest()


def feature_stats(dataset, encoder, samples=512):
    """-> dict(mean, std), V numbers each, of the features of `samples` steps, evenly spread."""
    chosen, features = np.unique(np.linspace(0, len(dataset) - 1, samples).astype(int)).tolist(), []
    for i in range(0, len(chosen), 16):
        reads = [dataset.features.read(*dataset.tick_at(k)) for k in chosen[i : i + 16]]
        if encoder is None:
            features.append(torch.stack([r["vl_features"] for r in reads]))
        else:
            features.append(encoder.encode([(r["images"], r["instruction"]) for r in reads]))
    features = torch.cat(features).flatten(0, 1).double()  # (n, V)
    mean, std = features.mean(0), features.std(0, correction=0)
    return dict(mean=mean.tolist(), std=std.clamp(min=1e-3 * (1 + mean.abs())).tolist())  # above the rounding of fp16


# ---- samples ---------------------------------------------------------------------------------------------------------


class SessionDataset(Dataset):
    """One item per usable step k of the sessions (its VLM tick has a fresh image of every view). Item (position, i):

    vl_features (N, V) float32, or with --cache online images {view: (h, w, 3) uint8} and instruction |
    sensor (n <= W, 1026) float32 raw rows, newest last, or None |
    actions (H, 7) float32 in mm and degrees, action_mask (H,) bool: False past the end of the segment |
    previous (7,) the action before, zeros at a segment's start | weight float32, in the loss |
    reuse_step, steps since the feature's images: 0..R-1 without latency | name (session, k)
    """

    def __init__(self, part, features, cfg):
        self.sessions, self.features, self.cfg = list(part), features, cfg
        self.datasets = sorted({s.dataset for s in self.sessions})
        usable = [features.usable(s) for s in self.sessions]
        self.steps, self.ticks, self.age = zip(*usable, strict=True) if usable else ((), (), ())
        self.ends = np.cumsum([len(k) for k in self.steps])

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def sample_weights(self, table, changes=()):
        """{data set: weight} (others 1), changes ["NAME=W"] -> (len,) weight of each sample."""
        weights = {name: table.get(name, 1.0) for name in self.datasets}
        for text in changes:
            name, _, value = text.rpartition("=")
            with contextlib.suppress(ValueError):
                weights[name] = float(value) if name in weights else math.nan
            wanted = f"expected NAME=W: one of {', '.join(self.datasets)}, and a weight above 0"
            require(0 < weights.get(name, 0) < math.inf and "=" in text, f"dataset_weight '{text}': {wanted}")
        return np.repeat([weights[s.dataset] for s in self.sessions], [len(k) for k in self.steps]).astype(np.float64)

    def locate(self, i):
        """Sample -> (session number, row of its steps)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, int(i - (self.ends[e - 1] if e else 0))

    def tick_at(self, i):
        """Sample -> (session, its VLM tick)."""
        e, row = self.locate(i)
        return self.sessions[e], int(self.ticks[e][row])

    def __getitem__(self, key):
        _, i = key  # the order is random, nothing else
        return self.read(*self.locate(i))

    def read(self, e, row):
        """Step number `row` of session number `e`."""
        s, k, tick, cfg = self.sessions[e], int(self.steps[e][row]), int(self.ticks[e][row]), self.cfg
        actions, mask = s.targets(k, cfg.horizon)
        first = k == 0 or s.segment[k - 1] != s.segment[k]
        sensor = None
        if cfg.sensor_enabled and s.has_sensor:
            window, length = s.sensor_window(k, cfg.sensor_window_size)
            sensor = window[len(window) - length :] if length else None
        return self.features.read(s, tick) | dict(
            sensor=sensor,
            actions=actions,
            action_mask=mask,
            previous=np.zeros_like(s.action[0]) if first else s.action[k - 1],
            weight=np.float32(cfg.sensor_loss_weight if sensor is not None else 1),
            reuse_step=int(self.age[e][row]),
            name=(s.name, k),
        )


class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict."""

    def __init__(self, cfg, stats):
        self.window, self.sensor_enabled = cfg.sensor_window_size, cfg.sensor_enabled
        self.action = Normalizer(stats["action"])

    def inputs(self, observations):
        """vl_features (B, N, V) float32, or pictures: list of (images, instruction), see Policy.with_features |
        sensor (B, W, 1026) float32 raw, zeros on the left where rows are missing | sensor_length (B,), 0 without
        sensor."""
        batch = {}
        if self.sensor_enabled:
            sensor, length = np.zeros((len(observations), self.window, ss.CHANNELS), np.float32), []
            for b, o in enumerate(observations):
                rows = [] if o.get("sensor") is None else np.asarray(o["sensor"])[-self.window :]
                if len(rows):
                    sensor[b, self.window - len(rows) :] = rows
                length.append(len(rows))
            batch = dict(sensor=torch.from_numpy(sensor), sensor_length=torch.tensor(length))
        if "vl_features" in observations[0]:
            features = [torch.as_tensor(o["vl_features"]).float() for o in observations]
            return batch | dict(vl_features=torch.stack(features))
        return batch | dict(pictures=[(o["images"], o["instruction"]) for o in observations])

    def __call__(self, items):
        """List of dataset items -> inputs() plus actions (B, H, 7) normalised, has_sensor (B,), names, and every other
        number or array of the items, stacked: action_mask (B, H), weight, reuse_step (B,), ..."""
        ours = ("sensor", "vl_features", "images", "instruction", "actions", "previous", "name")
        rest = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0] if key not in ours}
        return self.inputs(items) | dict(
            actions=torch.from_numpy(self.action.normalize(np.stack([item["actions"] for item in items]))),
            has_sensor=torch.tensor([item["sensor"] is not None for item in items]),
            names=[item["name"] for item in items],
            **rest,
        )


# ---- policy ----------------------------------------------------------------------------------------------------------


class SessionPolicy:
    """What a policy on sessions does around its network: observations -> batch, features of images, episodes for
    evaluate.py. A script adds predict(observations) -> (B, H, 7) in mm and degrees. Used by common.two_rate.

    `about`: what Data.open_features told, from the training or out of a checkpoint; `vlm`: where the VLM is now."""

    def __init__(self, model, cfg, about, device, encoder=None, vlm=None):
        self.model, self.cfg, self.device, self._encoder, self.vlm = model, cfg, device, encoder, vlm
        self.stats, self.recipe, self.instructions = (about[key] for key in ("stats", "recipe", "instructions"))
        self.bf16, self.collate = device.type == "cuda" and cfg.use_bfloat16, Collate(cfg, self.stats)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def encode(self, pictures):
        """list of ({view: (h, w, 3) uint8 RGB}, instruction) -> (B, N, V) float32 features. Loads the VLM at the first
        call."""
        if self._encoder is None:
            self._encoder = vl_cache.VLEncoder.from_recipe(self.recipe, self.device, self.vlm)
        return self._encoder.encode(pictures)  # rounded as in the cache

    def with_features(self, batch):
        """Collate's batch with its pictures, where it has some, turned into vl_features (B, N, V)."""
        if "vl_features" in batch:
            return batch
        rest = {k: v for k, v in batch.items() if k != "pictures"}
        return rest | dict(vl_features=self.encode(batch["pictures"]).to(self.device))

    def inputs(self, observations):
        """list of {vl_features (N, V), or images {view: (h, w, 3) uint8 RGB} and instruction; sensor: (n, 1026) raw
        rows (force, A-scan) up to now, newest last, or None} -> Collate.inputs' batch, with features, on the device."""
        for o in observations:
            shape, right = np.shape(o.get("sensor")), "force, then the A-scan"
            good = o.get("sensor") is None or (len(shape) == 2 and shape[1] == ss.CHANNELS)
            require(good, f"the observation's sensor is {shape}, expected (n, {ss.CHANNELS}): {right}")
            missing = [] if "vl_features" in o else [v for v in self.recipe["views"] if v not in o["images"]]
            require(
                not missing, f"the observation has images of {sorted(o.get('images', ()))}, but {missing} is missing"
            )
        if images := [b for b, o in enumerate(observations) if "vl_features" not in o]:
            observations = list(observations)
            encoded = self.encode([(observations[b]["images"], observations[b]["instruction"]) for b in images])
            for b, feature in zip(images, encoded, strict=True):
                observations[b] = observations[b] | dict(vl_features=feature)
        return to_device(self.collate.inputs(observations), self.device)

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per session, and per stretch of it without a gap, {name, sample: callable(t) ->
        observation, target (M, 7), hold (M, 7): the action that stands still, phase None}."""
        found = ss.find_sessions([root])
        for unknown in sorted(set(names or []) - {s.name for s in found}):
            raise UserError(f"'{root}' has no session '{unknown}'; it has {', '.join(s.name for s in found[:5])}, ...")
        chosen = [s for s in found if names is None or s.name in names]
        cfg = dataclasses.replace(self.cfg, dataset_dir=[str(root)], cache="required", cache_root=None)
        expected = {k: v for k, v in self.recipe.items() if k not in ("model", "format_version")}
        features = Features(cfg, chosen, expected, optional=(FileNotFoundError, vl_cache.CacheMismatch))
        if not features.files:
            why = features.missing.splitlines()[0]
            print(f"features  computed now by {self.vlm or self.recipe['model']}, for in the cache {why}")
        dataset = SessionDataset(chosen, features, cfg)
        still = np.where(self.stats["action"]["constant"], self.stats["action"]["mean"], 0.0).astype(np.float32)
        for e, (s, steps) in enumerate(zip(dataset.sessions, dataset.steps, strict=True)):
            breaks = np.flatnonzero((np.diff(steps) != 1) | (np.diff(s.segment[steps]) != 0)) + 1
            parts = [p for p in np.split(np.arange(len(steps)), breaks) if len(p)]
            for n, rows in enumerate(parts):
                target = s.action[steps[rows]]
                yield dict(
                    name=s.name if len(parts) == 1 else f"{s.name}#{n + 1}",
                    sample=lambda t, e=e, rows=rows: dataset.read(e, int(rows[t])),
                    target=target,
                    hold=np.repeat(still[None], len(target), 0),
                    phase=None,
                )

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return ACTIONS


# ---- validation ------------------------------------------------------------------------------------------------------


def held_out_batches(dataset, policy, run):
    """This rank's share of the held-out steps, each once -> (items, their batch with features, on the device)."""
    mine = range(run.rank, len(dataset), run.world)
    for i in range(0, len(mine), policy.cfg.batch_size):
        items = [dataset[(k, k)] for k in mine[i : i + policy.cfg.batch_size]]
        yield items, to_device(policy.with_features(policy.collate(items)), policy.device)


class ChunkErrors:
    """Sums over held-out steps: the loss, and the absolute error of predicted chunks beside two baselines (no motion;
    the last action again). Padded steps and dimensions that never move do not count."""

    def __init__(self, active):
        self.active, self.sums = active.cpu().numpy(), np.zeros(2 + 3 * len(ACTIONS) + 1)

    def add(self, predicted, items, loss_sum, weight):
        target = np.stack([item["actions"] for item in items])
        real = np.stack([item["action_mask"] for item in items])
        still = np.where(self.active, 0.0, target)
        last = np.stack([item["previous"] for item in items])[:, None]
        errors = [np.abs(guess - target)[real].sum(0) for guess in (predicted, still, last)]
        self.sums += [float(loss_sum), float(weight), *np.concatenate(errors).tolist(), real.sum()]

    def values(self, run):
        """Over all ranks -> {val/loss_epoch, val/mae_mm, val/mae_deg, the same of the baselines, val/mae_<dim>}."""
        loss, weight, *errors, steps = run.sum(*self.sums)
        errors, values = np.reshape(errors, (3, -1)) / steps, {"val/loss_epoch": loss / weight}
        for unit in ("mm", "deg"):
            dims = [d for d, (_, u) in enumerate(ACTIONS) if u == unit and self.active[d]]
            for row, who in enumerate(("", "_zero", "_last") if dims else ()):
                values[f"val/mae_{unit}{who}"] = float(errors[row, dims].mean())
        each = {f"val/mae_{name}": float(errors[0, d]) for d, (name, _) in enumerate(ACTIONS) if self.active[d]}
        return values | each

    @staticmethod
    def text(values):
        parts = [f"loss {values['val/loss_epoch']:.4f}"]
        for unit in ("mm", "deg"):
            if f"val/mae_{unit}" in values:
                mae, zero, last = (values[f"val/mae_{unit}{who}"] for who in ("", "_zero", "_last"))
                parts.append(f"MAE {unit} {mae:.4g} (no motion {zero:.4g}, last action {last:.4g})")
        return " | ".join(parts)


# ---- what a run says about its data ----------------------------------------------------------------------------------


def describe(cfg, data, dataset, held_out, weights, print0):
    """Say what was found: sessions, steps and shares per data set, features, sensor, actions and ranges. `weights`: of
    the samples of `dataset`."""
    held, where = f"{len(data.validation)} validation sessions, {len(held_out)} steps", ", ".join(cfg.dataset_dir)
    usable = f"{len(dataset)} of {sum(map(len, data.train))} steps (the others have no fresh image)"
    print0(f"data      {len(data.train)} training sessions, {usable}; {held}; {where}")
    for name in dataset.datasets:
        theirs = [s for s in dataset.sessions if s.dataset == name]
        mine = np.repeat([s.dataset == name for s in dataset.sessions], [len(k) for k in dataset.steps])
        share = f"weight {weights[mine].max(initial=0):g}, {mine.sum():7d} steps, share {weights[mine].sum() / weights.sum():6.1%}"
        print0(f"          {name:<30} {share}, sensor in {sum(s.has_sensor for s in theirs)} of {len(theirs)} sessions")
    rate, reuse = ss.ACTION_HZ, cfg.vlm_reuse_count
    print0(f"features  {data.features.about}; {reuse} steps share one: a VLM at {rate / reuse:.2f} Hz")
    if cfg.vlm_latency_ms > 1000 / rate * reuse:
        enough = math.ceil(cfg.vlm_latency_ms * rate / 1000)
        slow = f"vlm_latency_ms is {cfg.vlm_latency_ms:g}: a VLM that slow cannot look every {reuse} steps"
        print0(f"warning   {slow}. Use --vlm-reuse-count {enough}, fewer views, or smaller images")
    window, weight = cfg.sensor_window_size, f"loss weight {cfg.sensor_loss_weight:g} with sensor, 1 without"
    rows = f"the newest {window} rows, {window / ss.SENSOR_HZ:.2f} s at {ss.SENSOR_HZ} Hz; {weight}"
    print0(f"sensor    {rows if cfg.sensor_enabled else 'not used'}")
    names = "".join(f"{f'{n} {u}'.strip():>11}" for n, u in ACTIONS)
    print0(f"action    {cfg.horizon} steps of {1000 // rate} ms; per step:{names}")
    for name in ("q01", "q99", "mean", "std"):
        print0(f"          {name:<30}" + "".join(f"{v:11.4g}" for v in data.stats["action"][name]))
    texts = sorted({s.instruction for s in data.train})
    print0(f"text      {len(texts)} instruction(s), e.g. {texts[0]!r}")


def check_data(cfg, dataset_class, table):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a cache the
    features stay unread, and it says so."""
    data = load_data(cfg, optional=FileNotFoundError)
    dataset, held_out = (dataset_class(part, data.features, cfg) for part in (data.train, data.validation))
    weights = dataset.sample_weights(table, cfg.dataset_weight)
    describe(cfg, data, dataset, held_out, weights, print)
    order = GlobalOrder(len(dataset), cfg.seed, weights)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    name, k = items[0]["name"]
    print(f"samples   {len(dataset)}; batch of {len(items)}, first: {name} step {k}")
    for key, value in Collate(cfg, data.stats)(items).items():
        if isinstance(value, torch.Tensor):
            dtype, low, high = str(value.dtype).removeprefix("torch."), value.min().item(), value.max().item()
            print(f"          {key:<14} {str(tuple(value.shape)):<18} {dtype:<8} {low:.4g} .. {high:.4g}")
    if data.features.missing:
        print(f"note      the features are not there yet: {data.features.missing}")
    for view, image in items[0].get("images", {}).items():
        print(f"          {view:<14} {image.shape} {image.dtype}")
    print("check passed")
