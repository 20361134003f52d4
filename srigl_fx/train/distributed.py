"""Several processes that train one model together: data parallelism and ``fully_shard``.

Owns all communication of the trainers and the order in which a model may be wrapped. It must not know schedules,
update rules or hooks.

On ordinary steps nothing is sent. At a mask update, processes that each hold gradients of their own (data
parallelism) average the dense gradient, one all-reduce a weight; where weights are spread over processes
(``fully_shard``) their gradients are averaged already, and one weight at a time is gathered. Every process then
computes the same masks, and fingerprints of the masks are compared.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from srigl_fx.errors import InvariantError, SparsifyError, TrainerError
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.masks.shards import as_shard, held, is_sharded, local

_DDP_ORDER = "sparsify(model) -> DistributedDataParallel(model) -> optimizer -> trainer"
_FSDP_ORDER = "sparsify(model) -> fully_shard(model) -> optimizer -> trainer"
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # torch's own name: what DDP neither reduces nor broadcasts


@dataclass(frozen=True)
class Processes:
    """The processes that train one model, this one among them.

    Attributes:
        group: How they communicate; None where this process is alone.
        averages: Whether each has gradients of its own, which count by their mean.
        device: Where the small tensors that they exchange must lie.
    """

    group: "dist.ProcessGroup | None" = None
    averages: bool = False
    device: torch.device | str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this is the first of the processes, which writes for all."""
        return self.group is None or dist.get_rank(self.group) == 0

    def any_has(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any process has it."""
        if self.group is None:
            return list(flags)
        seen = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in seen.tolist()]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes where each has a gradient of its own: of ``tensor``, which may be overwritten."""
        if self.group is None or not self.averages:
            return tensor
        tensor = tensor.contiguous().div_(dist.get_world_size(self.group))
        dist.all_reduce(tensor, group=self.group)
        return tensor

    @torch.no_grad()
    def shared(self, gradients: Mapping[str, Tensor | None], likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of gradients as all processes together have them: whole, and averaged where each has its own.

        Args:
            gradients: What this process has of each, by name; None where it has none, though others may.
            likes: For each name, the parameter.
        """
        anywhere = self.any_has([gradient is not None for gradient in gradients.values()])
        found = {}
        for (name, gradient), exists in zip(gradients.items(), anywhere, strict=True):
            if exists:
                own = torch.zeros_like(local(likes[name])) if gradient is None else local(gradient).clone()
                found[name] = gather(self.mean(own), likes[name])
        return found

    def check_agreed(self, what: dict[str, Any], remedy: str) -> None:
        """Require that all processes have the same items in ``what``.

        Raises:
            TrainerError: Naming the first item that differs; on every process.
        """
        if self.group is None:
            return
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, {name: repr(value) for name, value in what.items()}, group=self.group)
        names = dict.fromkeys(name for items in found for name in items)
        for name in names:
            values = [items.get(name, "nothing") for items in found]
            if len(set(values)) > 1:
                other = next(rank for rank, value in enumerate(values) if value != values[0])
                raise TrainerError(
                    f"the processes do not train the same model in the same way: {name} is {values[0]} on rank 0, but "
                    f"{values[other]} on rank {other}: {remedy}"
                )

    def fail_together(self, error: Exception | None, what: str) -> None:
        """Raise ``error``, and a TrainerError on the other processes; nothing where no process has one.

        Args:
            error: What went wrong in this process.
            what: What all processes are doing.
        """
        failed = self.any_has([error is not None])[0]
        if error is not None:
            raise error
        if failed:
            raise TrainerError(f"{what} failed on another process, whose error says why: nothing was changed on any")

    def differing(self, tensors: Sequence[Tensor]) -> list[int]:
        """Which of ``tensors`` are not the same on all processes, by their index."""
        if self.group is None or not tensors:
            return []
        own = torch.stack([fingerprint(tensor) for tensor in tensors]).to(self.device)
        extremes = torch.stack([own, ~own])  # the largest, and the complement of the smallest
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        return [index for index, agreed in enumerate((extremes[0] == ~extremes[1]).tolist()) if not agreed]

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite what differs from the first process's ``tensors``."""
        for index in self.differing(tensors):
            whole = tensors[index].contiguous()
            dist.broadcast(whole.view(torch.uint8), group_src=0, group=self.group)
            tensors[index].copy_(whole)

    def check_same_masks(self, names: Sequence[str], masks: Sequence[Tensor]) -> None:
        """Require equal masks on all processes.

        Raises:
            InvariantError: Naming those that differ; on every process.
        """
        if differing := self.differing(masks):
            raise InvariantError(
                f"the masks of {', '.join(names[index] for index in differing[:5])} differ between processes: "
                "something changed weights or masks on some of them only; resume all from one checkpoint"
            )


def processes_of(model: nn.Module) -> Processes:
    """The processes that train ``model``: those of its wrapper, else all that torch.distributed knows.

    Example:
        >>> processes_of(nn.Linear(3, 2)).group is None
        True
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Processes()
    handles = sparse_weights(model)
    device = handles[0].mask.device if handles else torch.device("cpu")
    wrappers = _data_parallel(model)
    meshes = [handle.weight.device_mesh for handle in handles if is_sharded(handle.weight)]
    group = dist.group.WORLD
    if wrappers:
        group = wrappers[0].process_group
    elif meshes and meshes[0].ndim == 1:
        group = meshes[0].get_group()
    if dist.get_world_size(group) == 1:
        return Processes(device=device)
    return Processes(group=group, averages=not meshes, device=device)


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit hash of the tensor's bytes, as a tensor without dimensions on its device.

    Example:
        >>> masks = torch.tensor([[True, False], [False, True]])
        >>> int(fingerprint(masks[0])) == int(fingerprint(masks[1]))
        False
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    words = nn.functional.pad(data, (0, -data.numel() % 8)).view(torch.int64)
    # Each word and its position are mixed as in SplitMix64, so that the sum tells even single moved entries.
    mixed = torch.arange(1, words.numel() + 1, device=words.device).mul_(-0x61C8864680B583EB).add_(words)
    for factor, shift in ((-0x40A7B892E31B1A47, 30), (-0x6B2FB644ECCEEE15, 27), (1, 31)):
        mixed.bitwise_xor_(mixed >> shift).mul_(factor)
    return mixed.sum()


def gather(own: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each process holds its ``own`` part, spread as ``like`` is.

    Example:
        >>> gather(torch.ones(2), torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    whole = as_shard(own, like)
    return whole.full_tensor() if is_sharded(whole) else whole


def gathered(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """A state with whole tensors on the CPU for those that are spread over processes; all of them must take part.

    Args:
        state: Tensors by name; what is not spread is passed on as it is. What has two names is gathered once.
        keep: Whether this process needs the state; the others get an empty one.

    Example:
        >>> gathered({"weight": torch.ones(2)}, keep=True)
        {'weight': tensor([1., 1.])}
    """
    whole: dict[int, Tensor] = {}
    result: dict[str, Any] = {}
    for name, value in state.items():
        if is_sharded(value) and id(value) not in whole:
            full = value.full_tensor().detach()
            whole[id(value)] = full.cpu() if keep else full.new_empty(0)
        if keep:
            result[name] = whole.get(id(value), value)
    return result


def ignore_masks(module: nn.Module) -> None:
    """Keep DistributedDataParallel from sending the masks below ``module`` at every forward.

    ``sparsify`` does so for the model it is given. Needed where another module, or a copy of a GraphModule, is what
    will be wrapped.

    Args:
        module: What will be passed to DistributedDataParallel.

    Example:
        >>> from srigl_fx import sparsify
        >>> whole = nn.ModuleDict({"model": sparsify(nn.Sequential(nn.Linear(8, 4)), sparsity=0.5)})
        >>> ignore_masks(whole)
    """
    names = [handle.mask_fqn for handle in sparse_weights(module)]
    names += [f"_orig_mod.{name}" for name in names]  # as they are called where torch.compile comes before DDP
    setattr(module, _IGNORED, [*dict.fromkeys([*getattr(module, _IGNORED, ()), *names])])


def forget_masks(module: nn.Module) -> None:
    """Undo :func:`ignore_masks`, before the masks below ``module`` are removed.

    Example:
        >>> forget_masks(nn.Linear(3, 2))
    """
    if _IGNORED not in module.__dict__:
        return
    names = {handle.mask_fqn for handle in sparse_weights(module)}
    ignored = module.__dict__.pop(_IGNORED)
    if kept := [name for name in ignored if name.removeprefix("_orig_mod.") not in names]:
        setattr(module, _IGNORED, kept)


def check_unwrapped(model: nn.Module, verb: str) -> None:
    """Require that ``model`` is not wrapped for several processes.

    Raises:
        SparsifyError: It is; the message names the right order.

    Example:
        >>> check_unwrapped(nn.Linear(3, 2), "sparsify")
    """
    making = verb in ("sparsify", "prune")
    if _data_parallel(model) and making:
        raise SparsifyError(
            f"the model is in DistributedDataParallel already: {verb} its .module, and wrap that anew; the order is "
            f"{_DDP_ORDER}"
        )
    if is_flattened(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        raise SparsifyError(
            f"the weights are sharded over processes already; the order is {_FSDP_ORDER}"
            if making
            else f"{verb} cannot work on weights that are sharded over processes: load the full state_dict "
            "(torch.distributed.checkpoint.state_dict) into a sparsified model that is not sharded"
        )


def check_wrapping(model: nn.Module, weights: Iterable[SparseWeight]) -> None:
    """Require that a trainer can follow the way ``model`` is wrapped.

    Raises:
        TrainerError: It was wrapped in the wrong order, or in what masks cannot follow.

    Example:
        >>> check_wrapping(nn.Linear(3, 2), [])
    """
    for wrapper in _data_parallel(model):
        if not wrapper.broadcast_buffers:
            continue
        sent = [handle.mask_fqn for handle in sparse_weights(wrapper.module)]
        if missing := [name for name in sent if name not in wrapper.parameters_to_ignore]:
            raise TrainerError(
                f"DistributedDataParallel would send {missing[0]} with every forward, because it was wrapped before "
                f"the masks were there or around more than what was sparsified; the order is {_DDP_ORDER}, and where "
                "another module than the sparsified one is wrapped, call srigl_fx.train.ignore_masks(module) before"
            )
    if is_flattened(model):
        raise TrainerError(
            f"FullyShardedDataParallel flattens the weights that masks belong to; use fully_shard: {_FSDP_ORDER}"
        )
    reshard(model)
    for handle in weights:
        weight = handle.weight
        if not is_sharded(weight):
            continue
        if not _fully_sharded(model):
            raise TrainerError(f"{handle.fqn} is a DTensor, but masks follow those of fully_shard only: {_FSDP_ORDER}")
        held(weight)
        if weight.device != handle.mask.device:
            raise TrainerError(
                f"{handle.fqn} is on {weight.device}, its mask on {handle.mask.device}: fully_shard without CPU offload"
            )


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters back where a forward left whole ones in their place.

    Example:
        >>> reshard(nn.Linear(3, 2))
    """
    for module in _fully_sharded(model):
        module.reshard()


def _data_parallel(model: nn.Module) -> list[DistributedDataParallel]:
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def _fully_sharded(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever has sharded anything has imported it
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel has made single flat tensors of the weights.

    Example:
        >>> is_flattened(nn.Linear(3, 2))
        False
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())
