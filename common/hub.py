"""Backbones on disk and on the hub: find their files, and load their weights through one function that refuses missing,
unknown and misshapen tensors. Import it before transformers."""

import contextlib
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate import init_empty_weights

from common import MissingFile, UserError, require
from common.checkpoint import atomic_path, laid_out, load_state, read_json

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
try:
    import torchvision  # noqa: F401  not used here, but transformers imports it where it is installed ...
except (ImportError, OSError, RuntimeError, AttributeError):
    sys.modules["torchvision"] = None  # ... and one that does not fit this torch would break that import

NO_VALUES = False  # True while common/plan.py builds models without values: no weight file is looked for or read
TEXTS = ("*.json", "*.txt", "*.jinja", "*.model")


def local_folder(source, weights=True, why="", **how):
    """Directory or hub id -> local directory with config and tokenizer files, and with `weights` the weight files.
    `why`: added to the error message, e.g. which checkpoint refers to it. `how`: options of snapshot_download."""
    wanted = weights and not NO_VALUES
    folder = _folder(source, [*TEXTS, *["*.safetensors"] * wanted], why, **how)
    older = wanted and not any(folder.glob("*.safetensors"))  # many repositories hold the weights in both forms
    return _folder(source, ["pytorch_model*.bin"], why, **how) if older else folder


def folder_here(source):
    """local_folder without a download: None where the model is not, or not whole, on this machine."""
    with contextlib.suppress(MissingFile):
        folder = local_folder(source, local_files_only=True)
        return folder if folder == Path(source) or weight_files(folder) else None  # a download may have been cut


def _folder(source, patterns, why="", **how):
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns, **how))
    except Exception as error:  # the hub client raises a dozen types; all mean that the files cannot be had
        problem = f"'{source}' is neither a directory nor reachable on the hub ({type(error).__name__}){why}"
        raise MissingFile(f"{problem}. Give a local directory; python make_demo.py --help lists tiny ones") from error


@contextlib.contextmanager
def opening(folder):
    """What transformers and tokenizers raise, for files of a model that are missing or damaged, as one line."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # peft would make them up
            yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:  # anything, for values that do not fit
        lacks = f"model '{folder}' lacks a file, or has one that is damaged or of another kind of model"
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(f"{lacks} ({why}). Copy or download it again, or give another directory") from error


def stored_source(source):
    """How a checkpoint names a backbone: a directory by its absolute path, a hub id as it is."""
    return str(Path(source).resolve()) if Path(source).is_dir() else str(source)


def weight_files(folder):
    """Directory -> its weight files: safetensors, or else pytorch_model.bin, in shards or whole."""
    if NO_VALUES:
        return []
    folder, hint = Path(folder), "not a complete model. Copy or download it again"
    for pattern in ("model*.safetensors", "pytorch_model*.bin", "*.safetensors"):
        index = sorted(folder.glob(f"{pattern}.index.json"))
        named = set(read_json(index[0])["weight_map"].values()) if index else ()
        files = sorted(folder / name for name in named) or sorted(folder.glob(pattern))
        lost = ", ".join(file.name for file in files if not file.is_file())
        require(not lost, f"{folder} lacks {lost}: {hint}", MissingFile)
        if files:
            return files
    raise MissingFile(f"{folder} has no weights (model*.safetensors): {hint}")


def read_tensors(folder):
    """Yield (name, CPU tensor) of all weights in a directory, or in one .safetensors file, one tensor at a time."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder) if Path(folder).is_dir() else [Path(folder)]:
        if file.suffix != ".safetensors":
            yield from load_state(file).items()
            continue
        try:
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118  safe_open is no dict
                    yield name, f.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}): copy or download it again") from error


def unfilled(make, *args, **kwargs):
    """make(...) -> the model, its parameters on the meta device until load_weights fills them; buffers are real."""
    if NO_VALUES:
        return make(*args, **kwargs)
    with init_empty_weights(include_buffers=False):
        model = make(*args, **kwargs)
    model.tie_weights()
    return model


def materialize(model, device):
    """Allocate on `device` what is on the meta device, and move the rest there. Tied parameters stay tied."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def check_finite(name, tensor, source):
    """-> the tensor; UserError if it has values that are not finite."""
    finite = not tensor.numel() or all(v.isfinite() for v in tensor.aminmax())
    require(finite, f"{source}: {name} has values that are not finite. Copy or download it again")
    return tensor


def read_adapter(folder):
    """-> {name: tensor} of peft's adapter_model.safetensors in a directory, all finite."""
    path = Path(folder) / "adapter_model.safetensors"
    return {name: check_finite(name, tensor, path) for name, tensor in read_tensors(path)}


@torch.no_grad()
def load_weights(model, tensors, source, rename=None, missing_ok=(), unused_ok=(), device=None):
    """Copy every (name, tensor) into the model's parameter or buffer of that name, or of rename(name); None skips it.
    UserError names tensors that `source` lacks, that the model does not know, of another shape or not finite; allowed
    are missing names with a prefix in `missing_ok`, unknown ones with one in `unused_ok`. Tied weights count as one.
    `device`: where to put an unfilled() model; under FSDP2 each rank copies its shard. -> missing names"""
    if device is not None:
        materialize(model, device)
    if NO_VALUES:
        return []
    own, found, unused = model.state_dict(keep_vars=True), set(), []
    for name, tensor in tensors:
        name = rename(name) if rename else name
        if name in own:
            shapes = f"{source}: {name} is {tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            require(own[name].shape == tensor.shape, f"{shapes}: another model")
            own[name].copy_(laid_out(check_finite(name, tensor, source), own[name]))
            found.add(_storage(own[name]))
        elif name is not None and not name.startswith(tuple(unused_ok)):
            unused.append(name)
    missing = [name for name, p in own.items() if p.numel() and _storage(p) not in found]
    lost = [name for name in missing if not name.startswith(tuple(missing_ok))]
    for kind, names in (("lacks", lost), ("has unknown", unused)):
        shown = f"{len(names)} tensors: {', '.join(names[:3])}{' ...' * (len(names) > 3)}"
        require(not names, f"{source} {kind} {shown}. Give the model that this program expects")
    return missing


def _storage(tensor):
    """A key that tied parameters share."""
    return id(tensor) if hasattr(tensor, "device_mesh") else tensor.data_ptr()


def weight_digest(folder):
    """Hash of all bytes of the weight files, by which an adapter or a cached feature knows its backbone. The sha256 of
    each file is cached beside them; a file is read again only if its size or time changed."""
    cache, known = Path(folder) / ".sha256.json", {}
    with contextlib.suppress(UserError):  # none yet, damaged, or one that only its owner may read
        known = read_json(cache)
    facts = {path.name: content_facts(path, known.get(path.name)) for path in weight_files(folder)}
    if facts != known:  # without write access to the folder the files are read every time
        with contextlib.suppress(OSError), atomic_path(cache) as temporary:
            temporary.write_text(json.dumps(facts))
    return hashlib.sha256(json.dumps([digest for _, _, digest in facts.values()]).encode()).hexdigest()


def content_facts(path, known=None):
    """-> [bytes, mtime_ns, sha256] of a file, which is not read if its size and time are those in `known`."""
    about = os.stat(path)
    facts = [about.st_size, about.st_mtime_ns]
    same = isinstance(known, list) and known[:2] == facts and [*map(type, known)] == [int, int, str]
    return known if same else [*facts, sha256_of(path)]


def sha256_of(path):
    digest, size = hashlib.sha256(), os.path.getsize(path) / 1e9
    if size > 2:
        print(f"checksum  of {path}, {size:.0f} GB: this takes a while", flush=True)
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
