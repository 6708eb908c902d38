"""Whole tensors, each on one rank: checkpoints are written and read in this form, however an engine shards the weights.

So a checkpoint has one piece per tensor, not one per tensor and rank, and planning, writing and reading it costs rank 0
no more with 512 ranks than with one. Fresh weights come from rank 0 alone. Read next: checkpoint.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flowar.base.distributed import World
from flowar.models.folders import load_state

VALUES_AT_ONCE = 2**27  # gathered in one go: half a GiB


def share_out(sizes: dict[str, int], num_ranks: int) -> dict[str, int]:
    """Return a rank for each name so that ranks hold about the same size: largest first, each to the emptiest rank."""
    loads, owners = [0] * num_ranks, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = loads.index(min(loads))
        owners[name] = rank
        loads[rank] += sizes[name]
    return owners


def gather_whole(shards: Mapping[str, DTensor], owners: Mapping[str, int], world: World) -> dict[str, Tensor]:
    """Return the tensors that this rank owns, whole, on the CPU; all ranks take part.

    Args:
        shards: from FSDP2, split along the first dimension over the last dimension of their mesh.
        owners: the rank that gets each.
        world: this rank.
    """
    found: dict[str, Tensor] = {}
    for names in _groups({name: shard.numel() for name, shard in shards.items()}):
        mesh = shards[names[0]].device_mesh
        padded = torch.cat([_padded(shards[name]) for name in names])
        gathered = padded.new_empty(_num_parts(mesh), len(padded))
        dist.all_gather(list(gathered), padded, group=mesh.get_group(mesh.ndim - 1))
        begin = 0
        for name in names:
            shape = shards[name].shape
            end = begin + _part_size(shape, _num_parts(mesh))
            if owners[name] == world.rank:
                found[name] = gathered[:, begin:end].flatten()[: shape.numel()].view(shape).to("cpu", copy=True)
            begin = end
    return found


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into `tensor`, or only this rank's part if FSDP2 has sharded `tensor`."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(whole)
        return
    mesh = tensor.device_mesh
    parts, place = whole.chunk(_num_parts(mesh)), mesh.get_local_rank(mesh.ndim - 1)
    tensor.to_local().copy_(parts[place] if place < len(parts) else whole[:0])


def take_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and buffers, and move the model to "meta"."""
    tensors: dict[str, Tensor] = dict(_tensors_of(model))
    model.to("meta")
    return tensors


def fill_from_main(model: nn.Module, tensors: dict[str, Tensor], world: World) -> None:
    """Give a model memory on this rank's device, and fill it with rank 0's `tensors`, returned by `take_tensors` there.

    Each tensor is dropped from `tensors` once it is copied.
    """
    model.to_empty(device=world.device)
    for name, target in _tensors_of(model):
        if world.is_main:
            whole = tensors.pop(name).detach().to(world.device)
        else:
            whole = torch.empty(target.shape, dtype=target.dtype, device=world.device)
        if world.size > 1:
            dist.broadcast(whole, src=0)
        fill(target, whole)


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def read_shared(
    keys: Mapping[str, str], shapes: Mapping[str, torch.Size], owners: Mapping[str, int], world: World, folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a checkpoint, each whole and on all ranks; its owner reads it and sends it to the others.

    Args:
        keys: name -> key in the checkpoint.
        shapes: of each tensor.
        owners: the rank that reads each.
        world: this rank.
        folder: the checkpoint.

    Raises:
        DamagedCheckpointError, UserError: as `load_state`, on all ranks.
    """
    mine = {name: torch.empty(shapes[name]) for name in keys if owners[name] == world.rank}
    load_state({keys[name]: tensor for name, tensor in mine.items()}, folder, world.control)
    for name in keys:
        is_mine = name in mine
        whole = mine.pop(name).to(world.device) if is_mine else torch.empty(shapes[name], device=world.device)
        if world.size > 1:
            dist.broadcast(whole, src=owners[name])
        yield name, whole


def _num_parts(mesh: DeviceMesh) -> int:
    return mesh.size(mesh.ndim - 1)


def _part_size(shape: torch.Size, num_parts: int) -> int:
    """Return the number of values in the largest part of a tensor."""
    return -(-shape[0] // num_parts) * shape[1:].numel()


def _padded(shard: DTensor) -> Tensor:
    """Return this rank's values, with zeros up to the size of the largest part."""
    local = shard.to_local().detach().flatten()
    return torch.nn.functional.pad(local, (0, _part_size(shard.shape, _num_parts(shard.device_mesh)) - len(local)))


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the names in groups of about `VALUES_AT_ONCE` values."""
    group, values = [], 0
    for name, size in sizes.items():
        group.append(name)
        values += size
        if values >= VALUES_AT_ONCE:
            yield group
            group, values = [], 0
    if group:
        yield group
