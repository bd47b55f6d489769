"""What a training leaves as it is, once beside its checkpoints instead of in each of them. A checkpoint says where that
was and by which hash it is known."""

from pathlib import Path

from common import MissingFile, hub, require
from common.checkpoint import DiskFull, link

NAME = "frozen.safetensors"


def keep(run, folder, model, before=None):
    """Write the tensors of `model` that are not trained, on rank 0 -> what its checkpoints say of them ("frozen").
    `before`: what the checkpoint says that is resumed; its file stays as it is, another run's under another name."""
    from safetensors.torch import save_file

    path = Path(folder) / NAME
    there = run.once(lambda: path.is_file() and hub.sha256_of(path))
    if before and there == before["sha256"]:
        return before | dict(folder=str(path.parent.resolve()))
    if there:
        run.once(link, path, aside := path.with_stem(f"frozen_{there[:16]}"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    tensors = {n: t for n, t in model.state_dict().items() if n not in trained}
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    written = run.save_as(path, lambda p: save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, p), size)
    require(written, f"{path} could not be written, and no checkpoint is whole without it. Free space", DiskFull)
    digest = run.once(hub.sha256_of, path)
    if there == digest:
        run.once(aside.unlink)
    return dict(folder=str(path.parent.resolve()), sha256=digest)


def place(state):
    """Where the file was when checkpoint `state` was written."""
    return Path(state["frozen"]["folder"]) / NAME


def read(path, state):
    """Of the training behind checkpoint `path` -> {name: tensor} of what it left as it was."""
    path, wanted = Path(path), state["frozen"]["sha256"]
    folders = path.parent, path.parent.parent, place(state).parent  # a checkpoint may be set aside, or moved
    there = sum((sorted(folder.glob("frozen*.safetensors")) for folder in folders), [])
    needs = f"{path} holds what was trained, the other weights are in {place(state)}"
    how = f"Put it beside the checkpoint: {NAME}, sha256 {wanted[:16]}...; an export (best_hf, final_hf) is whole"
    require(there, f"{needs}, which is gone. {how}", MissingFile)
    same = next((file for file in there if hub.sha256_of(file) == wanted), None)
    require(same, f"{needs}; {there[0]} is another file. {how}")
    return dict(hub.read_tensors(same))
