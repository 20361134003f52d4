"""Weights whose rows are spread over processes, and the part of a whole mask that belongs to each.

Owns the view of a sharded weight (a DTensor, as ``torch.distributed.fsdp.fully_shard`` makes them) beside its mask,
which every process holds whole. It must not communicate: everything here is about what this process holds.
"""

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from srigl_fx.errors import StructureError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Slices = tuple[slice, ...]


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether ``tensor`` is spread over processes.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")  # whoever has sharded anything has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def held(tensor: Tensor) -> Slices | None:
    """Which part of the whole tensor this process holds, as one slice a dimension; None where it holds all.

    Raises:
        StructureError: The tensor is neither cut along its dimensions nor replicated.

    Example:
        >>> held(torch.ones(2))
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        raise StructureError(
            f"a weight of shape {tuple(tensor.shape)} is placed as {tensor.placements}: masks follow weights that "
            "fully_shard cuts into rows, not tensor parallelism"
        )
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``; writing to it writes to ``tensor``.

    Example:
        >>> local(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def part(whole: Tensor, like: Tensor) -> Tensor:
    """The part of ``whole`` that lies where this process's part of ``like`` does: a view.

    Example:
        >>> part(torch.tensor([True, False]), torch.ones(2)).tolist()
        [True, False]
    """
    slices = held(like)
    return whole if slices is None else whole[slices]


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of ``whole`` that is spread over processes as ``like`` is; every process gives the same ``whole``.

    Example:
        >>> shard_like(torch.ones(2), torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    return as_shard(part(whole, like).clone(), like)


def as_shard(own: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each process holds its ``own`` part, spread as ``like`` is.

    Example:
        >>> as_shard(torch.ones(2), torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    if not is_sharded(like):
        return own
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
