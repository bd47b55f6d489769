"""Checkpoints that a kill, a full disk or a stranger's file cannot turn into damage.

A checkpoint is written under a temporary name in the same folder, flushed to disk (files and folder), then renamed: a path
without the `.tmp-` prefix is always complete. Only tensors and plain types go in, so everything loads with weights_only=True.
"""

import atexit
import contextlib
import errno
import multiprocessing.util  # whose own exit handler must be there before ours: the last one runs first
import os
import pickle
import re
import shutil
import signal
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

TEMPORARY = ".tmp-"


class DiskFull(OSError):
    """Not enough room for a checkpoint; nothing that existed was touched."""


@contextlib.contextmanager
def atomic_path(final):
    """Yield a temporary path (create a file or a folder there); on success fsync it and rename it to `final`, replacing what was there.

    On any error the temporary is removed and `final` stays as it was; no room left raises DiskFull.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f"{TEMPORARY}{os.getpid()}-{final.name}"
    aside = final.parent / f"{TEMPORARY}{os.getpid()}-old-{final.name}"
    _remove(temporary)
    try:
        yield temporary
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            if path.is_file():
                path.chmod(
                    0o666 & ~_umask()
                )  # safetensors makes files that only their owner may read, and labs share a disk
            _fsync(path)
        if final.is_dir():  # a folder cannot be replaced in one call: move the old one aside first, delete it last
            _remove(aside)
            os.replace(final, aside)
        os.replace(temporary, final)
        _fsync(final.parent)
    except BaseException as error:
        full = _disk_is_full(error, final.parent)  # asked while the temporary still fills it
        if aside.exists() and not final.exists():
            os.replace(aside, final)
        _remove(temporary)
        if full:
            raise DiskFull(
                errno.ENOSPC,
                f"no room left while writing {final} ({error}); the checkpoints before it are untouched. Free space and resume",
            ) from error
        raise
    _remove(aside)


def _umask():
    """The process's file mode mask, which can only be read by setting it."""
    os.umask(mask := os.umask(0o077))
    return mask


def _disk_is_full(error, folder):
    """Also where torch.save ("unexpected pos 704 vs 598") and safetensors hide it behind an error of their own."""
    return isinstance(error, Exception) and (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or "No space left" in str(error)
        or shutil.disk_usage(folder).free < 2**20
    )


def require_space(folder, needed_bytes):
    """Raise DiskFull unless the disk of `folder` has `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskFull(
            errno.ENOSPC,
            f"a checkpoint in {folder} needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; the checkpoints there are untouched. Free space and resume",
        )


def save_state(path, state):
    """torch.save of tensors and plain types; refuses, before writing, anything that weights_only could not load back."""
    _check_plain(state, "state")
    torch.save(state, path)


def load_state(path):
    """Read what save_state wrote, on the CPU. A pickle with other contents is refused, never executed.

    The tensors are mapped from the file, so that the ranks of a machine share one copy of them: clone what must outlive the file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # torch's own text explains how to load it nevertheless
        raise ValueError(
            f"{path} is refused: {f'it refers to {found[1]}' if found else 'not a checkpoint'}; a checkpoint holds tensors and plain values only"
        ) from error
    except Exception as error:  # damaged bytes surface as anything: RuntimeError, EOFError, KeyError, OSError...
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__}: {error})") from error


def steps_in(folder, pattern=r"steps_(\d+)"):
    """{step: path} of the complete checkpoints in `folder`, ascending."""
    found = {int(m[1]): p for p in Path(folder).glob("*") if (m := re.fullmatch(pattern, p.name))}
    return dict(sorted(found.items()))


def rotate(folder, keep, protect=None, pattern=r"steps_(\d+)"):
    """Delete all but the newest `keep` checkpoints (0 keeps all) and the one of step `protect`. Call it after the new one is in place."""
    for step, path in list(steps_in(folder, pattern).items())[:-keep] if keep else []:
        if step != protect:
            doomed = (
                path.parent / f"{TEMPORARY}{os.getpid()}-{path.name}"
            )  # the name goes first: deleting a folder takes many calls
            os.replace(path, doomed)
            _remove(doomed)


def remove_temporaries(folder):
    """Delete what a killed process left half-written. An old checkpoint that was moved aside is put back if its successor never came."""
    _put_back(folder)
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        _remove(path)


def _put_back(folder):
    """A folder whose replacement died between its two renames lies aside, complete, and is given its name again."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        old = re.fullmatch(re.escape(TEMPORARY) + r"\d+-old-(.+)", path.name)
        if old and not (path.parent / old[1]).exists():
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.replace(path, path.parent / old[1])


class StopSignal:
    """Turns SIGTERM and SIGINT into a flag that the loop reads after a step; a second signal acts as usual."""

    def __init__(self):
        self.received = None
        self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        atexit.register(_end_workers)

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        self.restore()

    def restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _end_workers():
    """After an error Python would wait forever for loader workers: they ignore the SIGTERM with which it ends its daemons."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def ignore_stop_signals(worker):
    """worker_init_fn of a DataLoader: Ctrl-C and batch systems signal the whole process group, and the step being finished needs its data.
    Goes with a StopSignal in the parent, which ends such workers at exit."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _check_plain(value, where):
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has a key {key!r} of type {type(key).__name__}; only str and int are stored")
            _check_plain(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in (
        torch.Tensor,
        int,
        float,
        bool,
        str,
        type(None),
    ):  # no subclasses, no bytes: weights_only does not read them back
        raise TypeError(f"{where} is a {type(value).__name__}; only tensors and plain values are stored")


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(
            path, ignore_errors=True
        )  # over NFS a file that somebody reads stays for now; the next start tries again
    elif path.exists() or path.is_symlink():
        path.unlink()


# ---- training state ----------------------------------------------------------------------------------------------------


def training_state(model, optimizer, fsdp=False):
    """-> ({name: tensor} of every trained parameter, {name: {exp_avg, ...}} of the optimizer), whole and on the CPU; under FSDP2 a
    collective call whose result only rank 0 holds."""
    if fsdp:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options), get_optimizer_state_dict(
            model, optimizer, options=options
        ).get("state", {})
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    return (
        {n: p.detach().cpu() for p, n in names.items()},
        {names[p]: {k: v.cpu() for k, v in moments.items()} for p, moments in optimizer.state.items()},
    )


def restore_training_state(model, optimizer, state, fsdp=False):
    """Put state["trained"] and state["moments"] (of training_state) back; every trained tensor must be there, in its shape."""
    names, saved = {n: p for n, p in model.named_parameters() if p.requires_grad}, state["trained"]
    wrong = [
        n for n, p in names.items() if n not in saved or saved[n].shape != p.shape
    ]  # copy_ would broadcast (1,) into (8,)
    if wrong:
        raise ValueError(
            f"the checkpoint lacks {len(wrong)} trained tensors or has them in another shape, e.g. {wrong[0]}: it was made with another kind of training or another model"
        )
    if fsdp:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, state["trained"], options=options)
        group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} | {
            "params": list(state["moments"])
        }
        set_optimizer_state_dict(
            model, optimizer, {"state": state["moments"], "param_groups": [group]}, options=options
        )
        return
    with torch.no_grad():
        for name, p in names.items():
            p.copy_(state["trained"][name])
    optimizer.state.clear()
    for name, moments in state["moments"].items():
        p = names[name]
        # the step counter of an unfused AdamW stays on the CPU
        optimizer.state[p] = {
            k: v.to("cpu" if k == "step" and not optimizer.param_groups[0].get("fused") else p.device, copy=True)
            for k, v in moments.items()
        }


def find_resume(wanted, folder, pattern=r"steps_(\d+)"):
    """`wanted`: None, a checkpoint directory, or "auto" for the newest one in `folder` -> path or None (nothing to resume)."""
    if not wanted:
        return None
    _put_back(folder)
    there = steps_in(folder, pattern)
    if wanted == "auto":
        return next(reversed(there.values()), None)
    if not (Path(wanted) / "state.pt").is_file():
        raise FileNotFoundError(
            f"resume_from_checkpoint '{wanted}' has no state.pt: expected a checkpoint directory; '{folder}' has {', '.join(p.name for p in there.values()) or 'none'}"
        )
    return Path(wanted)


def check_resume(path, meta, expected, config, fixed):
    """Refuse a resume that would silently mean something else: `expected` {key: value} of `meta` (format, data fingerprint) and the config
    keys `fixed` must be unchanged. -> list of "key then -> now" for the other changed keys."""
    for key, value in expected.items():
        if meta[key] != value:
            why = (
                "another version of this code wrote it"
                if key == "format_version"
                else "it was trained on other data or data settings (episodes, horizon, cameras, actions)"
            )
            raise ValueError(
                f"{path} has {key} {meta[key]}, this run {value}: {why}. "
                f"Resume with the same, or start a new run from its weights: --load_model_weights {path}"
            )
    for key in fixed:
        if meta["config"][key] != config[key]:
            raise ValueError(
                f"{path} was trained with {key} {meta['config'][key]}, now it is {config[key]}: set it back, or start a new run with --load_model_weights {path}"
            )
    ignored = ("resume_from_checkpoint", "output_dir", "check")
    return [
        f"{k} {then} -> {config.get(k)}"
        for k, then in meta["config"].items()
        if config.get(k) != then and k not in ignored
    ]
