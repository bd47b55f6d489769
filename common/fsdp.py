"""FSDP2 (weights, gradients and moments sharded over the ranks), and the training state of a run with or without it:
with it each rank writes its own shard, which any number of ranks can read again."""

import contextlib
import json
import warnings

import torch
import torch.distributed as dist

from common import checkpoint as ckpt


def shard_layers(model, layers, bf16, autocast):
    """Shard each of `layers`, and the rest of the model, over the ranks -> the model, its forward under `autocast`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, like the others here

    kinds = (torch.bfloat16, torch.float32) if bf16 else ()
    policy = MixedPrecisionPolicy(*kinds, cast_forward_inputs=False)  # autocast casts what must be cast
    for module in [*layers, model]:
        fully_shard(module, mp_policy=policy)
    model.forward = autocast(model.forward)
    return model


@contextlib.contextmanager
def gathered(model):
    """Inside, every rank holds all weights of an FSDP model, gathered once instead of layer by layer for every decoded
    token. So a forward is no collective call meanwhile: ranks may decode different numbers of samples."""
    sharded = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in sharded:
        module.set_reshard_after_forward(module is not model, recurse=False)
        module.reshard()


def state_of(model, optimizer):
    """-> training state for a checkpoint: {trained, moments} of ckpt.training_state, or with FSDP2 this rank's shards,
    {"trained.NAME" or "moments.NAME.exp_avg": (tensor, its offsets in the whole tensor)}."""
    trained, moments = ckpt.training_state(model, optimizer)
    if not any(hasattr(p, "device_mesh") for p in model.parameters()):
        return dict(trained=trained, moments=moments)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    flat, parts = {f"trained.{name}": tensor for name, tensor in trained.items()}, {}
    for name, state in moments.items():
        flat |= {f"moments.{name}.{key}": tensor for key, tensor in state.items()}
    for name, tensor in flat.items():
        offsets = [0] * tensor.dim()
        if hasattr(tensor, "device_mesh"):
            offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1]
            tensor = tensor.to_local()
        if tensor.numel():
            parts[name] = tensor, list(offsets)
    return parts


@contextlib.contextmanager
def atomic_folder(final, group):
    """ckpt.atomic_path for all ranks of `group` together: each gets rank 0's temporary folder to create and write its
    part in; it is renamed when all are done. An error on one rank becomes an OSError on all."""
    with contextlib.ExitStack() as stack:
        folder, failure = None, None
        try:
            if dist.get_rank(group) == 0:
                folder = stack.enter_context(ckpt.atomic_path(final))
        except OSError as error:
            failure = str(error)
        folder, failure = _exchange((folder, failure), group)[0]
        if failure:
            raise OSError(failure)
        try:
            yield folder
        except Exception as error:  # any type (safetensors and torch have their own): the other ranks are waiting
            failure = str(error) or repr(error)
        failures = [text for text in _exchange(failure, group) if text]
        if failures:
            raise OSError(failures[0])


def _exchange(value, group):
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def write_state(folder, state, rank=0):
    """Write the result of state_of(): state.pt, or with FSDP2 each rank its own file in shards/, in the format that
    torch.distributed.checkpoint's HuggingFaceStorageReader reads."""
    folder.mkdir(exist_ok=True)
    if "trained" in state:
        return ckpt.save_state(folder / "state.pt", state)
    from safetensors.torch import save_file

    (folder / "shards").mkdir(exist_ok=True)
    parts = {name: part for name, part in state.items() if part[0].dim() or rank == 0}  # counts are the same on all
    about = {name: dict(saved_offsets=offsets) for name, (_, offsets) in parts.items()}
    tensors = {name: tensor.contiguous() for name, (tensor, _) in parts.items()}
    save_file(tensors, folder / "shards" / f"rank_{rank}.safetensors", dict(DCP_SHARDING_INFO=json.dumps(about)))


def restore_state(model, optimizer, folder, group=None):
    """Restore what write_state wrote, on any number of ranks, with or without FSDP2. A collective call on `group`."""
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
