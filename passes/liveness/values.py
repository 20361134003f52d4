"""What is said of a value's elements: whether they are live, that is, may depend on an input of the model.

Owns that notation, and the record of one operator's call that the rules read. It must not know any operator.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Live = bool | Tensor  # nothing, everything, or a bool tensor that broadcasts to the value's shape


@dataclass(frozen=True)
class Call:
    """One evaluated call of an operator.

    Attributes:
        op: The operator.
        given: Its arguments by name, defaults filled in.
        live: What is live in each argument: of the same structure, a ``Live`` in place of each leaf.
        out: The value or values it returned.
        weighted_mean: The first operand's rows along the last axis are known to sum to one.
    """

    op: torch._ops.OpOverload
    given: dict[str, Any]
    live: dict[str, Any]
    out: Any
    weighted_mean: bool = False

    @property
    def name(self) -> str:
        """The operator's name without namespace and overload."""
        return str(self.op._schema.name).removeprefix("aten::")

    def only(self, *names: str) -> bool:
        """Whether nothing but the arguments called ``names`` is live."""
        return not any(any_live(live) for name, live in self.live.items() if name not in names)


def any_live(live: Any) -> bool:
    """Whether anything in a structure of ``Live`` is live.

    Example:
        >>> any_live([False, None]), any_live([False, torch.tensor([False, True])])
        (False, True)
    """
    return any(leaf is not None and leaf is not False for leaf in pytree.tree_leaves(live))


def simplify(live: Live) -> Live:
    """``live`` in its smallest form: a bool, or of size 1 along the axes where it says the same of all elements.

    Example:
        >>> simplify(torch.ones(2, dtype=torch.bool)), simplify(torch.zeros(2, dtype=torch.bool))
        (True, False)
        >>> simplify(torch.tensor([[True, False], [True, False]])).shape
        torch.Size([1, 2])
    """
    if isinstance(live, bool):
        return live
    for axis, size in enumerate(live.shape):
        first = live.narrow(axis, 0, min(size, 1))
        if size > 1 and bool((live == first).all()):
            live = first
    return live if live.numel() > 1 else bool(live.any())


def spread(live: Live, value: Tensor) -> Tensor:
    """``live`` element by element.

    Example:
        >>> spread(True, torch.zeros(2)).tolist()
        [True, True]
    """
    mask = torch.tensor(live) if isinstance(live, bool) else live
    return mask.expand(value.shape)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure of values.

    Example:
        >>> [tensor.shape for tensor in tensors_in((1, [torch.ones(2)]))]
        [torch.Size([2])]
    """
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
