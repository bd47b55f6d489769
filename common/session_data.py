"""Robot sessions as training samples: data set, collate, policy and validation of train_async.py, train_diffusion.py.

One sample is one 100 ms step k: the VL feature of the newest tick, the newest sensor rows -> the next H actions.
Letters in shapes: B batch, N VL tokens of a tick (1), V their width, W sensor rows (the window), H actions (chunk)."""

import contextlib
import dataclasses
import hashlib
import math
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from common import command, plan, require, vl_cache
from common import sessions as ss
from common.log import progress
from common.policy import Contract, partners
from common.program import ignore_stop_signals
from common.run import to_device
from common.sampler import GlobalOrder, generator_at
from common.stats import Normalizer

ACTIONS = [("dx", "mm"), ("dy", "mm"), ("dz", "mm"), ("da", "deg"), ("db", "deg"), ("dr", "deg"), ("gripper", "")]


@dataclasses.dataclass
class Data:
    """Sessions of a run, split, and what a checkpoint says about them."""

    train: list  # common.sessions.Session, sorted by name
    validation: list
    features: object  # Features
    about: dict  # for the checkpoint: stats, recipe, vl_shape, sensor_hz, image_sizes, instructions, ...


class Features:
    """The VL features of the sessions, read from the cache without opening an image.

    `expected`: values that the features' recipe must have; None: the config's. `optional`: exceptions of the cache
    after which read() returns images instead, for a VLM that runs now; `missing` then says why. `pictures`: see
    vl_cache.read_features."""

    def __init__(self, cfg, sessions, expected=None, optional=(), pictures=True):
        self.cfg, self.files, self.missing, self.shape = cfg, None, None, ()
        self.ticks = {}  # {session name: sessions.Ticks}, set by usable()
        self.root = cfg.cache_root or f"{cfg.dataset_dir[0]}/cache"
        size = dict(height=cfg.image_resize_height, width=cfg.image_resize_width)
        expected = expected or dict(model=cfg.model, views=cfg.views or None, **size)
        rest = (cfg.vlm_reuse_count, cfg.max_image_age, pictures and cfg.check_pictures, cfg.dataset_dir)
        try:
            self.files, self.recipe = vl_cache.read_features(self.root, sessions, expected, *rest)
            self.shape = next(iter(self.files.values())).shape[1:]
        except optional as error:
            self.missing, views = str(error), expected["views"] or ss.common_views(sessions)[0]
            self.recipe = expected | dict(views=views)

    def usable(self, session):
        """-> (m,) steps whose tick, at the shortest latency, has a fresh image of every view, and (m,) that tick."""
        c = self.cfg
        self.ticks[session.name] = ticks = session.ticks(c.vlm_reuse_count, self.recipe["views"], c.max_image_age)
        tick_of = session.tick_of_step(np.arange(len(session)), c.vlm_reuse_count, min(c.vlm_latency_ms) / 1000)
        steps = np.flatnonzero([ticks.looks[tick] is not None for tick in tick_of])
        return steps, tick_of[steps]

    def ages(self, session):
        """-> (m,) seconds from the images' capture to each usable step, at the shortest latency."""
        steps, ticks = self.usable(session)
        return session.starts[steps] - self.ticks[session.name].captured[ticks]

    def read(self, session, tick):
        """-> dict(vl_features (N, V) float32), or dict(images {view: (h, w, 3) uint8}, instruction)."""
        look = self.ticks[session.name].looks[tick]
        if self.files:
            return dict(vl_features=self.files[session.name][look].float())
        views, paths = self.recipe["views"], [session.path / name for name in look]
        images = vl_cache.in_threads(vl_cache.read_image, paths, map(session.image_size, views))
        return dict(images=dict(zip(views, images, strict=True)), instruction=session.instruction)


def load_data(cfg, run=None, saved=None, optional=()):
    """-> Data. `saved`: a checkpoint to start from, whose statistics are kept; `optional`: see Features."""
    sessions = ss.find_sessions(cfg.dataset_dir)
    for s in sessions:
        rate, again = s.metadata["action_hz"], command("create_datapkl.py", dataset_dirs=s.path) + " --force"
        require(rate == ss.ACTION_HZ, f"{s.name} has actions at {rate:g} Hz, expected {ss.ACTION_HZ}: {again}")
    train, validation = ss.split_sessions(sessions, cfg.val_split)
    features = Features(cfg, sessions, optional=optional, pictures=run is None or run.main)
    views, facts = features.recipe["views"], []
    old = f"at most {cfg.max_image_age:g} s: change --views, --max-image-age, --vlm-reuse-count or --vlm-latency-ms"
    for kind, part in dict(training=train, validation=validation).items():
        none = f"no step of the {len(part)} {kind} sessions has an image of {', '.join(views)} of {old}"
        require(not part or any(len(features.usable(s)[0]) for s in part), none)
    ages = np.concatenate([features.ages(s) for s in train])
    late = [ss.steps_late(ms / 1000) for ms in cfg.vlm_latency_ms]
    for s in train:
        stamps = s.sensor_stamps.tobytes() if s.has_sensor else b""
        content = hashlib.sha256(s.action.tobytes() + s.starts.tobytes() + stamps).hexdigest()
        facts.append([s.name, content, features.files and features.files[s.name].content])
    fingerprint = vl_cache.digest_of(facts)
    first = run.once(str, fingerprint) if run else fingerprint  # rank 0's, which alone compared the images
    require(fingerprint == first, "the processes see other sessions or features: start again when they are all built")
    if saved:
        differs = vl_cache.different(saved["recipe"], vl_cache.shaping(features.recipe))
        require(not differs, f"the checkpoint was trained on other features than those of {features.root}: {differs}")
        stats = saved["stats"]
    else:
        stats = run.once(all_stats, train, features, cfg) if run else all_stats(train, features, cfg)
    require(not all(stats["action"]["constant"]), "no action dimension moves in the training sessions")
    sizes = {view: {s.image_size(view) for s in train} for view in views}
    about = dict(stats=stats, recipe=features.recipe, vl_shape=list(features.shape), fingerprint=fingerprint)
    about["sensor_hz"] = float(np.median([s.sensor_hz for s in train if s.has_sensor] or [ss.SENSOR_HZ]))
    about["oldest_image_s"] = float(ages.max()) + (max(late) - min(late)) / ss.ACTION_HZ
    about["instructions"] = sorted({s.instruction for s in train})
    about["image_sizes"] = {view: list(*known) if len(known) == 1 else None for view, known in sizes.items()}
    return Data(train, validation, features, about)


def all_stats(train, features, cfg, samples=512):
    """sessions.session_stats and, where there is a cache, mean and std (V) of the features of `samples` steps."""
    stats, dataset = ss.session_stats(train), SessionDataset(train, features, cfg)
    if features.files:
        chosen = np.unique(np.linspace(0, len(dataset) - 1, samples).astype(int))
        x = torch.cat([dataset.look(i)["vl_features"] for i in chosen]).double()  # (n, V)
        mean, std = x.mean(0), x.std(0, correction=0)
        std = std.clamp(min=1e-3 * (1 + mean.abs()))  # not below fp16's rounding error
        stats["vl"] = dict(mean=mean.tolist(), std=std.tolist())
    return stats


class SessionDataset(Dataset):
    """One item per usable step k of the sessions (its VLM tick has a fresh image of every view). dataset[position, i]:

    vl_features (N, V) float32, or without a cache images {view: (h, w, 3) uint8} and instruction |
    sensor (n <= W, 1026) raw rows as on the disk, newest last, or None | previous (7,) the action before, or zeros |
    actions (H, 7) float32 in mm and degrees, action_mask (H,) bool: False past the end of the segment |
    weight float32, in the loss | reuse_step, steps since the feature's tick: 0..R-1 without latency |
    age float, seconds since the feature's images were taken | name (session, k)"""

    def __init__(self, sessions, features, cfg):
        self.sessions, self.features, self.cfg = list(sessions), features, cfg
        usable = [features.usable(s) for s in self.sessions]
        self.owner = np.repeat(np.arange(len(usable)), [len(steps) for steps, _ in usable])  # index of i's session
        self.steps, self.ticks = np.concatenate([np.zeros((2, 0), int), *map(np.stack, usable)], axis=1)
        self.datasets = np.array([s.dataset for s in self.sessions])[self.owner]

    def __len__(self):
        return len(self.steps)

    def sample_weights(self, table, changes=()):
        """{data set: weight} (others 1), changes ["NAME=W"] -> (n,) weight of each sample."""
        weights = {s.dataset: table.get(s.dataset, 1.0) for s in self.sessions}
        expected = f"expected NAME=W: one of {', '.join(sorted(weights))}, and a weight above 0"
        for text in changes:
            name, _, value = text.rpartition("=")
            number = float(pd.to_numeric(value, errors="coerce"))
            require(name in weights and 0 < number < math.inf, f"dataset_weight '{text}': {expected}")
            weights[name] = number
        return np.array([weights[name] for name in self.datasets], np.float64)

    def look(self, i):
        """The feature of item i alone."""
        return self.features.read(self.sessions[self.owner[i]], self.ticks[i])

    def __getitem__(self, key):
        position, i = key  # position: seeds what is random about the item, the age of its feature
        s, k, tick, cfg = self.sessions[self.owner[i]], int(self.steps[i]), int(self.ticks[i]), self.cfg
        ticks, low, high = self.features.ticks[s.name], min(cfg.vlm_latency_ms), max(cfg.vlm_latency_ms)
        if high > low:
            latency = generator_at(cfg.seed, position, "latency").uniform(low, high) / 1000
            older = int(s.tick_of_step(k, cfg.vlm_reuse_count, latency))
            tick = tick if ticks.looks[older] is None else older
        actions, mask = s.targets(k, cfg.horizon)
        sensor = s.sensor_window(k, cfg.sensor_window_size) if cfg.sensor_enabled else None
        item = dict(sensor=sensor, actions=actions, action_mask=mask, reuse_step=k - int(ticks.start[tick]))
        item["age"] = s.starts[k] - ticks.captured[tick]
        item["previous"] = np.zeros_like(s.action[0]) if k == s.first[k] else s.action[k - 1]
        item["weight"] = np.float32(cfg.sensor_loss_weight if sensor is not None else 1)
        return self.features.read(s, tick) | item | dict(name=(s.name, k))


class Collate:
    """Raw observations -> model inputs, the same function in training and predict. Sensor rows are rounded to the dtype
    of the training's recordings: mostly fp16, half the bytes on the way to the GPU."""

    def __init__(self, cfg, stats):
        self.window, self.sensor_enabled = cfg.sensor_window_size, cfg.sensor_enabled
        self.action = Normalizer(stats["action"])
        self.finfo = np.finfo(stats["sensor"]["dtype"] if stats["sensor"] else "float32")

    def inputs(self, observations):
        """vl_features (B, N, V) float32 | age (B,) float32, seconds since their images | sensor (B, W, 1026) raw, zeros
        on the left where rows are missing | sensor_length (B,), 0 without sensor."""
        batch = dict(vl_features=torch.stack([torch.as_tensor(o["vl_features"]).float() for o in observations]))
        batch["age"] = torch.tensor([float(o.get("age", 0.0)) for o in observations])
        if self.sensor_enabled:
            sensor = np.zeros((len(observations), self.window, ss.CHANNELS), self.finfo.dtype)
            lengths = []
            for padded, o in zip(sensor, observations, strict=True):
                x = padded[:0] if o.get("sensor") is None else np.asarray(o["sensor"])[-self.window :]
                x = x if x.dtype == sensor.dtype else np.clip(x, self.finfo.min, self.finfo.max)
                padded[self.window - len(x) :] = x
                lengths.append(len(x))
            batch |= dict(sensor=torch.from_numpy(sensor), sensor_length=torch.tensor(lengths))
        return batch

    def __call__(self, items):
        """List of dataset items -> inputs() plus target (B, H, 7) in mm and degrees, actions, the same normalised,
        has_sensor (B,), names, and every other number or array of the items, stacked: action_mask (B, H), ..."""
        handled = ("sensor", "vl_features", "age", "images", "instruction", "name")
        rest = {key: np.stack([item[key] for item in items]) for key in items[0] if key not in handled}
        rest |= dict(target=rest["actions"], actions=self.action.normalize(rest["actions"]))
        rest["has_sensor"] = np.array([item["sensor"] is not None for item in items])
        rest = {key: torch.from_numpy(values) for key, values in rest.items()}
        return self.inputs(items) | rest | dict(names=[item["name"] for item in items])


# ---- policy ----------------------------------------------------------------------------------------------------------
class SessionPolicy:
    """What a policy on sessions does around its network; a script adds predict(observations) -> (B, H, 7) in mm and
    degrees, dataset_class and collate_class. `about`: Data.about, also from a checkpoint; `vlm`: where the VLM is."""

    several_roots = True  # open_episodes takes a list of folders

    def __init__(self, model, cfg, about, device, vlm=None):
        self.model, self.cfg, self.device, self.vlm, self.encoder = model, cfg, device, vlm, None
        self.stats, self.recipe, self.instructions = (about[key] for key in ("stats", "recipe", "instructions"))
        self.sensor_hz, self.vl_shape = about["sensor_hz"], about["vl_shape"]
        self.oldest_image_s = about["oldest_image_s"]
        self.bf16, self.collate = device.type == "cuda" and cfg.use_bfloat16, self.collate_class(cfg, self.stats)
        rows = f"(n, {ss.CHANNELS}) raw rows (force, A-scan) up to now, newest last, or None;"
        rows += f" the newest {cfg.sensor_window_size} at {self.sensor_hz:.0f} Hz are used"
        facts = dict(script=type(self).__module__, images=about["image_sizes"], actions=ACTIONS, horizon=cfg.horizon)
        facts |= dict(rate_hz=ss.ACTION_HZ, kind="delta", sensor=rows if cfg.sensor_enabled else None)
        facts["first_row"] = "the motion of the TCP in the 0.1 s that begin now: send row 0 at once, then predict again"
        facts |= dict(instructions=self.instructions, must_be_told=True, needs=dict(vlm=vlm or self.recipe["model"]))
        facts |= dict(action_low=self.stats["action"]["min"], action_high=self.stats["action"]["max"])
        self.contract = Contract(**facts)
        self.reset()

    def reset(self):
        """Forget the last episode, as if just loaded."""

    def describe(self):
        """What the policy takes and gives, as plain values; latency_ms is the action expert's on a cached feature: the
        VLM runs in parallel (TwoRateLoop)."""
        rows = np.zeros((self.cfg.sensor_window_size, ss.CHANNELS), np.float32)
        return self.contract.describe(self, dict(vl_features=torch.zeros(self.vl_shape), sensor=rows))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def freeze(self):
        """For inference only: cast once what autocast would cast to bf16 at every call."""
        layers = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.MultiheadAttention)
        for module in self.model.requires_grad_(False).eval().modules():
            if self.bf16 and isinstance(module, layers):
                for p in module.parameters(recurse=False):
                    p.data = p.data.bfloat16()
        return self

    def encode(self, pictures):
        """list of ({view: (h, w, 3) uint8 RGB}, instruction) -> (B, N, V) float32 features, rounded as in the cache.
        Loads the VLM at the first call."""
        self.contract.check([dict(images=images, instruction=instruction) for images, instruction in pictures])
        if self.encoder is None:
            self.encoder = vl_cache.VLEncoder.from_recipe(self.recipe, self.device, self.vlm)
        return self.encoder.encode(pictures)

    def inputs(self, observations):
        """list of {vl_features (N, V), or images {view: (h, w, 3) uint8 RGB} and instruction; age: seconds since these
        images were taken, default 0; sensor: (n, 1026) raw rows (force, A-scan) up to now, newest last, or None; rows
        with a value that is not finite are left out, as in training} -> Collate.inputs' batch on the device."""
        observations = [dict(o) for o in observations]
        for o in observations:
            rows = np.empty((0, ss.CHANNELS)) if o.get("sensor") is None else np.asarray(o["sensor"])
            wrong = f"the observation's sensor is {rows.shape}, expected (n, {ss.CHANNELS}): force, then the A-scan"
            require(rows.shape[1:] == (ss.CHANNELS,), wrong)
            require(math.isfinite(o.get("age", 0.0)), f"the observation's age is {o.get('age')}, expected seconds")
            o["sensor"] = rows[np.isfinite(rows).all(1)]
        unseen = [o for o in observations if "vl_features" not in o]
        if unseen or not observations:
            features = self.encode([(o.get("images"), o.get("instruction")) for o in unseen])
            for o, feature in zip(unseen, features, strict=True):
                o["vl_features"] = feature
        return to_device(self.collate.inputs(observations), self.device)

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per session, and per stretch of it without a gap, {name, sample: callable(t) ->
        observation, target (M, 7), hold (M, 7): the action of standing still, phase None}."""
        roots = [str(path) for path in (root if isinstance(root, (list, tuple)) else [root])]
        sessions = ss.find_sessions(roots)
        unknown, some = sorted(set(names or []) - {s.name for s in sessions}), ", ".join(s.name for s in sessions[:5])
        require(not unknown, f"'{', '.join(roots)}' has no session '{''.join(unknown[:1])}'; it has {some}, ...")
        chosen = [s for s in sessions if names is None or s.name in names]
        cfg = dataclasses.replace(self.cfg, dataset_dir=roots)
        expected = {k: v for k, v in self.recipe.items() if k not in ("model", "format_version")}
        features = Features(cfg, chosen, expected, optional=(FileNotFoundError, vl_cache.CacheMismatch))
        if features.missing:
            why = features.missing.splitlines()[0]
            print(f"features  computed now by {self.vlm or self.recipe['model']}, for in the cache {why}")
        dataset, action = self.dataset_class(chosen, features, cfg), self.stats["action"]
        still = np.where(action["constant"], action["mean"], 0.0).astype(np.float32)
        for e, s in enumerate(chosen):
            items = np.flatnonzero(dataset.owner == e)
            steps = dataset.steps[items]
            breaks = np.flatnonzero((np.diff(steps) != 1) | (np.diff(s.first[steps]) != 0)) + 1
            parts = [part for part in np.split(items, breaks) if len(part)]
            for n, part in enumerate(parts):
                name = s.name if len(parts) == 1 else f"{s.name}#{n + 1}"
                truth = dict(target=s.action[dataset.steps[part]], hold=np.tile(still, (len(part), 1)))
                yield truth | dict(name=name, sample=lambda t, p=part: dataset[(int(p[t]), int(p[t]))], phase=None)

    def nearest(self, chunks):
        """(n, H, 7) mm and degrees -> the closest chunks that the policy can output: the normaliser clips."""
        return self.collate.action.unnormalize(self.collate.action.normalize(chunks))

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return ACTIONS


# ---- validation ------------------------------------------------------------------------------------------------------

SWAPPED = dict(feature="policy", sensor="felt", force="felt", ascan="felt")  # input: the error to compare with


class HeldOut(Dataset):
    """Item i: sample i, and an item with the inputs of others: the feature of another session at the same phase, the
    sensor of a sample far away (one with sensor data for those that have some)."""

    def __init__(self, dataset):
        self.dataset, self.far = dataset, np.arange(len(dataset))
        lengths = np.array([len(s) for s in dataset.sessions])[dataset.owner]
        with_sensor = np.array([s.has_sensor for s in dataset.sessions], bool)[dataset.owner]
        for group in (np.flatnonzero(with_sensor), np.flatnonzero(~with_sensor)):
            self.far[group] = np.roll(group, len(group) // 2)
        same_phase = partners(dataset.owner, dataset.steps / lengths)  # None: a single session
        self.same_phase = self.far if same_phase is None else same_phase

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[(i, i)], self.dataset[(i, int(self.far[i]))] | self.dataset.look(self.same_phase[i])


def collate_pairs(collate, pairs):
    """HeldOut's items -> Collate's batch, plus the others' inputs as other_*."""
    items, others = zip(*pairs, strict=True)
    return collate(items) | {f"other_{key}": value for key, value in collate.inputs(others).items()}


def held_out_batches(dataset, policy, run):
    """Yield this rank's share of the held-out steps, each once: (collate_pairs' batch on the device, {input: the batch
    with this input taken from other samples})."""
    share, options = range(run.rank, len(dataset), run.world), dict(collate_fn=partial(collate_pairs, policy.collate))
    options |= dict(worker_init_fn=ignore_stop_signals, pin_memory=policy.device.type == "cuda", sampler=share)
    options |= dict(batch_size=policy.cfg.batch_size, num_workers=policy.cfg.num_workers)
    for batch in progress(DataLoader(HeldOut(dataset), **options), "validation", "batch"):
        batch = to_device(batch, policy.device)
        swapped = dict(feature=batch | dict(vl_features=batch["other_vl_features"]))
        if "sensor" in batch:
            own, other = batch["sensor"], batch["other_sensor"]
            swapped["sensor"] = batch | dict(sensor=other, sensor_length=batch["other_sensor_length"])
            swapped["force"] = batch | dict(sensor=torch.cat([other[..., :1], own[..., 1:]], -1))
            swapped["ascan"] = batch | dict(sensor=torch.cat([own[..., :1], other[..., 1:]], -1))
        yield batch, swapped


class ChunkErrors:
    """Sums over held-out steps: the loss, with weight 1 for every sample; the absolute error of predicted chunks, of
    two baselines (no motion; the last action again), and with inputs of other samples; the signed error (bias). Padded
    steps and dimensions that never move do not count."""

    def __init__(self, active):
        self.active, self.counts = active.cpu().numpy(), np.zeros(3)  # loss, samples, steps
        names = ("policy", "zero", "last", "bias", "felt", *SWAPPED)  # felt: the policy's where there is a sensor
        self.sums = {name: np.zeros(len(ACTIONS)) for name in names}

    def add(self, batch, sample_loss, predicted, swapped):
        """A batch of held_out_batches; predicted (B, H, 7), swapped {input: (B, H, 7)} in mm and degrees."""
        arrays = (batch[key].cpu().numpy() for key in ("target", "action_mask", "has_sensor", "previous"))
        target, real, has_sensor, previous = arrays
        zero = np.where(self.active, 0.0, target)
        guesses = dict(policy=predicted, zero=zero, last=previous[:, None], felt=predicted) | swapped
        for name, guess in guesses.items():
            where = real & has_sensor[:, None] if "felt" in (name, SWAPPED.get(name)) else real
            self.sums[name] += np.abs(guess - target)[where].sum(0)
        self.sums["bias"] += (predicted - target)[real].sum(0)
        self.counts += [float(sample_loss.sum()), len(target), real.sum()]

    def values(self, run):
        """Over all ranks -> {val/loss_epoch; val/mae_mm, val/mae_deg, the same of the baselines; val/mae_<dim>,
        val/bias_<dim>; val/swap_<input>: error with another sample's input / error with its own, in the dimension where
        this is largest: 1 means that the input is not used}. A collective call."""
        loss, samples, steps, *sums = run.sum(*self.counts, *np.concatenate(list(self.sums.values())))
        rows = dict(zip(self.sums, np.reshape(sums, (-1, len(ACTIONS))) / steps, strict=True))
        values = {"val/loss_epoch": loss / samples}
        for unit in ("mm", "deg"):
            dims = [d for d, (_, u) in enumerate(ACTIONS) if u == unit and self.active[d]]
            for name, end in (("policy", ""), ("zero", "_zero"), ("last", "_last")) if dims else ():
                values[f"val/mae_{unit}{end}"] = float(rows[name][dims].mean())
        for d in np.flatnonzero(self.active):
            name = ACTIONS[d][0]
            values |= {f"val/mae_{name}": float(rows["policy"][d]), f"val/bias_{name}": float(rows["bias"][d])}
        for name, own in SWAPPED.items():
            if rows[name].any():  # without a sensor there is nothing to swap
                values[f"val/swap_{name}"] = float((rows[name][self.active] / rows[own][self.active]).max())
        return values

    @staticmethod
    def text(values):
        parts = [f"loss {values['val/loss_epoch']:.4f}"]
        for unit in ("mm", "deg"):
            if f"val/mae_{unit}" in values:
                mae, zero, last = (values[f"val/mae_{unit}{who}"] for who in ("", "_zero", "_last"))
                parts.append(f"MAE {unit} {mae:.4g} (no motion {zero:.4g}, last action {last:.4g})")
        swaps = [f"{k.removeprefix('val/swap_')} x{v:.2f}" for k, v in values.items() if k.startswith("val/swap_")]
        text = " | ".join([*parts, "error with another sample's " + ", ".join(swaps)])
        if values.get("val/swap_feature", math.inf) < 1.05:
            text += "\nwarning   the policy does not look at its images: those of another session are as good"
        return text


def describe(cfg, data, dataset, held_out, weights, print0):
    """Print what was found: sessions, steps and shares per data set, features, sensor, actions, their ranges and what
    clipping to these removes. `weights`: of the samples of `dataset`."""
    usable = f"{len(dataset)} of {sum(map(len, data.train))} steps (the others have no fresh image)"
    held = f"{len(data.validation)} validation sessions, {len(held_out)} steps"
    print0(f"data      {len(data.train)} training sessions, {usable}; {held}; {', '.join(cfg.dataset_dir)}")
    for name in sorted({s.dataset for s in data.train}):
        mine, has_sensor = dataset.datasets == name, [s.has_sensor for s in data.train if s.dataset == name]
        share = f"{mine.sum():7d} steps, share {weights[mine].sum() / weights.sum():6.1%}"
        sensors = f"sensor in {sum(has_sensor)} of {len(has_sensor)} sessions"
        print0(f"          {name:<30} weight {weights[mine].mean():g}, {share}, {sensors}")
    rate, reuse, recipe, slowest = ss.ACTION_HZ, cfg.vlm_reuse_count, data.features.recipe, max(cfg.vlm_latency_ms)
    views = f"views {', '.join(recipe['views'])} at {recipe['height']}x{recipe['width']}, {data.features.root}"
    print0(f"features  {recipe['model']}, {views}; {reuse} steps share one: a VLM at {rate / reuse:.2f} Hz")
    if (enough := math.ceil(slowest * rate / 1000)) > reuse:
        advice = f"Use --vlm-reuse-count {enough}, fewer views, or smaller images"
        print0(f"warning   a VLM that takes {slowest:g} ms cannot look every {reuse} steps. {advice}")
    window, hz, text = cfg.sensor_window_size, data.about["sensor_hz"], "not used"
    if cfg.sensor_enabled:
        text = f"the newest {window} rows, {window / hz:.2f} s at {hz:.0f} Hz; loss weight {cfg.sensor_loss_weight:g}"
    print0(f"sensor    {text}")
    stats, action = data.about["stats"]["action"], np.concatenate([s.action for s in data.train])
    normalizer, size = Normalizer(stats), np.maximum(np.abs(action).sum(0), 1e-9)
    lost = np.abs(action - normalizer.unnormalize(normalizer.normalize(action)))
    table = {name: stats[name] for name in ("q01", "q99", "mean", "std")}
    table |= {"clipping removes at most": lost.max(0), "clipping removes, percent": 100 * lost.sum(0) / size}
    table = pd.DataFrame(table, [f"{name} {unit}" for name, unit in ACTIONS]).T
    print0(f"action    {cfg.horizon} steps of {1000 // rate} ms; per step:")
    print0(table.to_string(float_format="{:.4g}".format))
    print0(f"text      {len(data.about['instructions'])} instruction(s), e.g. {data.about['instructions'][0]!r}")


def check_data(cfg, policy, table, build_model):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; if there is no cache
    yet, it says so and leaves the features out. `policy`: a SessionPolicy class."""
    data = load_data(cfg, optional=FileNotFoundError)
    dataset, held_out = (policy.dataset_class(part, data.features, cfg) for part in (data.train, data.validation))
    weights = dataset.sample_weights(table, cfg.dataset_weight)
    describe(cfg, data, dataset, held_out, weights, print)
    order, missing = GlobalOrder(len(dataset), cfg.seed, weights), data.features.missing
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    print(f"samples   {len(dataset)}; batch of {len(items)}, first: {' step '.join(map(str, items[0]['name']))}")
    if missing:
        print(f"note      the features are not there yet: {missing}")
        items = [item | dict(images=0, vl_features=torch.zeros(0)) for item in items]
    collate = policy.collate_class(cfg, data.about["stats"])
    for key, value in collate(items).items():
        if isinstance(value, torch.Tensor) and value.numel():
            dtype, low, high = str(value.dtype).removeprefix("torch."), value.min().item(), value.max().item()
            print(f"          {key:<14} {str(tuple(value.shape)):<18} {dtype:<8} {low:.4g} .. {high:.4g}")
    if not missing:
        plan.check(cfg, dataset, collate, lambda c, _: build_model(c, data.about, "cpu"))
    print("check passed")
