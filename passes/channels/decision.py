"""Which channels can go: the largest set for which every reader agrees.

Owns the conditions of exactness, and the fixpoint over them. It must not change the graph.

With a contraction y[r] = sum over c of W[r, c] x[c], where some columns c go, what stays must be as before:

1. A column that no row that stays reads (W[r, c] = 0 for all of them) may go, whatever arrives there.
2. A column where the same number v arrives for every input may go: it contributes W[r, c] v, which the bias takes.
3. The same, where zeros beyond a border take its place: no bias can stand for that. Of such columns one stays, a, and
   takes the others' weights: W'[r, a] = W[r, a] + sum over c of W[r, c] v[c] / v[a].
4. A column that does not depend on the input, but varies over positions, may go if what all such columns contribute, a
   constant as large as one sample of y, is no larger than the weights that go with them.
5. In a product q k of two activations, a summed channel may go where one of the factors is zero; and, if a softmax over
   the positions of k follows, also where k is the same at all positions: it adds the same to all scores.
6. A sum, mean or root mean square over channels lets go of zeros alone.
7. A hull (a head, a group) goes exactly if all its members go.
8. What is left of any value is an array, and not empty.

All groups begin as gone, but for the pinned ones; each condition takes back those that break it, until none does. No
condition lets anything go again, so that this ends.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.coupling import FIXED, Groups, distinct, kept_shape, surplus
from srigl_fx.passes.channels.flow import Flow, Pairing, Reading, Site
from srigl_fx.passes.channels.shapes import shape_of
from srigl_fx.passes.constness import Constant
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import Program, arguments, tensor_at


@dataclass
class Columns:
    """What arrives at the columns of a contraction: each a tensor (groups, columns).

    Attributes:
        fixed: Whether the channel does not depend on any input.
        uniform: Whether it is one number all over.
        value: That number, where it is fixed and uniform.
    """

    fixed: Tensor
    uniform: Tensor
    value: Tensor


@dataclass
class Fold:
    """How the constant channels that a contraction loses are made up for.

    Attributes:
        bias: (groups, columns) bool; what their uniform values contribute goes into the bias.
        carried: (groups, columns) bool; the columns are added, scaled, to the one of a constant channel that stays.
        carrier: (groups,), that channel; -1 where there is none.
        mapped: (groups, columns) bool; what they contribute is a constant that is added.
    """

    bias: Tensor
    carried: Tensor
    carrier: Tensor
    mapped: Tensor


def known_of(node: fx.Node, known: dict[fx.Node, Constant]) -> Constant | None:
    """What is known of a node, with axes of size 1 for those that depend on the batch."""
    constant = known.get(node)
    if constant is None:
        return None
    fixed, value = constant.fixed, constant.value
    for axis, size in enumerate(node.meta["val"].shape):
        if not isinstance(size, int):
            fixed, value = fixed.unsqueeze(axis), value.unsqueeze(axis)
    return Constant(fixed=fixed, value=value)


def columns_of(site: Site | Reading, data: fx.Node, shape: torch.Size, known: dict[fx.Node, Constant]) -> Columns:
    """What arrives along the channel axis of ``data``, in the shape of the columns."""
    constant = known_of(data, known)
    if constant is None:
        nothing = torch.zeros(shape, dtype=torch.bool)
        return Columns(nothing, nothing, nothing.double())
    channels = math.prod(shape)
    fixed, value = (t.movedim(site.axis, 0).reshape(channels, -1) for t in (constant.fixed, constant.value))
    first = value.double().mean(1, keepdim=True)
    all_fixed = fixed.all(1)
    return Columns(
        all_fixed.reshape(shape), (all_fixed & even(value, first).all(1)).reshape(shape), first.reshape(shape)
    )


def even(value: Tensor, reference: Tensor) -> Tensor:
    """Where a value is the reference, up to the rounding of kernels that treat equal positions differently."""
    precision = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
    return (value.double() - reference).abs() <= 16 * precision * reference.abs()


def has_borders(site: Site) -> bool:
    """Whether a uniform channel may contribute differently at the borders of the result."""
    family = operator_of(site.node.target).family
    if family == "transposed convolution":
        return True
    if family != "convolution":
        return False
    padding = arguments(site.node)["padding"]
    return padding != "valid" and (isinstance(padding, str) or any(padding))


class RemovalDecision:
    """The state of the decision: which coupling groups are removed, and why the others are not."""

    def __init__(self, program: Program, flow: Flow, groups: Groups, known: dict[fx.Node, Constant]) -> None:
        self.flow, self.groups, self.known = flow, groups, known
        self.removed = ~groups.pinned
        self.reason = dict(groups.reason)
        self._reading = [s for s in flow.sites if s.data is not None and not s.coupled]
        self._columns = {s.node: columns_of(s, s.data, s.columns.shape, known) for s in self._reading if s.data}
        self._nonzero = {
            s.node: s.matrix(tensor_at(program.module, str(s.weight.target)).detach().ne(0)).any(-1)
            for s in self._reading
        }
        self._exact = [self._pairing(pairing) for pairing in flow.pairings]
        self._values = _distinct(flow, groups)
        # The elements of weights that go with a group.
        self._worth = torch.zeros(groups.count, dtype=torch.long)
        for site in flow.sites:
            for labels in (site.rows, site.columns):
                each = torch.full((labels.numel(),), site.weight.meta["val"].numel() // labels.numel())
                self._worth.index_add_(0, groups.of(labels).reshape(-1), each)

    # -- questions ------------------------------------------------------------------------------------------------

    def gone(self, labels: Tensor) -> Tensor:
        """Which elements of an array of labels are removed."""
        return self.removed[self.groups.of(labels)]

    def arriving(self, site: Site) -> Columns:
        """What arrives at the columns of a contraction."""
        return self._columns[site.node]

    def fold(self, site: Site) -> Fold:
        """How a contraction makes up for the constant channels it loses."""
        # Rule 1 needs nothing; nor does zero, whatever its weights are.
        columns, gone = self._columns[site.node], self.gone(site.columns)
        lost = gone & self._used(site) & ~(columns.uniform & (columns.value == 0))
        uniform = lost & columns.uniform
        borders = has_borders(site)
        carrier = torch.full((len(gone),), -1)
        if borders:
            for group in uniform.any(1).nonzero().flatten().tolist():
                carrier[group] = self._carrier(columns, ~gone, group)
        return Fold(
            bias=uniform & (not borders),  # rule 2
            carried=uniform & borders,  # rule 3
            carrier=carrier,
            mapped=lost & ~columns.uniform,
        )

    # -- the fixpoint ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take back what must stay until nothing does any more."""
        while True:
            before = int(self.removed.sum())
            for site in reversed(self._reading):  # from the end: what a late layer keeps, early ones must make
                self._check_site(site)
            for pairing, exact in zip(self.flow.pairings, self._exact, strict=True):
                self._check_pairing(pairing, exact)
            for reading in self.flow.readings:
                self._check_reading(reading)
            for whole, members in self.flow.hulls:
                self._check_hull(whole, members)
            if before == int(self.removed.sum()):
                # Only what all readers agree on competes for a place in a rectangular array.
                for labels, name in self._values:
                    self._check_shape(labels, name)
            if before == int(self.removed.sum()):
                return

    def keep(self, numbers: Tensor, reason: str) -> None:
        """Take groups back, and remember why."""
        numbers = distinct(numbers[self.removed[numbers]])
        self.removed[numbers] = False
        for number in numbers.tolist():
            self.reason.setdefault(number, reason)

    def _keep_where(self, labels: Tensor, where: Tensor, reason: str) -> None:
        if bool(where.any()):
            self.keep(self.groups.of(labels)[where], reason)

    def _used(self, site: Site) -> Tensor:
        """(groups, columns) bool: which columns a row that stays reads."""
        rows = ~self.gone(site.rows)
        return (self._nonzero[site.node] & rows[:, :, None]).any(1)

    def _check_site(self, site: Site) -> None:
        columns, name = self._columns[site.node], str(site.weight.target)
        gone = self.gone(site.columns)
        if not bool(gone.any()):
            return
        used = gone & self._used(site)  # rule 1: all others may go
        reason = f"they are added to, or multiplied with, channels that are live, before {name} reads them"
        self._keep_where(site.columns, used & ~columns.fixed, f"{reason} (a residual stream, say)")
        lost = used & columns.fixed & self.gone(site.columns)  # rules 2 to 4: what is not fixed is back already
        if not bool(lost.any()):
            return
        mapped = lost & ~columns.uniform
        if bool(mapped.any()):  # rule 4
            size = math.prod(size for size in site.node.meta["val"].shape if isinstance(size, int))
            if size > int(self._worth[distinct(self.groups.of(site.columns)[mapped])].sum()):
                reason = f"a constant that is not uniform, and the map to add after {name} is larger than what it saves"
                self._keep_where(site.columns, mapped, reason)
        if has_borders(site):  # rule 3: is there one that stays, and is large enough to divide by?
            uneven = lost & columns.uniform & (columns.value != 0)
            for group in uneven.any(1).nonzero().flatten().tolist():
                best = self._carrier(columns, uneven, group)
                kept = ~self.gone(site.columns) & (columns.value.abs() > 0.01 * columns.value[group, best].abs())
                if self._carrier(columns, kept, group) < 0:
                    number = self.groups.of(site.columns[group, best])[None]
                    self.keep(number, f"carries the constant channels that {name} reads beyond its borders")

    @staticmethod
    def _carrier(columns: Columns, among: Tensor, group: int) -> int:
        """The column with the largest uniform constant among those given; -1 if there is none."""
        value = torch.where(among[group] & columns.uniform[group], columns.value[group].abs(), 0)
        best = int(value.argmax())
        return best if value[best] > 0 else -1

    def _pairing(self, pairing: Pairing) -> Tensor:
        """Rule 5: (groups,) bool; which summed channels contribute nothing, or the same to all that is compared."""
        sides = []
        for node, axis in ((pairing.left, pairing.left_axis), (pairing.right, pairing.right_axis)):
            free = -1 if axis == -2 else -2
            labels = self.flow.labels[node].expand(shape_of(node)).narrow(free, 0, 1).squeeze(free)
            constant = known_of(node, self.known)
            exact = torch.zeros(labels.shape, dtype=torch.bool)
            if constant is not None:
                shifts = pairing.softmax and node is pairing.right  # queries that are the same do not add the same
                wanted = constant.value.double().mean(free, keepdim=True) if shifts else torch.zeros(())
                exact = (constant.fixed & even(constant.value, wanted)).all(free).expand(labels.shape)
            # A group is exact on this side if it is so wherever it occurs there.
            side = torch.ones(self.groups.count, dtype=torch.bool)
            side[self.groups.of(labels)[~exact]] = False
            sides.append(side)
        return sides[0] | sides[1]

    def _check_pairing(self, pairing: Pairing, exact: Tensor) -> None:
        rows = pairing.members[~self.gone(pairing.whole)]
        needed = ~exact[self.groups.of(rows)]
        self._keep_where(rows, needed, f"multiplied with what varies in {pairing.node.name}")

    def _check_reading(self, reading: Reading) -> None:
        labels = self.flow.labels[reading.data]
        labels = labels.expand(shape_of(reading.data)) if labels.numel() == 1 else labels
        # Rule 6.
        columns = columns_of(reading, reading.data, torch.Size([shape_of(reading.data)[reading.axis]]), self.known)
        zero = columns.uniform & (columns.value == 0)
        self._keep_where(
            labels.reshape(-1), self.gone(labels.reshape(-1)) & ~zero, f"summed over, in {reading.node.name}"
        )

    def _check_hull(self, whole: Tensor, members: Tensor) -> None:
        # Rule 7, in both directions: where the whole stays, its first member comes back.
        inner = self.gone(members).all(1)
        self._keep_where(whole, self.gone(whole) & ~inner, "part of it stays")
        empty = ~self.gone(whole) & inner
        if bool(empty.any()):
            self.keep(self.groups.of(members[empty][:, 0]), "the last one of a group that stays")

    def _check_shape(self, labels: Tensor, name: str) -> None:
        # Rule 8.
        kept = ~self.gone(labels)
        if not bool(kept.any()):
            self.keep(self.groups.of(labels).flatten()[:1], f"the last channel of {name}")
        elif kept_shape(kept) is None:
            self._keep_where(labels, surplus(kept), f"unequal numbers along an axis of {name}")


def _distinct(flow: Flow, groups: Groups) -> list[tuple[Tensor, str]]:
    """The different arrays of groups among all values, with the name of a node that has it."""
    seen: dict[int, tuple[Tensor, str]] = {}
    arrays = [(labels, node.name) for node, found in flow.labels.items() for labels in pytree.tree_leaves(found)]
    for site in flow.sites:
        arrays += [(site.rows, site.node.name), (site.columns, site.node.name)]
    for labels, name in arrays:
        if isinstance(labels, Tensor) and bool((labels != FIXED).any()):
            key = hash((labels.shape, groups.of(labels).numpy().tobytes()))
            seen.setdefault(key, (labels, name))
    return list(seen.values())


def count_reasons(decision: RemovalDecision, labels: Tensor) -> Counter[str]:
    """How many of the labels stay, by reason."""
    kept = decision.groups.of(labels)[~decision.gone(labels)]
    return Counter(decision.reason.get(number, "it is live") for number in kept.tolist())
