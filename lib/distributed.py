"""Several processes: starting and ending their group, gathering what each has, and a model spread over them (FSDP2)."""

import gc
import inspect
import itertools
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel


def start_processes(device: torch.device) -> None:
    """Join the group of processes that torchrun started. What lies in host memory travels by gloo, so that no GPU waits for it.
    While rank 0 evaluates, the others wait long."""
    import torch.distributed.nn  # noqa: F401  -- before there is a group: see end_processes

    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backends, timeout=timedelta(hours=3))


def end_processes() -> None:
    """Leave the group and end its threads.

    Gloo's threads end with the last reference to the group. One that outlives the interpreter while it frees the tensors of the
    last collective asks for the interpreter's lock and is ended by force inside a destructor, which aborts the process:
    "terminate called without an active exception". Two things hold a reference: a DistributedDataParallel, and the functions
    of torch.distributed.nn if that is imported after the group is made (DDP does), by default arguments."""
    gc.collect()
    dist.destroy_process_group()


def all_gather(values):
    """A tensor's or a list's rows of all processes, in their order; those of this one where it is alone."""
    if not dist.is_initialized():
        return values
    count = dist.get_world_size()
    if isinstance(values, torch.Tensor):
        found = [torch.empty_like(values) for _ in range(count)]
        dist.all_gather(found, values.contiguous())
        return torch.cat(found)
    found = [None] * count
    dist.all_gather_object(found, values)
    return list(itertools.chain(*found))


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model with the same weights in every process, whose backward pass averages the gradients over the processes. Buffers
    do not change in training (masks, rotary tables, 4-bit weights), so none is sent before each forward pass."""
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name before torch 2.13
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{name: False})


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Spread every parameter over the processes, rows first (Zhao et al. 2023; Rajbhandari et al. 2020, stage 3). A block of an
    nn.ModuleList is whole while it computes; what stands outside of blocks is whole from the forward to the end of the
    backward pass, and is found so by code that runs between the two. Buffers, 4-bit weights among them, stay with each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in [block for blocks in model.modules() if isinstance(blocks, nn.ModuleList) for block in blocks]:
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def is_sharded(value) -> bool:
    return hasattr(value, "full_tensor")


def gathered(value, keep: bool):
    """A state with each sharded tensor whole and in host memory, where `keep`; elsewhere without. All processes must call it:
    tensors are gathered one at a time, in the order of the state."""
    if is_sharded(value):
        whole = value.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gathered(each, keep) for key, each in value.items()}
    return [gathered(each, keep) for each in value] if isinstance(value, list) else value


def sharded_like(value, own):
    """A whole tensor as this process's part of it, where `own`, of the same shape, is sharded; all else as it is."""
    if not (is_sharded(own) and torch.is_tensor(value) and value.shape == own.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
