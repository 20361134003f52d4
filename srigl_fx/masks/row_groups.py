"""Neighbouring rows of a block that share their inputs: which ones do, and what becomes one row of theirs.

Owns the one rule by which rows are grouped, by which inputs are kept together or not at all, and the way from a matrix
of rows to one of groups and back. Works on (n, F) matrices; it must not know what their numbers mean, or how masks
change during training.
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

    With a ``width`` c above 1, inputs q c to q c + c - 1 are one column q of a grouped matrix (m, F / c): a group of s
    rows keeps all s c weights of such a tile, or none.

    Attributes:
        rows: Rows of the block, n.
        size: Rows of a group; 1 leaves each row by itself, and every matrix as it is.
        section: Rows of the weight that groups stay within; by default all of them.
        start: The block's first row in the weight's matrix view, from which sections are counted.
        width: Neighbouring inputs that are kept together or not at all; the inputs must be a multiple of it.

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
    width: int = 1

    @property
    def single(self) -> bool:
        """Whether each row and input is by itself, so that no matrix changes on its way to groups and back."""
        return self.size == self.width == 1

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
        """The sum of each group's rows, float64 (m, F / width): the same to the bit on every device.

        Rows are added up in their order, then the inputs that belong together in theirs.

        Example:
            >>> matrix = torch.tensor([[1.0, 2.0], [10.0, 20.0], [5.0, 5.0]])
            >>> RowGroups(rows=3, size=2).sum(matrix).tolist()
            [[11.0, 22.0], [5.0, 5.0]]
            >>> RowGroups(rows=3, size=2, width=2).sum(matrix).tolist()
            [[33.0], [10.0]]
        """
        total = self._sum_of_rows(matrix)
        for place in range(1, self.width):
            total[:, :: self.width] += total[:, place :: self.width]
        return total[:, :: self.width].contiguous()

    def count(self, rows: Tensor) -> Tensor:
        """How many of some rows, bool (n,), each group has: float64 (m,).

        Example:
            >>> RowGroups(rows=3, size=2).count(torch.tensor([True, True, False])).tolist()
            [2.0, 0.0]
        """
        return self._sum_of_rows(rows[:, None])[:, 0]

    def _sum_of_rows(self, matrix: Tensor) -> Tensor:
        total = matrix.new_zeros(len(self), matrix.shape[1], dtype=torch.float64)
        for groups, rows in self._places(matrix.device):
            total[groups] += matrix[rows]
        return total

    def any(self, mask: Tensor) -> Tensor:
        """What any row of each group keeps, bool (m, F / width).

        Example:
            >>> RowGroups(rows=2, size=2).any(torch.tensor([[True, False], [False, False]])).tolist()
            [[True, False]]
        """
        if self.single:
            return mask
        kept = mask.new_zeros(len(self), mask.shape[1])
        for groups, rows in self._places(mask.device):
            kept[groups] |= mask[rows]
        return kept if self.width == 1 else kept.reshape(len(kept), -1, self.width).any(dim=2)

    def expand(self, grouped: Tensor, active: Tensor | None = None) -> Tensor:
        """A mask of groups (m, F / width) as one of rows (n, F), which is empty where a row is not ``active``.

        Example:
            >>> RowGroups(rows=2, size=2).expand(torch.tensor([[True, False]]), torch.tensor([True, False])).tolist()
            [[True, False], [False, False]]
        """
        if self.single:
            return grouped if active is None else grouped & active[:, None]
        wide = grouped if self.width == 1 else grouped.repeat_interleave(self.width, dim=1)
        mask = wide[self.index.to(grouped.device)]
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
        ``s`` weights, or ``s * width`` where so many inputs are one::

            inputs = floor(floor(budget * N / n) / (s * width))

        Example:
            >>> [inputs for _, inputs in RowGroups(rows=7, size=4).shares(24)]
            [3, 3]
        """
        shares: list[tuple[slice | Tensor, int]] = []
        for groups in self.alike():
            sizes = self.sizes[groups]
            shares.append((groups, budget * int(sizes.sum()) // self.rows // (int(sizes[0]) * self.width)))
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
        if mask.shape[1] % self.width:
            return f"{mask.shape[1]} inputs are no whole blocks of {self.width} (block_width={self.width})"
        if self.width > 1:
            return self._broken_tile(mask)
        index = self.index.to(mask.device)
        counts, most = mask.sum(dim=1), self.any(mask).sum(dim=1)[index]
        broken = index[(counts != 0) & (counts != most)]
        if not len(broken):
            return ""
        first, *_, last = ((self.index == int(broken[0])).nonzero()[:, 0] + self.start).tolist()
        return f"rows {first}-{last} share their inputs (group_size={self.size}), but do not keep the same ones"

    def _broken_tile(self, mask: Tensor) -> str:
        """Which tile of rows and inputs is neither kept nor empty, in words."""
        broken = (mask != self.expand(self.any(mask))).nonzero()
        if not len(broken):
            return ""
        row, column = broken[0].tolist()
        rows = ((self.index == self.index[row]).nonzero()[:, 0] + self.start).tolist()
        first = column // self.width * self.width
        return (
            f"rows {rows[0]}-{rows[-1]} and inputs {first}-{first + self.width - 1} are one block (group_size="
            f"{self.size}, block_width={self.width}), but only some of its weights are kept"
        )

    def _places(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """For each place in a group, the groups that have a row there, and these rows."""
        first = self.sizes.cumsum(0) - self.sizes
        for place in range(int(self.sizes.max())):
            groups = (self.sizes > place).nonzero()[:, 0]
            yield groups.to(device), (first[groups] + place).to(device)
