"""FSDP2: weights, gradients and moments sharded over the ranks. And what a resume needs of a run that may use it: then
each rank writes its part, and any number of ranks can read it."""

import contextlib
import json
import warnings

import torch
import torch.distributed as dist

from common import checkpoint as ckpt


def shard_layers(model, layers, bf16, autocast):
    """Split `layers`, and the rest of the model, over the ranks; -> the model, with `autocast` in its forward."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, like the others here

    kinds = (torch.bfloat16, torch.float32) if bf16 else ()
    policy = MixedPrecisionPolicy(*kinds, cast_forward_inputs=False)  # targets stay as they are, autocast does the rest
    for module in [*layers, model]:
        fully_shard(module, mp_policy=policy)
    model.forward = autocast(model.forward)
    return model


@contextlib.contextmanager
def gathered(model):
    """Within it every rank has all of FSDP's weights, gathered once: else each layer is, for every token that is
    decoded. A forward needs no other rank meanwhile."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def state_of(model, optimizer):
    """-> what a resume needs: {trained, moments} of ckpt.training_state, or where FSDP2 has sharded them this rank's
    parts, {"trained.NAME" or "moments.NAME.exp_avg": (tensor, where it begins in the whole)}."""
    trained, moments = ckpt.training_state(model, optimizer)
    if not any(hasattr(p, "device_mesh") for p in model.parameters()):
        return dict(trained=trained, moments=moments)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    flat, parts = {f"trained.{name}": tensor for name, tensor in trained.items()}, {}
    for name, state in moments.items():
        flat |= {f"moments.{name}.{key}": tensor for key, tensor in state.items()}
    for name, tensor in flat.items():
        begins = [0] * tensor.dim()
        if hasattr(tensor, "device_mesh"):
            begins = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
            tensor = tensor.to_local()
        if tensor.numel():
            parts[name] = tensor, list(begins)
    return parts


@contextlib.contextmanager
def atomic_folder(final, group):
    """ckpt.atomic_path of all ranks of `group` together: each gets rank 0's temporary folder, to make and to write its
    part in; it is renamed when all have. What one of them raises becomes an OSError of all."""
    with contextlib.ExitStack() as stack:
        folder, said = None, None
        try:
            if dist.get_rank(group) == 0:
                folder = stack.enter_context(ckpt.atomic_path(final))
        except OSError as error:
            said = str(error)
        folder, said = _exchange((folder, said), group)[0]
        if said:
            raise OSError(said)
        try:
            yield folder
        except Exception as error:  # safetensors and torch have their own for a full disk, and the others wait
            said = str(error) or repr(error)
        said = [text for text in _exchange(said, group) if text]
        if said:
            raise OSError(said[0])


def _exchange(value, group):
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def write_state(folder, state, rank=0):
    """Write what state_of() gave: state.pt, or each rank its own file of shards/, in the format of
    torch.distributed.checkpoint's HuggingFaceStorageReader."""
    folder.mkdir(exist_ok=True)
    if "trained" in state:
        return ckpt.save_state(folder / "state.pt", state)
    from safetensors.torch import save_file

    (folder / "shards").mkdir(exist_ok=True)
    parts = {name: part for name, part in state.items() if part[0].dim() or rank == 0}  # counts are the same on all
    about = {name: dict(saved_offsets=begins) for name, (_, begins) in parts.items()}
    tensors = {name: tensor.contiguous() for name, (tensor, _) in parts.items()}
    save_file(tensors, folder / "shards" / f"rank_{rank}.safetensors", dict(DCP_SHARDING_INFO=json.dumps(about)))


def restore_state(model, optimizer, folder, group=None):
    """Put back what write_state wrote, on any number of ranks, with FSDP2 or without. A collective call of `group`."""
    if not (folder / "shards").is_dir():
        return ckpt.restore_training_state(model, optimizer, **ckpt.load_state(folder / "state.pt"))
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    names, reader = dict(model.named_parameters()), HuggingFaceStorageReader(folder / "shards")
    shapes, moments = {k: v.size for k, v in reader.read_metadata().state_dict_metadata.items()}, {}
    trained = {k.removeprefix("trained."): shape for k, shape in shapes.items() if k.startswith("trained.")}
    target = {f"trained.{name}": p.detach() for name, p in ckpt.check_trained(model, trained).items()}
    for key in sorted(shapes.keys() - target.keys()):
        name, _, moment = key.removeprefix("moments.").rpartition(".")
        target[key] = torch.zeros_like(names[name].detach()) if shapes[key] else torch.zeros(())
        moments.setdefault(name, {})[moment] = target[key]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process
        load(target, storage_reader=reader, process_group=group)
    ckpt.restore_moments(model, optimizer, moments)
