"""Neighbouring rows of a block that share their inputs: which ones do, and what becomes one row of theirs.

Owns the one rule by which rows are grouped, and the way from a matrix of rows to one of groups and back. Works on
(n, F) matrices; it must not know what their numbers mean, or how masks change during training.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

GROUP_SIZES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """The rows of one block in groups of ``size`` neighbours, all of which keep the same inputs.

    Rows are counted from the first one of each section (a convolution's groups are such sections), or of the block.
    With ``r`` rows in a section, row ``i`` of it is in group ``i // size``, and the last group has the ``r mod size``
    rows that are left, if there are any. Groups never reach from one section, or one block, into another.

    Each group has one row in a *grouped* matrix (m, F), in the order of the rows. A row that keeps no inputs is
    ablated: it stays in its group, and the others share theirs without it.

    Attributes:
        rows: Rows of the block, n.
        size: Rows of a group; 1 leaves each row by itself, and every matrix as it is.
        section: Rows of the weight that groups stay within; by default all of them.
        start: The block's first row in the weight's matrix view, from which sections are counted.

    Example:
        >>> groups = RowGroups(rows=7, size=4)
        >>> len(groups), groups.index.tolist()
        (2, [0, 0, 0, 0, 1, 1, 1])
        >>> RowGroups(rows=6, size=2, section=3).index.tolist()
        [0, 0, 1, 2, 2, 3]
    """

    rows: int
    size: int = 1
    section: int | None = None
    start: int = 0

    @property
    def single(self) -> bool:
        """Whether each row is by itself, so that no matrix changes on its way to groups and back."""
        return self.size == 1

    @cached_property
    def index(self) -> Tensor:
        """The group of each row, int64 (n,), on the CPU."""
        row = torch.arange(self.start, self.start + self.rows)
        first = torch.zeros_like(row) if self.section is None else row // self.section * self.section
        return ((row - first.clamp(min=self.start)) % self.size == 0).cumsum(0) - 1

    @cached_property
    def sizes(self) -> Tensor:
        """The number of rows of each group, int64 (m,), on the CPU."""
        return self.index.bincount()

    def __len__(self) -> int:
        return len(self.sizes)

    def sum(self, matrix: Tensor) -> Tensor:
        """The sum of each group's rows, float64 (m, F), added up in their order: the same to the bit on every device.

        Example:
            >>> RowGroups(rows=3, size=2).sum(torch.tensor([[1.0, 2.0], [10.0, 20.0], [5.0, 5.0]])).tolist()
            [[11.0, 22.0], [5.0, 5.0]]
        """
        total = matrix.new_zeros(len(self), matrix.shape[1], dtype=torch.float64)
        for groups, rows in self._places(matrix.device):
            total[groups] += matrix[rows]
        return total

    def any(self, mask: Tensor) -> Tensor:
        """What any row of each group keeps, bool (m, F).

        Example:
            >>> RowGroups(rows=2, size=2).any(torch.tensor([[True, False], [False, False]])).tolist()
            [[True, False]]
        """
        if self.single:
            return mask
        kept = mask.new_zeros(len(self), mask.shape[1])
        for groups, rows in self._places(mask.device):
            kept[groups] |= mask[rows]
        return kept

    def expand(self, grouped: Tensor, active: Tensor | None = None) -> Tensor:
        """A mask of groups (m, F) as one of rows (n, F), which is empty where a row is not ``active``.

        Example:
            >>> RowGroups(rows=2, size=2).expand(torch.tensor([[True, False]]), torch.tensor([True, False])).tolist()
            [[True, False], [False, False]]
        """
        if self.single:
            return grouped if active is None else grouped & active[:, None]
        mask = grouped[self.index.to(grouped.device)]
        return mask if active is None else mask & active[:, None]

    def alike(self) -> list[slice | Tensor]:
        """The groups of equally many rows, as indices of grouped rows: the full ones, then those of a rest.

        Example:
            >>> [groups.tolist() for groups in RowGroups(rows=7, size=4).alike()]
            [[0], [1]]
            >>> RowGroups(rows=8, size=4).alike()
            [slice(None, None, None)]
        """
        found = sorted(set(self.sizes.tolist()), reverse=True)
        return [slice(None)] if len(found) == 1 else [(self.sizes == size).nonzero()[:, 0] for size in found]

    def shares(self, budget: int) -> list[tuple[slice | Tensor, int]]:
        """How many inputs the groups of each size may keep between them, of a budget of weights for the whole block.

        Groups of ``s`` rows, ``N`` rows in all, have ``budget * N / n`` of the weights, and an input of such a group is
        ``s`` weights::

            inputs = floor(floor(budget * N / n) / s)

        Example:
            >>> [inputs for _, inputs in RowGroups(rows=7, size=4).shares(24)]
            [3, 3]
        """
        shares: list[tuple[slice | Tensor, int]] = []
        for groups in self.alike():
            sizes = self.sizes[groups]
            shares.append((groups, budget * int(sizes.sum()) // self.rows // int(sizes[0])))
        return shares

    def fault(self, mask: Tensor) -> str:
        """Which rows of a mask (n, F) do not share their inputs as they must, in words; "" if all do.

        Example:
            >>> groups = RowGroups(rows=4, size=2)
            >>> groups.fault(torch.tensor([[True, False], [True, False], [False, True], [False, False]]))
            ''
            >>> groups.fault(torch.tensor([[True, False], [True, False], [False, True], [True, False]]))
            'rows 2-3 share their inputs (group_size=2), but do not keep the same ones'
        """
        if self.single:
            return ""
        index = self.index.to(mask.device)
        counts, most = mask.sum(dim=1), self.any(mask).sum(dim=1)[index]
        broken = index[(counts != 0) & (counts != most)]
        if not len(broken):
            return ""
        first, *_, last = ((self.index == int(broken[0])).nonzero()[:, 0] + self.start).tolist()
        return f"rows {first}-{last} share their inputs (group_size={self.size}), but do not keep the same ones"

    def _places(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each place in a group, the groups that have a row there, and these rows."""
        first = self.sizes.cumsum(0) - self.sizes
        for place in range(int(self.sizes.max())):
            groups = (self.sizes > place).nonzero()[:, 0]
            yield groups.to(device), (first[groups] + place).to(device)
