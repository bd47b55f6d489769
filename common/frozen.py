"""The frozen weights of a run: written once, beside its checkpoints, which record the folder and sha256 of the file."""

from pathlib import Path

from common import MissingFile, hub, require
from common.checkpoint import DiskFull, link

NAME = "frozen.safetensors"


def keep(run, folder, model, resumed=None):
    """Write the frozen tensors of `model`, on rank 0 -> the "frozen" entry of the run's checkpoints: {folder, sha256}.
    `resumed`: that entry of the resumed checkpoint, whose file is reused. Another run's file is kept under its hash."""
    from safetensors.torch import save_file

    path = Path(folder) / NAME
    existing = run.once(lambda: path.is_file() and hub.sha256_of(path))  # its digest, or False
    if resumed and existing == resumed["sha256"]:
        return resumed | dict(folder=str(path.parent.resolve()))
    if existing:
        run.once(link, path, aside := path.with_stem(f"frozen_{existing[:16]}"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    tensors = {n: t for n, t in model.state_dict().items() if n not in trained}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    written = run.save_as(path, lambda p: save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, p), size)
    require(written, f"{path} could not be written, and every checkpoint needs it. Free space", DiskFull)
    digest = run.once(hub.sha256_of, path)
    if existing == digest:
        run.once(aside.unlink)
    return dict(folder=str(path.parent.resolve()), sha256=digest)


def place(state):
    """Where the file was when checkpoint `state` was written."""
    return Path(state["frozen"]["folder"]) / NAME


def read(path, state):
    """The frozen weights that belong to checkpoint `path`, whose content is `state` -> {name: tensor}"""
    path, digest = Path(path), state["frozen"]["sha256"]
    folders = path.parent, path.parent.parent, place(state).parent  # a checkpoint may be set aside, or moved
    files = sum((sorted(folder.glob("frozen*.safetensors")) for folder in folders), [])
    problem = f"{path} holds the trained weights only, the other weights are in {place(state)}"
    hint = f"Put it beside the checkpoint: {NAME}, sha256 {digest[:16]}...; an export (best_hf, final_hf) is complete"
    require(files, f"{problem}, which is gone. {hint}", MissingFile)
    match = next((file for file in files if hub.sha256_of(file) == digest), None)
    require(match, f"{problem}; {files[0]} is another file. {hint}")
    return dict(hub.read_tensors(match))
