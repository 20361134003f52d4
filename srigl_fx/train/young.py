"""The weights of one parameter that have grown not long ago, and when.

Owns where they are and the step at which each began. It must not know optimizers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Condensed(NamedTuple):
    """An optimizer's state of one parameter, of some of its weights alone.

    Attributes:
        state: It; tensors of the kept weights are flat.
        positions: Where these are in the flat parameter.
    """

    state: Mapping[str, Any]
    positions: Tensor


@dataclass(eq=False)
class Young:
    """Some weights of a parameter, or of the part of it that this process holds.

    Attributes:
        shape: The parameter's.
        positions: Where they are in the flat parameter, ascending, (n,).
        born: How many steps the parameter had made when each of them grew, (n,).
        products: The products of momenta since then, of an optimizer that has some, (n,).
    """

    shape: torch.Size
    positions: Tensor
    born: Tensor
    products: Tensor
    _places: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    @classmethod
    def born_at(cls, step: float, grown: Tensor) -> "Young":
        """Those where ``grown`` is True.

        Example:
            >>> Young.born_at(7, torch.tensor([[True, False], [False, True]])).positions
            tensor([0, 3])
        """
        positions = grown.reshape(-1).nonzero().squeeze(1)
        # Powers of 0.999 and their differences from 1 need more digits than float32 has, which some devices end at.
        dtype = torch.float32 if grown.device.type == "mps" else torch.float64
        born = torch.full((len(positions),), step, dtype=dtype, device=grown.device)
        return cls(grown.shape, positions, born, torch.ones_like(born))

    @classmethod
    def of_dense(cls, born: Tensor, products: Tensor) -> "Young":
        """Those where ``born``, of the parameter's shape, is not zero."""
        young = cls.born_at(0.0, born != 0)
        return cls(young.shape, young.positions, born[young.index], products[young.index])

    def dense(self) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`of_dense`."""
        born = torch.zeros(self.shape, dtype=self.born.dtype, device=self.born.device)
        products = torch.ones_like(born)
        born[self.index], products[self.index] = self.born, self.products
        return born, products

    @cached_property
    def index(self) -> tuple[Tensor, ...]:
        """Where they are in a tensor of the parameter's shape, however that lies in memory."""
        return tuple(torch.unravel_index(self.positions, self.shape))

    def index_in(self, positions: Tensor) -> Tensor:
        """Where they are among other positions, which hold all of them.

        Example:
            >>> Young.born_at(7, torch.tensor([True, False, False, True])).index_in(torch.tensor([3, 1, 0]))
            tensor([2, 0])
        """
        if self._places is None or self._places[0] is not positions:
            order = positions.argsort()
            self._places = positions, order[torch.searchsorted(positions[order], self.positions)]
        return self._places[1]

    def where(self, chosen: Tensor) -> "Young":
        """Those of them that are chosen, (n,)."""
        return Young(self.shape, self.positions[chosen], self.born[chosen], self.products[chosen])

    def within(self, mask: Tensor) -> "Young":
        """Those of them that are in a mask of the parameter's shape."""
        return self.where(mask[self.index])

    def joined(self, other: "Young") -> "Young":
        """They and others, none of which is among them."""
        positions, order = torch.cat([self.positions, other.positions]).sort()
        born, products = torch.cat([self.born, other.born]), torch.cat([self.products, other.products])
        return Young(self.shape, positions, born[order], products[order])


FindCondensed = Callable[[], Condensed | None]
