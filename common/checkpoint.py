"""Checkpoints: atomic writes, safe loading, which one to resume from, and the optimizer's state.

A checkpoint is a file, or a folder with a meta.json, that says its step. It is written under a temporary name in the
same folder, flushed to disk (files and folder), then renamed: a path without the `.tmp-` prefix is always complete,
whatever kill or full disk came in between. Only tensors and plain types go in, so weights_only=True loads them all."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist

from common import MissingFile, UserError, require

TEMPORARY = ".tmp-"
OWNED = re.compile(re.escape(TEMPORARY) + r"(?P<pid>\d+)@(?P<host>.+?)~(?P<old>old~)?(?P<name>.+)")


class DiskFull(UserError, OSError):
    """Not enough disk space for a checkpoint; nothing that existed was touched."""


# ---- atomic files ----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def atomic_path(final):
    """Yield a temporary path (create a file or a folder there); on success fsync it and rename it to `final`, replacing
    what was there. On any error the temporary is removed and `final` stays as it was; a full disk raises DiskFull."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = _beside(final), _beside(final, "old~")
    _remove(temporary)
    try:
        yield temporary
        # os.umask can only be read by setting it, for all threads
        umask = int(re.search(r"Umask:\s*(\d+)", Path("/proc/self/status").read_text())[1], 8)
        for path in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            if path.is_file():  # safetensors makes files that only their owner may read, and labs share a disk
                with contextlib.suppress(PermissionError):  # FAT has no file modes
                    path.chmod(0o666 & ~umask)
            _fsync(path)
        if final.is_dir():  # a folder cannot be replaced in one call: move the old one aside first, delete it last
            _remove(aside)
            os.replace(final, aside)
        os.replace(temporary, final)
        _fsync(final.parent)
    except BaseException as error:
        full = _disk_is_full(error, final.parent)  # before the temporary is removed: it is what fills the disk
        if aside.exists() and not final.exists():
            os.replace(aside, final)
        _remove(temporary)
        if full:
            untouched = "what was there before is untouched. Free space, resume"
            raise DiskFull(f"no room left while writing {final} ({error}); {untouched}") from error
        raise
    _remove(aside)


def _beside(final, old=""):
    """The temporary name for `final`: unique among the processes and machines that share a disk."""
    return final.parent / f"{TEMPORARY}{os.getpid()}@{socket.gethostname()}~{old}{final.name}"


def _disk_is_full(error, folder):
    """Is that why `error` was raised? torch.save ("[enforce fail at inline_container.cc") and safetensors hide it."""
    other = isinstance(error, DiskFull) or not isinstance(error, Exception)  # it says so itself; KeyboardInterrupt
    named = re.search("No space left|quota exceeded|inline_container|I/O error", str(error))
    by_number = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    return not other and (by_number or named or shutil.disk_usage(folder).free < 2**20)


def require_space(folder, needed_bytes):
    """Raise DiskFull unless the disk of `folder` has `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    room = f"needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; what is there is untouched"
    require(free >= needed_bytes, f"writing to {folder} {room}. Free space and resume", DiskFull)


def remove_temporaries(folder):
    """Delete what a killed process left half-written; of other machines, whose processes may live, only what has not
    changed for a day. A folder that was moved aside goes back if its successor never came."""
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        owner = OWNED.fullmatch(path.name)
        if owner and owner["host"] == socket.gethostname():
            alive = owner["pid"] != str(os.getpid()) and Path(f"/proc/{owner['pid']}").exists()
        else:
            alive = max(p.lstat().st_mtime for p in [path, *path.rglob("*")]) > time.time() - 86400
        if alive:
            continue
        if owner and owner["old"] and not (path.parent / owner["name"]).exists():
            os.replace(path, path.parent / owner["name"])
        else:
            _remove(path)


def claim(folder):
    """Lock `folder` for this process: two trainings would replace each other's checkpoints. -> the lock's file, to be
    kept open; UserError where another process has it."""
    path, file = Path(folder, ".lock"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except OSError as error:  # another errno: a disk without locks, or a read-only folder
        other = f"another training is running in {folder}: choose another folder (or delete {path} if there is none)"
        require(error.errno != errno.EAGAIN, other)
    return file


def link(source, target):
    """Atomically make `target` a second name of the file `source`; a copy where there are no hard links."""
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # network file systems that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # over NFS a file that somebody reads stays: the next start tries again
    else:
        path.unlink(missing_ok=True)


def read_json(path):
    """The JSON object in a file -> dict; one that is missing, damaged or something else raises UserError."""
    try:
        return {**json.loads(Path(path).read_text(encoding="utf-8-sig"))}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no readable JSON object ({error}): copy it again, with all beside it") from error


# ---- tensors and plain values ----------------------------------------------------------------------------------------
def save_state(path, state):
    """torch.save of on_host(state)."""
    torch.save(on_host(state), path)


def on_host(value, copy=False, known=None, where="state"):
    """Nested dicts and lists with every tensor on the CPU; TypeError for what weights_only could not load back.
    `copy`: also those that are there already, so that training cannot change them. A tensor that occurs twice stays
    one (`known`). What FSDP2 has sharded is gathered, one tensor at a time, for rank 0: a collective call."""
    known = {} if known is None else known
    if isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):
            value = value.detach().full_tensor()
            return value.cpu() if dist.get_rank() == 0 else None
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else id(value)
        if key not in known:
            known[key] = value.detach().to("cpu", copy=copy)
        return known[key]
    if type(value) in (dict, OrderedDict):
        for key in value:
            wrong = f"{where} has a key {key!r} of type {type(key).__name__}; only str and int are stored"
            require(type(key) in (str, int), wrong, TypeError)
        return {k: on_host(v, copy, known, f"{where}.{k}") for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(on_host(v, copy, known, f"{where}[{i}]") for i, v in enumerate(value))
    wrong = f"{where} is a {type(value).__name__}; only tensors and plain values are stored"
    require(type(value) in (int, float, bool, str, type(None)), wrong, TypeError)
    return value


def load_state(path, check=True):
    """Read what save_state wrote, on the CPU. A pickle with other contents is refused, never executed. `check`: compare
    the bytes of the tensors with their checksums, which torch writes but does not look at.

    The tensors are memory-mapped, so that the ranks of a machine share one copy: clone what must outlive the file, and
    drop the rest, or a deleted file keeps its space on the disk."""
    if not Path(path).is_file():
        raise MissingFile(f"{path}: no such checkpoint file")
    try:
        whole = zipfile.is_zipfile(path)
        same = not (whole and check) or zipfile.ZipFile(path).testzip() is None
        require(same, "it holds other bytes than were written", ValueError)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
        require(isinstance(state, dict), f"it holds a {type(state).__name__}", TypeError)
        return state
    except Exception as error:  # damaged bytes surface as anything: RuntimeError, EOFError, KeyError, OSError...
        found = re.search(r"GLOBAL (\S+)|it holds.*", str(error))  # torch's text tells how to load it nevertheless
        why = found[0] if found else f"not a readable checkpoint ({type(error).__name__})"
        raise UserError(f"{path} is refused: {why}; expected a whole file of tensors and plain values only") from error


def read_checkpoint(path, script, format_version, names=(), resume=False):
    """-> content of a checkpoint file of `script`, or of the first of `names` in the folder `path`. `resume`: its
    optimizer is needed, too."""
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in names if (path / name).is_file()]
        if not files:
            raise MissingFile(f"{path} has none of {', '.join(names)}; expected a checkpoint of {script}.py")
        path = files[0]
    state = load_state(path)
    found = state.get("format_version"), state.get("meta", {}).get("script")
    wrong = f"{path} is format {found[0]} of '{found[1]}', this code reads format {format_version} of {script}"
    require(found == (format_version, script), wrong)
    weights_only = f"--resume {path} holds weights only, no optimizer: go on from the newest checkpoint beside it"
    require(not resume or "optimizer_state_dict" in state, weights_only)
    return state


# ---- resume: one timeline per run ------------------------------------------------------------------------------------
def step_of(path):
    """-> optimizer steps of a checkpoint, from its name (steps_20, checkpoint_step_20.pt) or else its content; None for
    an export in another program's format, which does not say."""
    path = Path(path)
    if match := re.search(r"steps?_(\d+)", path.name):
        return int(match[1])
    if path.is_dir():
        meta = path / "meta.json"
        return read_json(meta).get("step") if meta.is_file() else None
    return load_state(path, check=False).get("step")


def checkpoints_in(folder, patterns=("steps_*",)):
    """-> complete checkpoints in `folder` whose names match one of the glob `patterns`, the newest last."""
    found = {path for pattern in patterns for path in Path(folder).glob(pattern)}
    return sorted(found, key=lambda path: (step_of(path) or 0, path.stat().st_mtime))


def find_checkpoint(resume, folder, patterns, exports=()):
    """`resume`: None (a new run; UserError if `folder` has one already), "auto" (the newest checkpoint) or a path ->
    path to resume from, or None. `patterns`: names of what can be resumed; `exports`: of weights alone, which cannot"""
    own, exported = checkpoints_in(folder, patterns), checkpoints_in(folder, exports)
    if resume == "auto" and own:
        return own[-1]
    if resume in (None, "auto"):
        advice = "Go on with --resume auto, or choose" if own else "It holds weights without an optimizer: choose"
        newest = (own or exported or [None])[-1]
        require(newest is None, f"{newest} already exists. {advice} another folder for this run")
        return None
    path, listed = Path(resume), f"{folder} has {', '.join(path.name for path in own) or 'none'}"
    require(path.exists(), f"--resume {resume}: no such checkpoint; {listed}", MissingFile)
    fits = any(path.match(pattern) for pattern in patterns)
    require(fits, f"--resume {resume} is no checkpoint that can be resumed ({', '.join(patterns)}); {listed}")
    inside = path.resolve().parent == Path(folder).resolve()
    require(inside or not own, f"--resume {resume} is of another run than {folder}, which has checkpoints of its own")
    return path


def set_aside(folder, patterns, step):
    """Move the checkpoints after `step` into a new folder set_aside_1, 2, ... -> their new paths."""
    later = [path for path in checkpoints_in(folder, patterns) if (step_of(path) or 0) > step]
    places = (Path(folder, f"set_aside_{n}") for n in itertools.count(1))
    target = next(place for place in places if not place.exists())
    moved = [target / path.name for path in later]
    for path, new in zip(later, moved, strict=True):
        target.mkdir(exist_ok=True)
        os.replace(path, new)
    return moved


def rotate(folder, name, keep):
    """Delete all but the newest `keep` checkpoints called `name` ("steps_{step}"; 0 keeps all), not a user's copies
    with other names. Call it after the new one is in place."""
    own = [path for path in Path(folder).iterdir() if re.fullmatch(name.format(step=r"\d+"), path.name)]
    for path in sorted(own, key=step_of)[:-keep] if keep else []:
        doomed = _beside(path)
        os.replace(path, doomed)  # rename first: a kill must not leave half a folder under a checkpoint's name
        _remove(doomed)


def check_same_run(path, saved, fingerprint, config, fixed):
    """Refuse a resume that would silently be another run -> ["key old -> new"] of the changed keys."""
    changed = "the training data or its settings changed since then (added, removed, made again, another split)"
    again = f" with --init-from {shlex.quote(str(path))}" if "init_from" in config else ""
    put_back = f"this would not be the same run. Put them back, or start a new run in another folder{again}"
    require(saved["fingerprint"] == fingerprint, f"--resume {path}: {changed}, {put_back}")
    then, now = flat(saved["config"]), flat(config)
    differ = {k: f"{k} {then[k]} -> {v}" for k, v in now.items() if k in then and then[k] != v}
    wrong = "; ".join(text for key, text in differ.items() if key in fixed)
    require(not wrong, f"--resume {path} was trained with another {wrong}. Set it back, or start a new run")
    return [text for key, text in differ.items() if key not in ("resume", "resume_from_checkpoint", "check")]


def flat(config, prefix=""):
    """{"dotted.name": value} of nested dicts."""
    out = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


# ---- training state --------------------------------------------------------------------------------------------------
def training_state(model, optimizer):
    """-> ({name: tensor} of every trained parameter, {name: {exp_avg, ...}} of the optimizer); with FSDP2 sharded."""
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.detach() for p, n in names.items()}, {names[p]: dict(state) for p, state in optimizer.state.items()}


def check_trained(model, shapes):
    """-> {name: parameter} of what is trained, which must be `shapes` {name: shape}, as copy_ would broadcast."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wrong = [n for n in trained | shapes if getattr(trained.get(n), "shape", None) != shapes.get(n)]
    differ = f"{len(wrong)} trained tensors of the checkpoint have another name or shape, e.g. {''.join(wrong[:1])}"
    require(not wrong, f"{differ}: it was made with another kind of training or another model")
    return trained


@torch.no_grad()
def restore_training_state(model, optimizer, trained, moments):
    """Load what training_state returned, after the trip to disk."""
    for name, p in check_trained(model, {n: t.shape for n, t in trained.items()}).items():
        p.copy_(laid_out(trained[name], p))
    restore_moments(model, optimizer, moments)


def restore_moments(model, optimizer, saved):
    """Load the optimizer's {parameter name: {exp_avg, ...}}."""
    parameters, fused = dict(model.named_parameters()), optimizer.param_groups[0].get("fused")
    optimizer.state.clear()
    for name, moments in saved.items():
        p = parameters[name]
        device = {k: "cpu" if k == "step" and not fused else p.device for k in moments}  # counted on the CPU
        plain = {k: v for k, v in moments.items() if not isinstance(v, torch.Tensor)}  # bitsandbytes counts in an int
        moments = {k: laid_out(v, p) if v.dim() else v for k, v in moments.items() if k not in plain}
        optimizer.state[p] = plain | {k: v.to(device[k], copy=True) for k, v in moments.items()}


def laid_out(tensor, parameter):
    """A whole tensor -> itself, or, if FSDP2 has sharded the parameter, this rank's shard of it."""
    if not hasattr(parameter, "device_mesh") or hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
