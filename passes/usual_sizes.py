"""Which sizes are tried where nobody says which are to be free: the batch, and the lengths of tokens.

Owns which axes count tokens, and what is done where a model ties them. It must not know how a single size is found to
be free.

1. The leading size that the first tensor has is taken for the batch. An integer input of two axes with that leading
   size holds tokens along its second axis, if there are at least two.
2. So does any other input of two axes that is as long, with that leading size or one of 1: a mask, positions, types.
3. The model itself is run with fewer tokens before anything is captured. Where it does not run, the line that fails
   says why, and nothing else is tried. Floats may be as many by chance: the others are tried alone, too.
4. What is captured then is taken only if every batch that was to be free is so, without limits; else the batch alone is
   tried, as for all other models. What ties the tokens is told.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.errors import LoweringError
from srigl_fx.passes.asked_sizes import Wishes, wishes
from srigl_fx.passes.capture import Capture, batched_leaves, capture_whole
from srigl_fx.passes.capture_checks import first_line, raised_by
from srigl_fx.passes.capture_sizes import capture_with
from srigl_fx.passes.hugging_face import register_caches
from srigl_fx.passes.model_runs import run_steps
from srigl_fx.passes.sizes import ANY, FixedSize, resize

TOKENS = 1  # the axis


def capture_usual(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Capture ``model`` with the batch free, and the lengths of tokens where the model allows it.

    Raises:
        CaptureError: The model is in training mode, or does not run on the inputs.
    """
    register_caches(model, pytree.tree_leaves((args, kwargs)))
    lengths = token_lengths(pytree.tree_leaves((args, kwargs)))
    every = _every(model, args, kwargs) if lengths else None
    if every is None:
        return capture_whole(model, args, kwargs)
    asking = _Asking(model, args, kwargs, every, lengths)
    found = asking.captured()
    if found is not None:
        return found
    usual = capture_whole(model, args, kwargs)
    if usual.program is None:
        return usual
    fixed = tuple(asking.fixed[leaf] for leaf in sorted(asking.fixed))
    return replace(usual, program=replace(usual.program, sizes=replace(usual.program.sizes, fixed=fixed)))


def token_lengths(leaves: list[Any]) -> dict[int, int]:
    """Rules 1 and 2: the leaves that have an axis of tokens, each with their number.

    Example:
        >>> ids, mask = torch.ones(2, 7, dtype=torch.long), torch.ones(2, 7)
        >>> token_lengths([ids, mask, torch.ones(2, 5), torch.ones(2, dtype=torch.long)])
        {0: 7, 1: 7}
    """
    shared = batched_leaves(leaves)
    flat = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() == 2}
    ids = {i: int(leaf.shape[1]) for i, leaf in flat.items() if shared[i] and leaf.shape[1] > 1 and _holds_ids(leaf)}
    alike = {i for i, leaf in flat.items() if (shared[i] or leaf.shape[0] == 1) and leaf.shape[1] in ids.values()}
    return {i: int(flat[i].shape[1]) for i in sorted({*ids, *alike})}


def _holds_ids(leaf: Tensor) -> bool:
    return not (leaf.is_floating_point() or leaf.is_complex() or leaf.dtype is torch.bool)


def _every(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Wishes | None:
    """All sizes of the inputs; None where these are not arguments of the model, which its call says best."""
    try:
        return wishes(model, args, kwargs, "auto")
    except TypeError:
        return None


class _Asking:
    """The attempt with the tokens of one model."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        every: Wishes,
        lengths: Mapping[int, int],
    ) -> None:
        self.model, self.args, self.kwargs, self.every = model, args, kwargs, every
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.lengths = lengths
        self.fixed: dict[int, FixedSize] = {}

    def captured(self) -> Capture | None:
        """Rules 3 and 4: the model captured with tokens free; None where it is to be captured without."""
        free = self._runs()
        if not free:
            return None
        axes = {
            leaf: {
                axis: wish
                for axis, wish in own.items()
                if (axis == 0 and self._batched[leaf]) or (axis == TOKENS and leaf in free)
            }
            for leaf, own in self.every.axes.items()
        }
        asked = replace(self.every, axes={leaf: own for leaf, own in axes.items() if own})
        try:
            found = capture_with(self.model, self.args, self.kwargs, asked)
        except LoweringError as error:
            self._fix(free, str(error))
            return None
        if found.program is None:
            self._fix(free, found.failures[0].error if found.failures else "no graph has it free")
            return None
        sizes = found.program.sizes
        told = {one.axis: one.reason for one in sizes.fixed}
        for leaf in free:
            if TOKENS not in sizes.axes[leaf]:
                self._fix([leaf], told.get(self._place(leaf), "torch.export needs it to be this number"))
        if any(0 in own and 0 not in sizes.axes[leaf] for leaf, own in asked.axes.items()):
            self._fix(free, "the batch is free only where the number of tokens is not")
            return None
        if any(sizes.limits.get(name, ANY) != ANY for name in sizes.batch):
            self._fix(free, "the forward decides by the size of the batch")
            return None
        fixed = tuple(
            {**{one.axis: one for one in self.fixed.values()}, **{one.axis: one for one in sizes.fixed}}.values()
        )
        return replace(found, program=replace(found.program, sizes=replace(sizes, fixed=fixed)))

    @property
    def _batched(self) -> list[bool]:
        return batched_leaves(self.leaves)

    def _place(self, leaf: int) -> str:
        return f"{self.every.paths[leaf]} axis {TOKENS}"

    def _fix(self, leaves: Iterable[int], reason: str) -> None:
        for leaf in leaves:
            self.fixed.setdefault(leaf, FixedSize(axis=self._place(leaf), size=self.lengths[leaf], reason=reason))

    def _runs(self) -> list[int]:
        """Rule 3: the leaves whose tokens may be fewer or more, as far as the model itself says."""
        free: list[int] = []
        for number in dict.fromkeys(self.lengths.values()):
            members = [leaf for leaf, length in self.lengths.items() if length == number]
            ids = [leaf for leaf in members if not self.leaves[leaf].is_floating_point()]
            problem = self._problem(members, number)
            if problem and len(ids) < len(members) and not self._problem(ids, number):
                members, problem = ids, ""
            if problem:
                self._fix(members, problem)
            else:
                free += members
        return sorted(free)

    def _problem(self, members: list[int], number: int) -> str:
        """Why the model runs with no other number of these; "" where it does."""
        problem = ""
        for other in dict.fromkeys((number // 2, number - 1, number * 2)):
            changed = list(self.leaves)
            for leaf in members:
                changed[leaf] = resize(changed[leaf], other, TOKENS)
            try:
                args, kwargs = pytree.tree_unflatten(changed, self.spec)
                run_steps(self.model, args, kwargs, 1)
            except Exception as error:  # the model's own code: any type
                problem = problem or raised_by(error) + first_line(error)
            else:
                return ""
        return problem
