"""Robot sessions as training samples: what train_async.py and train_diffusion.py agree on around their networks.

One sample is one 100 ms step k: the VL feature of the newest tick, the newest sensor rows -> the next H actions.
Letters in shapes: B batch, N VL tokens of a tick (1), V their width, W sensor rows (the window), H actions (the chunk).
"""

import contextlib
import dataclasses
import hashlib
import json
import math

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common import plan, require, vl_cache
from common import sessions as ss
from common.policy import Contract, partners
from common.program import ignore_stop_signals
from common.run import to_device
from common.sampler import GlobalOrder, generator_at
from common.stats import Normalizer

ACTIONS = [("dx", "mm"), ("dy", "mm"), ("dz", "mm"), ("da", "deg"), ("db", "deg"), ("dr", "deg"), ("gripper", "")]


@dataclasses.dataclass
class Data:
    """Sessions of a run, split and described."""

    train: list  # common.sessions.Session, sorted by name
    validation: list
    features: object  # Features
    about: (
        dict  # what a checkpoint tells about them: stats, recipe, vl_shape, sensor_hz, image_sizes, instructions, ...
    )


class Features:
    """The cached VL features of the sessions, read without opening an image.

    `expected`: keys of the features' recipe that must be so; None: those of the config. `optional`: errors of the cache
    after which images are read instead, for a VLM that runs now; `missing` then says why. `pictures`: see
    vl_cache.read_features."""

    def __init__(self, cfg, part, expected=None, optional=(), pictures=True):
        self.cfg, self.files, self.missing, self.shape = cfg, None, None, None
        self.stride, self.ticks, self.root = cfg.vlm_reuse_count, {}, cfg.cache_root or f"{cfg.dataset_dir[0]}/cache"
        size = dict(height=cfg.image_resize_height, width=cfg.image_resize_width)
        expected = expected or dict(model=cfg.model, views=cfg.views or None, **size)
        try:
            how = (cfg.vlm_reuse_count, cfg.max_image_age, pictures and cfg.check_pictures)
            self.files, self.recipe = vl_cache.read_features(self.root, part, expected, *how)
            first = next(iter(self.files.values()))
            self.stride, self.shape = first.meta["stride"], first.shape[1:]
        except optional as error:
            common, lacking = ss.common_views(part)
            self.missing, self.recipe = str(error), expected | dict(views=expected["views"] or common)
            some = "choose some with --views, or leave sessions out"
            require(self.recipe["views"], f"no view is in all of the {len(part)} sessions: {some}; missing: {lacking}")

    def usable(self, session):
        """-> (m,) steps whose tick has a fresh image of every view, (m,) their tick, the newest there can be."""
        c, views = self.cfg, self.recipe["views"]
        self.ticks[session.name] = session.ticks(self.stride, views, c.max_image_age)
        latency = min(c.vlm_latency_ms) / 1000
        return session.usable_steps(self.stride, c.vlm_reuse_count, views, c.max_image_age, latency)

    def read(self, session, tick):
        """-> dict(vl_features (N, V) float32), or dict(images {view: (h, w, 3) uint8}, instruction)."""
        if self.files:
            return dict(vl_features=self.files[session.name].features[tick].float())
        index = self.ticks[session.name].frame_index
        images = vl_cache.in_threads(vl_cache.read_image, [session.frame_path(v, i[tick]) for v, i in index.items()])
        return dict(images=dict(zip(index, images, strict=True)), instruction=session.instruction)


def load_data(cfg, run=None, saved=None, optional=()):
    """-> Data. `saved`: a checkpoint to go on from, whose statistics are kept; `optional`: see Features."""
    found = ss.find_sessions(cfg.dataset_dir)
    for s in found:
        rate, again = s.metadata["action_hz"], f"python create_datapkl.py --dataset-dirs {s.path} --force"
        require(rate == ss.ACTION_HZ, f"{s.name} has actions at {rate:g} Hz, expected {ss.ACTION_HZ}: {again}")
    train, validation = ss.split_sessions(found, cfg.val_split)
    features = Features(cfg, found, optional=optional, pictures=run is None or run.main)
    none = f"no step of the {len(train)} training sessions has an image of {', '.join(features.recipe['views'])}"
    how = f"at most {cfg.max_image_age:g} s old: choose other --views, or raise --max-image-age"
    require(any(len(features.usable(s)[0]) for s in train), f"{none} that is {how}")
    facts = []
    for s in train:
        stamps = s.sensor_stamps.tobytes() if s.has_sensor else b""
        content = hashlib.sha256(s.action.tobytes() + s.starts.tobytes() + stamps).hexdigest()
        facts.append([s.name, content, features.files[s.name].path.stem[-24:] if features.files else None])
    if saved:
        differs = "; ".join(vl_cache.different(saved["recipe"], features.recipe))
        require(not differs, f"the checkpoint was trained on other features than those of {features.root}: {differs}")
        stats = saved["stats"]
    else:
        stats = run.once(all_stats, train, features, cfg) if run else all_stats(train, features, cfg)
    require(not all(stats["action"]["constant"]), "no action dimension moves in the training sessions")
    about = dict(stats=stats, recipe=features.recipe, vl_shape=list(features.shape or ()))
    rates = [s.sensor_hz for s in train if s.has_sensor] or [ss.SENSOR_HZ]
    about |= dict(sensor_hz=float(np.median(rates)), instructions=sorted({s.instruction for s in train}))
    sizes = {view: {s.image_size(view) for s in train} for view in features.recipe["views"]}
    about["image_sizes"] = {view: list(*found) if len(found) == 1 else None for view, found in sizes.items()}
    about["fingerprint"] = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    first = run.once(str, about["fingerprint"]) if run else about["fingerprint"]  # which compared the pictures
    others = "the processes see other sessions or features: start again when they are all built"
    require(about["fingerprint"] == first, others)
    return Data(train, validation, features, about)


def all_stats(train, features, cfg, samples=512):
    """sessions.session_stats, and with a cache mean and std (V numbers) of the features of `samples` steps."""
    stats, dataset = ss.session_stats(train), SessionDataset(train, features, cfg)
    if features.files:
        chosen = np.unique(np.linspace(0, len(dataset) - 1, samples).astype(int))
        ticks = [(train[dataset.owner[i]], dataset.ticks[i]) for i in chosen]
        x = torch.cat([features.read(*tick)["vl_features"] for tick in ticks]).double()  # (n, V)
        mean, std = x.mean(0), x.std(0, correction=0)
        std = std.clamp(min=1e-3 * (1 + mean.abs()))  # not below the rounding of fp16
        stats["vl"] = dict(mean=mean.tolist(), std=std.tolist())
    return stats


class SessionDataset(Dataset):
    """One item per usable step k of the sessions (its VLM tick has a fresh image of every view). Item (position, i):

    vl_features (N, V) float32, or without a cache images {view: (h, w, 3) uint8} and instruction |
    sensor (n <= W, 1026) raw rows as on the disk, newest last, or None | previous (7,) the action before, or zeros |
    actions (H, 7) float32 in mm and degrees, action_mask (H,) bool: False past the end of the segment |
    weight float32, in the loss | reuse_step, steps since the feature's tick: 0..R-1 without latency |
    age float, seconds since the feature's images were taken | name"""

    def __init__(self, part, features, cfg):
        self.sessions, self.features, self.cfg = list(part), features, cfg
        usable = [features.usable(s) for s in self.sessions]
        self.owner = np.repeat(np.arange(len(usable)), [len(steps) for steps, _ in usable])  # each item's session
        self.steps, self.ticks = np.concatenate([np.zeros((2, 0), int), *map(np.stack, usable)], axis=1)
        self.datasets = np.array([s.dataset for s in self.sessions])[self.owner]

    def __len__(self):
        return len(self.steps)

    def sample_weights(self, table, changes=()):
        """{data set: weight} (others 1), changes ["NAME=W"] -> (n,) weight of each sample."""
        weights = {s.dataset: table.get(s.dataset, 1.0) for s in self.sessions}
        wanted = f"expected NAME=W: one of {', '.join(sorted(weights))}, and a weight above 0"
        for name, _, value in (text.rpartition("=") for text in changes):
            number = float(value) if value.replace(".", "", 1).isdecimal() else 0.0
            require(name in weights and 0 < number < math.inf, f"dataset_weight '{name}={value}': {wanted}")
            weights[name] = number
        return np.array([weights[name] for name in self.datasets], np.float64)

    def look(self, i):
        """The feature of item i alone."""
        return self.features.read(self.sessions[self.owner[i]], self.ticks[i])

    def __getitem__(self, key):
        position, i = key  # where vlm_latency_ms is a range, the position draws the age of the feature
        s, k, tick, cfg = self.sessions[self.owner[i]], int(self.steps[i]), int(self.ticks[i]), self.cfg
        ticks, (low, high) = self.features.ticks[s.name], (min(cfg.vlm_latency_ms), max(cfg.vlm_latency_ms))
        if high > low:
            latency = generator_at(cfg.seed, position, "latency").uniform(low, high) / 1000
            older = int(s.tick_of_step(k, self.features.stride, cfg.vlm_reuse_count, latency))
            tick = older if ticks.complete[older] else tick
        actions, mask = s.targets(k, cfg.horizon)
        first = k == 0 or s.segment[k - 1] != s.segment[k]
        sensor = s.sensor_window(k, cfg.sensor_window_size) if cfg.sensor_enabled else None
        item = dict(sensor=sensor, actions=actions, action_mask=mask, reuse_step=k - int(ticks.start[tick]))
        item["age"] = s.starts[k] - ticks.captured[tick]
        item["previous"] = np.zeros_like(s.action[0]) if first else s.action[k - 1]
        item["weight"] = np.float32(cfg.sensor_loss_weight if sensor is not None else 1)
        return self.features.read(s, tick) | item | dict(name=(s.name, k))


class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict. Sensor rows are rounded to
    what the training's recordings hold: mostly fp16, half the bytes on the way to the GPU."""

    def __init__(self, cfg, stats):
        self.window, self.sensor_enabled = cfg.sensor_window_size, cfg.sensor_enabled
        self.action = Normalizer(stats["action"])
        self.dtype = np.finfo(stats["sensor"]["dtype"] if stats["sensor"] else "float32")

    def inputs(self, observations):
        """vl_features (B, N, V) float32 | age (B,) float32, seconds since their images | sensor (B, W, 1026) raw, zeros
        on the left where rows are missing | sensor_length (B,), 0 without sensor."""
        batch = dict(vl_features=torch.stack([torch.as_tensor(o["vl_features"]).float() for o in observations]))
        batch["age"] = torch.tensor([float(o.get("age", 0.0)) for o in observations])
        if self.sensor_enabled:
            sensor = np.zeros((len(observations), self.window, ss.CHANNELS), self.dtype.dtype)
            lengths = []
            for padded, o in zip(sensor, observations, strict=True):
                x = padded[:0] if o.get("sensor") is None else np.asarray(o["sensor"])[-self.window :]
                x = x if x.dtype == sensor.dtype else np.clip(x, self.dtype.min, self.dtype.max)
                padded[self.window - len(x) :] = x
                lengths.append(len(x))
            batch |= dict(sensor=torch.from_numpy(sensor), sensor_length=torch.tensor(lengths))
        return batch

    def __call__(self, items):
        """List of dataset items -> inputs() plus actions (B, H, 7) normalised, has_sensor (B,), names, and every other
        number or array of the items, stacked: action_mask (B, H), weight, reuse_step (B,), ..."""
        ours = ("sensor", "vl_features", "age", "images", "instruction", "actions", "previous", "name")
        rest = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in items[0] if key not in ours}
        rest["actions"] = torch.from_numpy(self.action.normalize(np.stack([item["actions"] for item in items])))
        rest["has_sensor"] = torch.tensor([item["sensor"] is not None for item in items])
        return self.inputs(items) | rest | dict(names=[item["name"] for item in items])


# ---- policy ----------------------------------------------------------------------------------------------------------


class SessionPolicy:
    """What a policy on sessions does around its network; a script adds predict(observations) -> (B, H, 7) in mm and
    degrees. `about`: Data.about, also out of a checkpoint; `vlm`: where the VLM is now, if not where it was."""

    several_roots = True  # for open_episodes

    def __init__(self, model, cfg, about, device, vlm=None):
        self.model, self.cfg, self.device, self.vlm, self.encoder = model, cfg, device, vlm, None
        self.stats, self.recipe, self.instructions = (about[key] for key in ("stats", "recipe", "instructions"))
        self.sensor_hz, self.vl_shape = about["sensor_hz"], about["vl_shape"]
        self.bf16, self.collate = device.type == "cuda" and cfg.use_bfloat16, Collate(cfg, self.stats)
        rows = f"(n, {ss.CHANNELS}) raw rows (force, A-scan) up to now, newest last, or None;"
        rows += f" the newest {cfg.sensor_window_size} at {self.sensor_hz:.0f} Hz are used"
        self.contract = Contract(
            script=type(self).__module__,
            images=about["image_sizes"],
            actions=ACTIONS,
            horizon=cfg.horizon,
            rate_hz=ss.ACTION_HZ,
            kind="delta",
            first_row="the motion of the TCP in the 0.1 s that begin now: send row 0 at once, then predict again",
            sensor=rows if cfg.sensor_enabled else None,
            instructions=self.instructions,
            action_low=self.stats["action"]["min"],
            action_high=self.stats["action"]["max"],
            must_be_told=True,
            needs=dict(vlm=vlm or self.recipe["model"]),
        )
        self.reset()

    def reset(self):
        """Begin anew, as if just loaded."""

    def describe(self):
        """What the policy takes and gives, as plain values; latency_ms is that of the expert on a cached feature, the
        VLM looks beside it (TwoRateLoop)."""
        felt = np.zeros((self.cfg.sensor_window_size, ss.CHANNELS), np.float32)
        return self.contract.describe(self, dict(vl_features=torch.zeros(self.vl_shape), sensor=felt))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def freeze(self):
        """For inference only: what autocast would cast to bf16 at every call is cast once."""
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
        images were taken, 0 if it is not said; sensor: (n, 1026) raw rows (force, A-scan) up to now, newest last, or
        None} -> Collate.inputs' batch on the device."""
        observations = list(observations)
        for o in observations:
            shape, right = np.shape(o.get("sensor")), f"expected (n, {ss.CHANNELS}): force, then the A-scan"
            good = o.get("sensor") is None or (len(shape) == 2 and shape[1] == ss.CHANNELS)
            require(good, f"the observation's sensor is {shape}, {right}")
        seen = [b for b, o in enumerate(observations) if "vl_features" not in o]
        if seen or not observations:
            encoded = self.encode([(observations[b].get("images"), observations[b].get("instruction")) for b in seen])
            for b, feature in zip(seen, encoded, strict=True):
                observations[b] = observations[b] | dict(vl_features=feature)
        return to_device(self.collate.inputs(observations), self.device)

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per session, and per stretch of it without a gap, {name, sample: callable(t) ->
        observation, target (M, 7), hold (M, 7): the action that stands still, phase None}."""
        roots = [str(path) for path in (root if isinstance(root, (list, tuple)) else [root])]
        found = ss.find_sessions(roots)
        unknown, some = sorted(set(names or []) - {s.name for s in found}), ", ".join(s.name for s in found[:5])
        require(not unknown, f"'{', '.join(roots)}' has no session '{''.join(unknown[:1])}'; it has {some}, ...")
        chosen = [s for s in found if names is None or s.name in names]
        cfg = dataclasses.replace(self.cfg, dataset_dir=roots)
        expected = {k: v for k, v in self.recipe.items() if k not in ("model", "format_version")}
        features = Features(cfg, chosen, expected, optional=(FileNotFoundError, vl_cache.CacheMismatch))
        if features.missing:
            why = features.missing.splitlines()[0]
            print(f"features  computed now by {self.vlm or self.recipe['model']}, for in the cache {why}")
        dataset, action = SessionDataset(chosen, features, cfg), self.stats["action"]
        still = np.where(action["constant"], action["mean"], 0.0).astype(np.float32)
        for e, s in enumerate(chosen):
            items = np.flatnonzero(dataset.owner == e)
            steps = dataset.steps[items]
            breaks = np.flatnonzero((np.diff(steps) != 1) | (np.diff(s.segment[steps]) != 0)) + 1
            parts = [part for part in np.split(items, breaks) if len(part)]
            for n, part in enumerate(parts):
                name = s.name if len(parts) == 1 else f"{s.name}#{n + 1}"
                truth = dict(target=s.action[dataset.steps[part]], hold=np.repeat(still[None], len(part), 0))
                yield truth | dict(name=name, sample=lambda t, p=part: dataset[(int(p[t]), int(p[t]))], phase=None)

    def nearest(self, chunks):
        """(n, H, 7) mm and degrees -> the closest that can be answered: the normaliser clips."""
        return self.collate.action.unnormalize(self.collate.action.normalize(chunks))

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return ACTIONS


# ---- validation ------------------------------------------------------------------------------------------------------


class HeldOut(Dataset):
    """Batches of held-out steps, as Collate makes them, with target (B, H, 7), previous (B, 7) and felt (B,) as they
    are, and other_*: the inputs of other samples, the feature of another session's at the same phase, the sensor of one
    far away (one with sensor data for those that have some)."""

    def __init__(self, dataset, collate, batches):
        self.dataset, self.collate, self.batches, self.far = dataset, collate, batches, np.arange(len(dataset))
        lengths = np.array([len(s) for s in dataset.sessions])[dataset.owner]
        felt = np.array([s.has_sensor for s in dataset.sessions], bool)[dataset.owner]
        for group in (np.flatnonzero(felt), np.flatnonzero(~felt)):
            self.far[group] = np.roll(group, len(group) // 2)
        there = partners(dataset.owner, dataset.steps / lengths)  # None: a single session
        self.phase = self.far if there is None else there

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, b):
        data, items, others = self.dataset, [], []
        for k in self.batches[b].tolist():
            items.append(data[(k, k)])
            others.append(data[(k, int(self.far[k]))] | data.look(self.phase[k]))
        batch = self.collate(items) | {f"other_{k}": v for k, v in self.collate.inputs(others).items()}
        for key, name in (("target", "actions"), ("previous", "previous")):
            batch[key] = np.stack([item[name] for item in items])
        return batch | dict(felt=np.array([item["sensor"] is not None for item in items]))


def held_out_batches(dataset, policy, run):
    """This rank's share of the held-out steps, each once -> (HeldOut's batch on the device, {input: the batch with this
    input of other samples})."""
    mine, size, cuda = np.arange(run.rank, len(dataset), run.world), policy.cfg.batch_size, policy.device.type == "cuda"
    batches = [mine[i : i + size] for i in range(0, len(mine), size)]
    how = dict(num_workers=policy.cfg.num_workers, worker_init_fn=ignore_stop_signals, pin_memory=cuda)
    for batch in DataLoader(HeldOut(dataset, policy.collate, batches), batch_size=None, collate_fn=dict, **how):
        batch = to_device(batch, policy.device)
        swapped = dict(feature=batch | dict(vl_features=batch["other_vl_features"]))
        if "sensor" in batch:
            here, there = batch["sensor"], batch["other_sensor"]
            swapped["sensor"] = batch | dict(sensor=there, sensor_length=batch["other_sensor_length"])
            swapped["force"] = batch | dict(sensor=torch.cat([there[..., :1], here[..., 1:]], -1))
            swapped["ascan"] = batch | dict(sensor=torch.cat([here[..., :1], there[..., 1:]], -1))
        yield batch, swapped


class ChunkErrors:
    """Sums over held-out steps: the loss, every sample weighing 1; the absolute error of predicted chunks, of two
    baselines (no motion; the last action again), and with inputs of other samples; its signed mean, the bias. Padded
    steps and dimensions that never move do not count."""

    def __init__(self, active):
        self.active, self.counts = active.cpu().numpy(), np.zeros(3)  # loss, samples, steps
        names = ("policy", "zero", "last", "bias", "felt", "feature", "sensor", "force", "ascan")
        self.sums = {name: np.zeros(len(ACTIONS)) for name in names}  # felt: the policy's where there is a sensor

    def add(self, batch, sample_loss, predicted, swapped):
        """A batch of HeldOut, predicted (B, H, 7), swapped {input: (B, H, 7)}"""
        target, real, last = batch["target"], batch["action_mask"].cpu().numpy(), batch["previous"][:, None]
        felt = real & batch["felt"][:, None]
        guesses = dict(policy=predicted, zero=np.where(self.active, 0.0, target), last=last, felt=predicted) | swapped
        for name, guess in guesses.items():
            where = felt if name in ("felt", "sensor", "force", "ascan") else real
            self.sums[name] += np.abs(guess - target)[where].sum(0)
        self.sums["bias"] += (predicted - target)[real].sum(0)
        self.counts += [float(sample_loss.sum()), len(target), real.sum()]

    def values(self, run):
        """Over all ranks -> {val/loss_epoch; val/mae_mm, val/mae_deg, the same of the baselines; val/mae_<dim>,
        val/bias_<dim>; val/swap_<input>: error with this input of another sample / error with its own, in the dimension
        where that is largest: 1 says that it is not used}."""
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
        for name, own in (("feature", "policy"), ("sensor", "felt"), ("force", "felt"), ("ascan", "felt")):
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
            text += "\nwarning   the policy does not look at its pictures: those of another session are as good"
        return text


def describe(cfg, data, dataset, held_out, weights, print0):
    """Say what was found: sessions, steps and shares per data set, features, sensor, actions, ranges and what clipping
    to them removes. `weights`: of the samples of `dataset`."""
    held, where = f"{len(data.validation)} validation sessions, {len(held_out)} steps", ", ".join(cfg.dataset_dir)
    usable = f"{len(dataset)} of {sum(map(len, data.train))} steps (the others have no fresh image)"
    print0(f"data      {len(data.train)} training sessions, {usable}; {held}; {where}")
    for name in sorted({s.dataset for s in data.train}):
        mine, felt = dataset.datasets == name, [s.has_sensor for s in data.train if s.dataset == name]
        share = f"{mine.sum():7d} steps, share {weights[mine].sum() / weights.sum():6.1%}"
        sensor = f"sensor in {sum(felt)} of {len(felt)} sessions"
        print0(f"          {name:<30} weight {weights[mine].mean():g}, {share}, {sensor}")
    rate, reuse, recipe = ss.ACTION_HZ, cfg.vlm_reuse_count, data.features.recipe
    views = f"views {', '.join(recipe['views'])} at {recipe['height']}x{recipe['width']}"
    hz = f"{reuse} steps share one: a VLM at {rate / reuse:.2f} Hz"
    print0(f"features  {recipe['model']}, {views}, every {data.features.stride} steps, {data.features.root}; {hz}")
    if (enough := math.ceil(max(cfg.vlm_latency_ms) * rate / 1000)) > reuse:
        slow = f"a VLM that takes {max(cfg.vlm_latency_ms):g} ms cannot look every {reuse} steps"
        print0(f"warning   {slow}. Use --vlm-reuse-count {enough}, fewer views, or smaller images")
    window, hz = cfg.sensor_window_size, data.about["sensor_hz"]
    rows = f"the newest {window} rows, {window / hz:.2f} s at {hz:.0f} Hz; loss weight {cfg.sensor_loss_weight:g}"
    print0(f"sensor    {f'{rows} with sensor, 1 without' if cfg.sensor_enabled else 'not used'}")
    stats, action = data.about["stats"]["action"], np.concatenate([s.action for s in data.train])
    normalizer, size = Normalizer(stats), np.maximum(np.abs(action).sum(0), 1e-9)
    lost = np.abs(action - normalizer.unnormalize(normalizer.normalize(action)))
    table = {name: stats[name] for name in ("q01", "q99", "mean", "std")}
    table |= {"clipping removes at most": lost.max(0), "clipping removes, percent": 100 * lost.sum(0) / size}
    names = "".join(f"{f'{n} {u}':>11}" for n, u in ACTIONS)
    print0(f"action    {f'{cfg.horizon} steps of {1000 // rate} ms; per step:':<30}{names}")
    for name, values in table.items():
        print0(f"          {name:<30}" + "".join(f"{v:11.4g}" for v in values))
    texts = data.about["instructions"]
    print0(f"text      {len(texts)} instruction(s), e.g. {texts[0]!r}")


def check_data(cfg, dataset_class, table, build_model):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a cache the
    features stay unread, and it says so."""
    data = load_data(cfg, optional=FileNotFoundError)
    dataset, held_out = (dataset_class(part, data.features, cfg) for part in (data.train, data.validation))
    weights = dataset.sample_weights(table, cfg.dataset_weight)
    describe(cfg, data, dataset, held_out, weights, print)
    order = GlobalOrder(len(dataset), cfg.seed, weights)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    print(f"samples   {len(dataset)}; batch of {len(items)}, first: {' step '.join(map(str, items[0]['name']))}")
    if data.features.missing:
        print(f"note      the features are not there yet: {data.features.missing}")
        items = [item | dict(images=0, vl_features=torch.zeros(0)) for item in items]
    collate = Collate(cfg, data.about["stats"])
    for key, value in collate(items).items():
        if isinstance(value, torch.Tensor) and value.numel():
            dtype, low, high = str(value.dtype).removeprefix("torch."), value.min().item(), value.max().item()
            print(f"          {key:<14} {str(tuple(value.shape)):<18} {dtype:<8} {low:.4g} .. {high:.4g}")
    if not data.features.missing:
        plan.check(cfg, dataset, collate, lambda c, _: build_model(c, data.about, "cpu"))
    print("check passed")
