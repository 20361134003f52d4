"""Which channels of a graph can change places, and what must follow where they do.

Owns :class:`Exchange`: sets of channels whose order is free, and the axes of tensors along which they lie. It must not
know which order is wanted, masks, or values of weights.

A neuron's place is free where nothing but contractions with constant weights, operators element by element and sums
over all channels see it: hidden units of an MLP, channels between convolutions. In the terms of
:mod:`srigl_fx.passes.channels.flow`, coupling groups of labels can change places if

1. none of them is pinned: no output of the model, no operator that is not known, nothing that counts them reads them;
2. none belongs to a head or to a group of a convolution, and no product of activations is summed over them: within a
   head they could, across heads they could not, and neither is needed here;
3. no value has them along several axes at once;
4. each occurs as often as each other one in every value of the graph: what is cut, split or put together apart does not
   change places across the cut;
5. every tensor that has them along an axis is the model's own, is read in no other way, and by all its readers in the
   same order;
6. there are two of them at least.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.passes.channels.coupling import FIXED, Groups, compress, distinct
from srigl_fx.passes.channels.flow import Flow, Site
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import Program, attribute_at


@dataclass(frozen=True, eq=False)
class AxisNumbers:
    """A tensor of the model, and the coupling group of each index along one of its axes."""

    tensor: Tensor
    axis: int
    numbers: Tensor


@dataclass(frozen=True, eq=False)
class FreeChannels:
    """Channels that can change places with one another.

    Attributes:
        numbers: Their coupling groups, int64 (n,), in the order in which they lie now.
        axes: Every tensor and axis along which they lie.
        rows: The sites whose rows they are; of each the graph's target of its weight, and the coupling group of each of
            its rows.
    """

    numbers: Tensor
    axes: tuple[AxisNumbers, ...]
    rows: tuple[tuple[Site, Tensor], ...]

    def index(self, one: AxisNumbers, order: Tensor) -> Tensor:
        """The index by which an axis is selected anew, so that channel ``order[i]`` comes to the i-th place.

        Where a channel lies at several places of an axis (a flattened one), its first comes to the other's first, its
        second to the second, and so on.

        Args:
            one: An axis.
            order: A permutation of 0 to n - 1.
        """
        places = one.numbers.argsort(stable=True)
        ranked = one.numbers[places]
        moved = ranked.clone()
        position = torch.full((int(max(ranked.max(), self.numbers.max())) + 1,), -1)
        position[self.numbers] = torch.arange(len(self.numbers))
        ours = position[ranked] >= 0
        moved[ours] = self.numbers[order[position[ranked[ours]]]]
        first = torch.searchsorted(ranked, ranked)
        rank = torch.arange(len(ranked)) - first
        index = torch.empty_like(places)
        index[places] = places[torch.searchsorted(ranked, moved) + rank]
        return index


@dataclass
class Exchange:
    """What can change places, and why other rows cannot.

    Attributes:
        free: Sets of channels, in the graph's order.
        kept: Why the rows of a weight stay where they are, by the weight's target.
    """

    free: list[FreeChannels] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


def find_exchanges(program: Program, flow: Flow) -> Exchange:
    """Find all free channels of a graph whose labels are known."""
    return _Finder(program, flow).run()


class _Finder:
    def __init__(self, program: Program, flow: Flow) -> None:
        self.program, self.flow = program, flow
        own = [*program.model.parameters(), *program.model.buffers()]
        self.own = {id(tensor) for tensor in own}
        self.readers = Counter(str(node.target) for node in program.module.graph.find_nodes(op="get_attr"))
        self.accounted: Counter[str] = Counter()
        self.found: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        self.tensors: dict[int, Tensor] = {}
        self.refused: dict[int, str] = {}
        self.groups: Groups

    def run(self) -> Exchange:
        self._couple_shared()
        self.groups = self.flow.channels.resolve()
        for number in self.groups.pinned.nonzero()[:, 0].tolist():  # rule 1
            self.refused[number] = self.groups.reason.get(number, "it is fixed")
        for whole, members in self.flow.hulls:  # rule 2
            self._refuse(whole, "it belongs to a head, or to a group of a convolution")
            self._refuse(members, "it belongs to a head, or to a group of a convolution")
        for pairing in self.flow.pairings:
            self._refuse(pairing.members, "a product of activations is summed over it")
        for reading in self.flow.readings:
            if operator_of(reading.node.target).family == "rms norm":  # its gain has no labels
                self._refuse(self.flow.labels[reading.data], f"{reading.node.name} reads it")
        self._tensors()
        signature = self._signatures()
        return self._sets(signature)

    def _couple_shared(self) -> None:
        """Rule 5: a constant that several operators combine with channels has one order for all of them."""
        first: dict[str, Tensor] = {}
        for constant, _, labels in self.flow.adopted:
            if constant.op != "get_attr":
                continue
            shape = tuple(constant.meta["val"].shape)
            own = _of_constant(labels, shape)
            other = first.setdefault(str(constant.target), own)
            if other is not own:
                self.flow.channels.couple(other, own)

    def _refuse(self, labels: object, reason: str) -> None:
        for one in pytree.tree_leaves(labels):
            if isinstance(one, Tensor):
                for number in distinct(self.groups.of(one).flatten()).tolist():
                    self.refused.setdefault(number, reason)

    def _tensors(self) -> None:
        """The axes of all tensors along which channels lie."""
        for site in self.flow.sites:
            groups = len(site.rows)
            rows, columns = self.groups.of(site.rows).flatten(), self.groups.of(site.columns).flatten()
            if site.coupled:
                self._axis(site.weight, 0, rows)
            elif groups == 1:
                first = site.layout == "rows first"
                self._axis(site.weight, 0 if first else 1, rows)
                self._axis(site.weight, 1 if first else 0, columns)
            else:  # rule 2 has refused them
                self._axis(site.weight, 0, torch.empty(0, dtype=torch.long))
            self.accounted[str(site.weight.target)] += 1
            if site.bias is not None:
                self.accounted[str(site.bias.target)] += 1
                self._axis(site.bias, 0, rows)
        for constant, _, labels in self.flow.adopted:
            if constant.op != "get_attr":
                self._refuse(labels, f"{constant.name} is computed for it")
                continue
            self.accounted[str(constant.target)] += 1
            shape = tuple(constant.meta["val"].shape)
            own = self.groups.of(_of_constant(labels, shape))
            for axis, size in enumerate(own.shape):
                if size > 1:
                    line = own.movedim(axis, 0).reshape(size, -1)
                    if bool((line != line[:, :1]).any()):  # rule 3
                        for number in distinct(own).tolist():
                            self.refused.setdefault(number, f"{constant.target} has it along several axes")
                    self._axis(constant, axis, line[:, 0])
        for target, count in self.readers.items():  # rule 5
            if count != self.accounted[target]:
                self._refuse_tensor(target, f"{target} is read in another way, too")

    def _axis(self, constant: fx.Node, axis: int, numbers: Tensor) -> None:
        target = str(constant.target)
        tensor = attribute_at(self.program.module, target)
        assert isinstance(tensor, Tensor)
        self.tensors[id(tensor)] = tensor
        entries = self.found.setdefault((id(tensor), axis), [])
        if id(tensor) not in self.own:
            for number in distinct(numbers).tolist():
                self.refused.setdefault(number, f"{target} is no parameter or buffer of the model")
        for _, other in entries:
            if not torch.equal(other, numbers):
                for number in distinct(torch.cat([other, numbers])).tolist():
                    self.refused.setdefault(number, f"{target} is read in two ways")
        entries.append((target, numbers))

    def _refuse_tensor(self, target: str, reason: str) -> None:
        tensor = attribute_at(self.program.module, target)
        for (key, _), entries in self.found.items():
            if key == id(tensor):
                for _, numbers in entries:
                    for number in distinct(numbers).tolist():
                        self.refused.setdefault(number, reason)

    def _signatures(self) -> "NDArray[np.uint64]":
        """For each coupling group, a number that tells how often it occurs in each value of the graph (rule 4)."""
        draw = np.random.default_rng(0)
        signature = np.zeros(self.groups.count, np.uint64)
        arrays = [numbers for entries in self.found.values() for _, numbers in entries]
        for node, labels in self.flow.labels.items():
            for one in pytree.tree_leaves(labels):
                if not isinstance(one, Tensor):
                    continue
                numbers = compress(self.groups.of(one))
                arrays.append(numbers.flatten())
                if sum(size > 1 for size in numbers.shape) > 1:  # rule 3
                    for number in distinct(numbers).tolist():
                        self.refused.setdefault(number, f"{node.name} has it along several axes")
        for numbers in arrays:
            counts = np.bincount(numbers.numpy(), minlength=self.groups.count)
            signature += counts.astype(np.uint64) * draw.integers(1, 1 << 62, dtype=np.uint64)
        return signature

    def _sets(self, signature: "NDArray[np.uint64]") -> Exchange:
        exchange = Exchange()
        taken: set[int] = set()
        for site in self.flow.sites:
            numbers = self.groups.of(site.rows).flatten()
            target, reasons = str(site.weight.target), Counter[str]()
            sets: dict[int, list[int]] = {}
            for number in dict.fromkeys(numbers.tolist()):
                if number in self.refused or number == int(self.groups.number[FIXED]):
                    reasons[self.refused.get(number, "it is fixed")] += 1
                else:
                    sets.setdefault(int(signature[number]), []).append(number)
            for members in sets.values():
                if len(members) < 2:  # rule 6
                    reasons["all its neurons belong together, or it has one alone"] += 1
                elif taken.isdisjoint(members):
                    exchange.free.append(self._free(members))
                    taken.update(members)
            if not any(len(members) > 1 for members in sets.values()) and reasons:
                exchange.kept.setdefault(target, reasons.most_common(1)[0][0])
        return exchange

    def _free(self, members: list[int]) -> FreeChannels:
        numbers = torch.tensor(members)
        axes = tuple(
            AxisNumbers(self.tensors[key], axis, entries[0][1])
            for (key, axis), entries in self.found.items()
            if bool(torch.isin(entries[0][1], numbers).any())
        )
        rows = tuple(
            (site, self.groups.of(site.rows).flatten())
            for site in self.flow.sites
            if bool(torch.isin(self.groups.of(site.rows), numbers).any())
        )
        return FreeChannels(numbers, axes, rows)


def _of_constant(labels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Labels that are aligned at the last axis, as they lie along the axes of a constant; fixed where it has none."""
    while labels.dim() > len(shape):
        # In front of the constant's axes it is the same for all.
        first = labels[0]
        labels = first if bool((labels == first).all()) else torch.full_like(first, FIXED)
    labels = labels.reshape((1,) * (len(shape) - labels.dim()) + tuple(labels.shape))
    for axis, size in enumerate(shape):
        if size == 1 and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1) * 0
    return labels


def unread_parameters(program: Program) -> list[str]:
    """The model's parameters that its graph does not read: what else they are for cannot be told from it."""
    read = {
        id(attribute_at(program.module, str(node.target))) for node in program.module.graph.find_nodes(op="get_attr")
    }
    return [name for name, parameter in program.model.named_parameters() if id(parameter) not in read]
