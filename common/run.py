"""What every training loop shares: ranks, device, precision, resume, loader, optimizer step, logging, saving, stopping.

The loop itself stays in the script: the loss and its divisor, the learning rate, when to log, validate and save.

    run = Run(cfg, out, cfg.batch_size, cfg.accumulation)
    run.checkpoints(out, "steps_{step}", write, size, collect)  # the final step is always saved, also after a signal
    for step in run.steps(loader):  # one optimizer step, the same on every rank
        count = run.sum(sum(len(b["targets"]) for b in step.batches))  # of all micro-batches and ranks
        for batch in step.micro_batches(model):  # on the device; dropout is seeded by the position in the sample order
            out = model(batch)
            step.backward(out["loss_sum"] / count, out["sample_loss"])
        step.update(optimizer, lr_at(step.index, cfg), cfg.grad_clip)
        if step.every(cfg.log_steps):
            step.log(dict(loss=step.mean()["loss"]), f"loss {step.mean()['loss']:.4f}")
        if step.every(cfg.save_steps):
            run.save()
    run.finish()

A batch is a dict whose "names" hold one (..., episode, frame) per sample."""

import contextlib
import dataclasses
import datetime
import inspect
import math
import os
import signal
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common import UserError, fsdp, program, require
from common import checkpoint as ckpt
from common.log import RunLog, memory_gb, plot_loss
from common.program import StopSignal, ignore_stop_signals, launch  # noqa: F401  scripts take launch from here
from common.sampler import RankBatches, torch_seed_at

PROGRESS = ("step", "position", "best_val_loss", "best_step", "skipped", "skipped_in_row", "window")
GLOO_TIMEOUT = datetime.timedelta(hours=2)  # the others wait while one rank saves 50 GB or merges a model
MAX_NON_FINITE = 10  # skipped steps in a row that end a training


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


class Run:
    """rank, world, main (is this rank 0?), device, bf16 | global_batch: samples per optimizer step | step: updates
    made, position: samples consumed, total: updates to make | best_val_loss, best_step. `cfg` needs a seed."""

    def __init__(self, cfg, out, batch_size, accumulation=1, bf16=False):
        values, defaults = (ckpt.flat(dataclasses.asdict(c)) for c in (cfg, type(cfg)()))
        numbers = {k: v for k, v in values.items() if type(v) in (int, float)}  # a negative clip would climb
        negative = [f"{k} is {v}" for k, v in numbers.items() if not v >= 0 and str(defaults.get(k))[0] != "-"]
        require(not negative, f"{', '.join(negative)}: expected 0 or more")
        too_large = [f"{k} is {v}" for k, v in numbers.items() if k.endswith("dropout") and v >= 1]
        require(not too_large, f"{', '.join(too_large)}: expected a share below 1")
        cuda = torch.cuda.is_available()
        ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
        stale = sorted({"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys())
        foreign = f"{', '.join(stale)} of another program are in the environment: unset them, or start with torchrun"
        require(not stale or "MASTER_ADDR" in os.environ, foreign)
        for key in [key for key in os.environ if key.startswith("ACCELERATE_")]:
            del os.environ[key]  # would override the config: FSDP, compilation, a divisor of the loss
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:  # accelerate would keep the precision of an earlier Run
            AcceleratorState._reset_state(reset_partial_state=True)
        precision = "bf16" if bf16 else "no"
        self.accelerator = a = Accelerator(mixed_precision=precision, cpu=not cuda, kwargs_handlers=[ddp])
        self.rank, self.world, self.main, self.device = a.process_index, a.num_processes, a.is_main_process, a.device
        self.print, self.autocast, self.bf16 = a.print, a.autocast, bf16  # print: once per machine
        # counts, flags and barriers go over gloo on the CPU: NCCL would give up after 10 minutes
        self.group = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT) if self.world > 1 else None
        self.cfg, self.script, self.out = cfg, Path(inspect.getfile(type(cfg))), Path(out)
        self.batch_size, self.accumulation = batch_size, accumulation
        self.global_batch = batch_size * accumulation * self.world
        self.step, self.position, self.total = 0, 0, None
        self.best_val_loss, self.best_step, self.skipped, self.skipped_in_row = None, None, 0, 0
        self.window, self.logged = [], 0  # metrics of every update since the last log line; the step of that line
        self.time, self.wait, self.stall = 0.0, 0.0, 0.0  # seconds since then: in all, for data, for saving
        self.log, self.error = None, None  # error: raised by the data, kept until the weights are saved
        self.consistent = True  # False while the optimizer is changing the weights
        self.saved, self.saved_step, self._saving, self._keep = None, 0, None, 0
        self._thread, self._writing, self._record = ThreadPoolExecutor(1), None, {}
        self.sharded, self._writers = False, None
        program.run = self

    # ---- ranks

    def sum(self, *numbers):
        """Numbers -> their sums over all ranks, float64."""
        total = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(total, group=self.group)
        return total.tolist() if len(numbers) > 1 else total.item()

    def gather(self, value):
        """A plain value -> list of every rank's, in the order of the ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def once(self, function, *args):
        """Call it on rank 0 only; every rank gets its result, or its error. A collective call."""
        result, error = None, None
        if self.main:
            try:
                result = function(*args)
            except Exception as raised:  # else the others would wait for a rank that is gone
                error = raised
        result = [(result, error and str(error))]
        if self.world > 1:
            dist.broadcast_object_list(result, group=self.group)
        if result[0][1] is not None:
            raise error or UserError(result[0][1])
        return result[0][0]

    def prepare(self, model, shards=()):
        """-> the model as the loop calls it: autocast in its forward, gradients averaged over the ranks by DDP; with
        its layers in `shards` split over them by FSDP2 instead. Make the optimizer afterwards."""
        if shards:
            self.sharded = True
            self._writers = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT)  # the threads' own, beside the loop's
            return fsdp.shard_layers(model, shards, self.bf16, self.autocast())
        if self.world > 1:
            self._share_frozen(model)
        with warnings.catch_warnings():  # torch 2.13 renamed broadcast_buffers, accelerate has not
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            return self.accelerator.prepare_model(model, device_placement=False)

    def _share_frozen(self, model):
        """Keep DDP from broadcasting gigabytes of frozen weights, which every rank has read from the same files."""
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(frozen))
        total = sum(p.detach().sum(dtype=torch.float64).item() for p in frozen.values())
        totals = self.gather(total)
        same = max(totals) - min(totals) <= 1e-9 * max(map(abs, totals))  # other kinds of GPU add up in another order
        require(same, "the processes have read other frozen weights: every machine needs the same backbone files")

    # ---- resume

    def find(self, resume, folder, patterns, exports=()):
        """--resume (a path, "auto", or nothing) -> the checkpoint in `folder` to go on from, or None for a new run.
        `patterns`: names of what can be resumed; `exports`: of weights alone, which cannot, but belong to the run."""
        if self.main:
            self._lock = ckpt.claim(self.out)
            ckpt.remove_temporaries(folder)
        self.sum(0)  # a barrier: the others look after rank 0 has cleaned up
        path = ckpt.find_checkpoint(resume, folder, patterns, exports)
        if resume == "auto" and not path:
            self.print(f"resume    auto: no checkpoint in {folder}, starting a new run")
        self.folder, self.all_names = Path(folder), (*patterns, *exports)
        same = len(set(self.gather(path and str(path)))) == 1  # all ranks have looked before rank 0 writes
        require(same, f"not every process sees the checkpoints in {folder}: all machines must share that disk")
        return path

    def progress(self):
        """What a checkpoint must hold beside tensors so that a run can go on from it; plain values."""
        state = vars(self) | self._record  # as it will be once the checkpoint that holds it is on disk
        return {key: state[key] for key in PROGRESS} | dict(config=dataclasses.asdict(self.cfg))

    def restore(self, path, saved, fingerprint, fixed=()):
        """Go on from the checkpoint `path` with the content `saved` (progress() and the data's fingerprint); UserError
        if data or the config's `fixed` keys changed. Later checkpoints are set aside: a run is one timeline."""
        changed = ckpt.check_same_run(path, saved, fingerprint, dataclasses.asdict(self.cfg), fixed)
        vars(self).update({key: saved[key] for key in PROGRESS}, saved=path, saved_step=saved["step"])
        self.print("; ".join([f"resume    {path}, step {self.step}", *changed]))
        moved = self.once(ckpt.set_aside, self.folder, self.all_names, self.step)
        if moved:
            self.print(f"set aside {', '.join(p.name for p in moved)}, of later steps: now in {moved[0].parent}")
        elsewhere = Path(path).resolve().parent != self.folder.resolve()
        if elsewhere or any("best" in p.name for p in moved):  # this folder has no best checkpoint now: the next is it
            self.best_val_loss, self.best_step = None, None

    def plan(self, total, flag):
        """Train up to `total` updates; -> False if they are already made. `flag`: what to raise to train on."""
        self.total = total
        if self.step >= total:
            self.print(f"nothing to do: the checkpoint is of step {self.step} of {total}. Raise {flag} to train on")
        return self.step < total

    def describe(self, model, samples, size, folder, note=""):
        """Print model, batch, steps and the `size` in bytes of a checkpoint; `samples`: of an epoch."""
        parameters, kind = list(model.parameters()), "bf16 autocast" if self.bf16 else "fp32"
        total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
        per_step = f"{self.batch_size} x {self.world} ranks x {self.accumulation} accumulation = {self.global_batch}"
        epoch = f"{samples} samples = {samples / self.global_batch:.1f} steps per epoch"
        self.print(f"model     {trained:,} of {total:,} parameters trainable{note}; {kind}; on {self.device.type}")
        self.print(f"batch     {per_step} samples per step; {epoch}")
        self.print(f"steps     {self.step} -> {self.total}; a checkpoint is about {size / 1e9:.2g} GB, in {folder}")

    def write(self, name, text):
        """Write a text file beside the log, from rank 0."""
        if self.main:
            path = self.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    # ---- saving: tensors are copied to the host, then a thread writes them while training goes on, one save at a time

    def checkpoints(self, folder, name, write, size, collect, keep=0):
        """Set how this run is saved: as file or folder `name` ("steps_{step}") in `folder`, about `size` bytes; the
        newest `keep` stay (0: all).

        collect() -> nested dicts of tensors and plain values, on every rank. write(path, content) gets them on the host
        and must not touch the model, which trains on meanwhile; rank 0 calls it, with FSDP every rank."""
        self._folder, self._name, self._keep = Path(folder), name, keep
        self._folder.mkdir(parents=True, exist_ok=True)  # fail now where nothing can be written
        self._saving = write, size, collect

    def save(self):
        """Save as set by checkpoints(). The final step, also that of a stopped run, is saved without this call."""
        path = self._folder / self._name.format(step=self.step)
        self._start(path, *self._saving, dict(saved=path, saved_step=self.step))

    def save_best(self, path, write, size, collect=None):
        """Save the best so far, as step.validated() found it, like save(); without `collect` like save_as()."""
        if collect:
            self._start(path, write, size, collect, self._candidate)
        else:
            self.save_as(path, write, size, self._candidate)

    def save_as(self, path, write, size, record=None):
        """write(path) while training waits -> did it succeed? A collective call."""
        self._start(path, lambda temporary, _: write(temporary), size, dict, record or {})
        return self.join()

    def _start(self, path, write, size, collect, record):
        """Copy to the host, and let the thread write; join() then sets the attributes `record`. A collective call."""
        self.join()
        begin, self._record = time.perf_counter(), record
        work = partial(bool, True)  # of a rank that has nothing to write
        if self.main or self.sharded:
            content = ckpt.on_host(collect(), copy=True)
            work = partial(self._write, self.step, Path(path), write, size, content)
        self._writing = self._thread.submit(work)
        self.stall += time.perf_counter() - begin

    def _write(self, step, path, write, size, content):
        """In the thread -> was it written? A full or lost disk is reported, and training goes on."""
        written = False
        try:
            with fsdp.atomic_folder(path, self._writers) if self.sharded else ckpt.atomic_path(path) as temporary:
                ckpt.require_space(path.parent, int(1.1 * size))
                write(temporary, content)
            written = True
            if self.main and self._keep:
                ckpt.rotate(self._folder, self._name, self._keep)
        except OSError as error:
            what = "an older checkpoint stays" if written else f"NOT SAVED at step {step}: {path}"
            (self.log or self).print(f"{what}: {error}")
        return written

    def join(self):
        """Wait for the save under way and record its success -> False if it failed on any rank. A collective call."""
        written = True
        if self._writing:
            begin, writing, self._writing = time.perf_counter(), self._writing, None
            written = self.sum(writing.result()) == self.world
            if written:
                vars(self).update(self._record)
            self.stall += time.perf_counter() - begin
        self._record = {}
        return written

    def save_after_error(self):
        """Save the last complete step, where this process still can."""
        if not (self._saving and self.log):
            return
        self.log.close()
        self.world = 1  # no collective call from here on: other ranks may be gone, or wait for each other
        try:
            self.join()
            if self.main and self.consistent and not self.sharded and self.step > self.saved_step:
                self.save()
                self.join()
        except Exception as error:  # reported here: the first error is the one that launch() must raise
            self.log.print(f"NOT SAVED after the error: {error}")
        if self.saved:
            self.log.print(f"saved: {self.saved}. Continue after the error with the same command and --resume auto")

    # ---- loop

    def loader(self, dataset, order, collate, workers):
        """-> DataLoader of this rank's micro-batches for the steps that are left."""
        left, cuda, self.workers = self.total - self.step, self.device.type == "cuda", workers
        share = RankBatches(order, self.batch_size, self.accumulation, self.rank, self.world, self.position, left)
        prefetch = max(4, math.ceil(self.accumulation / workers)) if workers else None
        extra = dict(num_workers=workers, prefetch_factor=prefetch, pin_memory=cuda)
        return DataLoader(dataset, batch_sampler=share, collate_fn=collate, worker_init_fn=ignore_stop_signals, **extra)

    def steps(self, loader, project="", wandb=None, names=None):
        """Yield every Step that is left. After a stop signal, or when data cannot be read, the current step is the last
        one, and is saved. `names`: the metrics' names of {samples_per_s, data_wait, memory_gb, skipped_steps}."""
        config, self.logged, self.names = dataclasses.asdict(self.cfg), self.step, names or {}
        self.write("config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        self.write(self.script.name, self.script.read_text(encoding="utf-8"))
        self.log = RunLog(self.out, self.total, self.step, self.main, project, wandb, config)
        self.metrics = None  # the names of the first step's sums, which every other step must have, too
        self.queue, self.left = deque(), (self.total - self.step) * self.accumulation  # micro-batches: ready, to come
        self.iterator = iter(loader)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise in mid-step for a killed worker
        with StopSignal() as self.signal:
            for _ in range(self.accumulation):
                self._fetch()
            self._raise_data_error()
            self.wait = 0.0  # the first batches do not count: there was nothing to overlap them with
            while self.step < self.total:
                self.began = time.perf_counter()
                step = Step(self, [self.queue.popleft() for _ in range(self.accumulation)])
                yield step
                assert self.step == step.number, "the loop's body must call step.update once"
                self.log.advance(self.step, step.shown)
                if self._is_over():
                    break
        self.iterator = None  # ends the workers now: they would survive a later garbage collection
        self.log.close()

    def _fetch(self):
        """Queue the next micro-batch; an error of the data waits in self.error until the weights are saved."""
        if self.error is not None or self.left == 0:
            return
        begin, self.left = time.perf_counter(), self.left - 1
        try:
            self.queue.append(next(self.iterator))
        except Exception as error:
            self.error = error
            died = self.workers and isinstance(error, (ConnectionError, EOFError)) and "Caught" not in str(error)
            if died or str(error).startswith("DataLoader worker"):  # mostly killed by the kernel for its memory
                advice = f"Lower num_workers (now {self.workers}), or load in the main process: --num_workers 0"
                self.error = UserError(f"DataLoader worker crashed: {error}. {advice}")
            elif isinstance(error, UserError):  # DataLoader puts the worker's traceback in front of the message
                kind = f"\n{type(error).__module__}.{type(error).__qualname__}: "
                self.error = UserError(str(error).rpartition(kind)[2])
        self.wait += time.perf_counter() - begin

    def _raise_data_error(self):
        """Raise on every rank if the data failed on any. A collective call."""
        texts = [text for text in self.gather(self.error and (str(self.error) or repr(self.error))) if text]
        if self.error is not None:
            raise self.error
        require(not texts, f"another process could not read its data: {''.join(texts[:1])}")

    def stopping(self):
        """Did any rank get a stop signal, or data that it cannot read? A collective call."""
        return self.sum(self.signal.received is not None or self.error is not None) > 0

    def _is_over(self):
        """After a step -> does the loop end here? Then the step is saved. A collective call."""
        done = self.step == self.total
        if not done and not self.stopping():
            return False
        self.join()
        if self.saved_step != self.step:
            self.save()
            newest = f"the newest, {self.saved}, is of step {self.saved_step}. Free space and use --resume auto"
            require(self.join(), f"the last checkpoint could not be written; {newest}", ckpt.DiskFull)
        if not done:
            reason = "an error" if self.sum(self.error is not None) else "signal"
            resume = f"saved {self.saved}. Continue with the same command and --resume auto"
            self.log.print(f"stopped by {reason} after step {self.step}; {resume}")
            self._raise_data_error()
        return True

    def report_nonfinite(self, step, batches, sample_losses):
        """Log the samples behind a skipped step; UserError after MAX_NON_FINITE in a row. A collective call."""
        names = sum((batch["names"] for batch in batches), [])
        losses = zip(names, torch.cat(sample_losses).tolist(), strict=True)
        gathered = self.gather(([name for name, loss in losses if not math.isfinite(loss)], names))
        bad, names = (sum(lists, []) for lists in zip(*gathered, strict=True))
        shown = [list(name) for name in bad or names]
        listed = ", ".join(f"{name[-2]} frame {name[-1]}" for name in shown[:8])
        listed += f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        what = f"loss of {listed}" if bad else f"gradient (every loss is finite); the batch was {listed}"
        self.log.log(step, dict(nonfinite=shown), f"NON-FINITE step {step} skipped, weights unchanged: {what}")
        if self.skipped_in_row >= MAX_NON_FINITE:
            many = f"{self.skipped_in_row} steps in a row were not finite, the last one {step}: {what}"
            raise UserError(f"{many}. Look at these frames, or lower the learning rate")

    def finish(self, *lines, plot=("loss", "val_loss")):
        """After the final step: plot the metrics `plot` (training, validation) and print `lines`."""
        if self.main and self.step == self.total:
            drawn = [f"loss plot: {plot_loss(self.out, *plot)}"] if self.log else []  # no loop ran: an export only
            (self.log or self).print("\n".join([*drawn, *lines]))


class Step:
    """One optimizer step. index: updates before it; number: index + 1 | batches: this rank's micro-batches, on the CPU
    | known after update, the same on every rank: lr, loss, grad_norm, finite (False: the update was skipped)."""

    def __init__(self, run, batches):
        self.run, self.batches, self.index, self.number = run, batches, run.step, run.step + 1
        self.first, self.shown = run.position, None  # position of its first sample; what the bar shows, set by log()
        self._sums, self._sample_losses = {"loss": 0.0}, []

    def micro_batches(self, model):
        """Yield the batches on the device, dropout seeded by their position; the last backward averages the ranks."""
        run = self.run
        for m, batch in enumerate(self.batches):
            position = run.position + (m * run.world + run.rank) * run.batch_size
            torch.manual_seed(torch_seed_at(run.cfg.seed, position, "dropout"))
            # FSDP2 reduces after every micro-batch: unsharded fp32 gradients would not fit
            sync = m + 1 == len(self.batches) or hasattr(model, "set_requires_gradient_sync")
            with contextlib.nullcontext() if sync else run.accelerator.no_sync(model):
                yield to_device(batch, run.device)
            assert len(self._sample_losses) == m + 1, "the loop's body must call step.backward once per micro-batch"
            run._fetch()

    def backward(self, loss, sample_loss):
        """`loss`: this micro-batch's share of the step's loss; `sample_loss` (B,): to name what was not finite."""
        self.run.accelerator.backward(loss * self.run.world)  # DDP averages over the ranks; the loss is a sum
        self._sample_losses.append(sample_loss.detach())
        self.add(loss=loss.detach())

    def add(self, **sums):
        """Add numbers or () tensors up over micro-batches and ranks, for the log only: see mean()."""
        for name, value in sums.items():
            value = value.detach().double() if isinstance(value, torch.Tensor) else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value

    def update(self, optimizer, lr, clip=None):
        """Clip, set the learning rate (times a group's lr_scale), step; skipped if loss or gradient is not finite."""
        run = self.run
        assert len(self._sample_losses) == len(self.batches), "every micro-batch needs its step.backward before update"
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2
        self.add(grad_norm=norm / run.world)  # already the same on every rank, and summed below
        names = sorted(self._sums)  # in one order on every rank
        if run.metrics is None:
            assert len(set(map(tuple, run.gather(names)))) == 1, "step.add must get the same names on every rank"
            run.metrics = names
        assert names == run.metrics, f"step.add must get the same names in every step: {run.metrics}, now {names}"
        sums = [torch.as_tensor(self._sums[name], dtype=torch.float64) for name in names]
        total = torch.stack([value.to(run.device, non_blocking=True) for value in sums])
        if run.world > 1:
            dist.all_reduce(total)
        values = dict(zip(names, total.tolist(), strict=True))  # the one wait for the GPU in a step
        self.lr, self.loss, self.grad_norm = lr, values["loss"], values["grad_norm"]
        self.finite = math.isfinite(self.loss) and math.isfinite(self.grad_norm)
        if self.finite:
            run.consistent = False
            optimizer.step()
            run.consistent, run.skipped_in_row = True, 0
            run.window.append(values)
        else:
            run.skipped, run.skipped_in_row = run.skipped + 1, run.skipped_in_row + 1
        optimizer.zero_grad(set_to_none=True)
        run.step, run.position = run.step + 1, run.position + run.global_batch
        run.time += time.perf_counter() - run.began  # what follows (log, validation, save) is not training time
        if not self.finite:
            run.report_nonfinite(self.number, self.batches, self._sample_losses)

    def every(self, n):
        """Every `n` steps (0: never) and at the end of the training."""
        return n > 0 and (self.number % n == 0 or self.number == self.run.total)

    def passed(self, samples):
        """Did this step complete a multiple of `samples` samples, or the training?"""
        crossed = self.run.position // samples > self.first // samples
        return crossed or self.number == self.run.total

    def mean(self):
        """-> {loss, grad_norm, what add() got: mean over the updates since the last log line}; NaN without any."""
        run, window = self.run, self.run.window
        return {k: sum(w.get(k, math.nan) for w in window) / len(window) if window else math.nan for k in run.metrics}

    def speed(self):
        """-> (samples per second, share of the time spent waiting for data, memory in GB) since the last log line."""
        run = self.run
        seconds = max(run.time, 1e-9)
        return (self.number - run.logged) * run.global_batch / seconds, run.wait / seconds, memory_gb()

    def log(self, values, text="", line=None):
        """Send `values`, and speed, wait and memory, to a printed line with `text`, metrics.jsonl, W&B and the bar.
        `line` replaces the whole printed line."""
        run = self.run
        speed, wait, memory = self.speed()
        own = dict(samples_per_s=speed, data_wait=wait, memory_gb=memory, skipped_steps=run.skipped)
        own |= dict(save_stall_s=round(run.stall, 3)) if run.stall else {}
        tail = f"lr {self.lr:.2e} | {speed:.1f} samples/s | wait {wait:.1%} | {memory:.1f} GB"
        line = line or f"step {self.number:>7}/{run.total} | {text} | {tail}"
        values = {k: v for k, v in values.items() if not isinstance(v, float) or math.isfinite(v)}
        run.log.log(self.number, {run.names.get(k, k): v for k, v in own.items()} | values, line)
        self.shown = dict(loss=f"{self.loss:.4f}", lr=f"{self.lr:.1e}", wait=f"{wait:.0%}")
        self.shown["samples/s"] = f"{speed:.1f}"
        run.window, run.time, run.wait, run.stall, run.logged = [], 0.0, 0.0, 0.0, self.number

    def validated(self, values, loss, text="", line=None):
        """Log a validation; -> is `loss` the lowest so far? Then save it with run.save_best. `line`: the whole line."""
        run = self.run
        run.join()  # only a best that is on disk counts: the save under way may still fail
        run._candidate = dict(best_val_loss=loss, best_step=self.number)
        run.log.log(self.number, values, line or f"validation {self.number} | {text}")
        return math.isfinite(loss) and (run.best_val_loss is None or loss < run.best_val_loss)
