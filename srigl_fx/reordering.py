"""``reorder_neurons``: similar neurons of a trained model become neighbours, before they share their inputs.

Owns the step in front of :func:`srigl_fx.sparsify`: it puts neurons into another order where nothing else can tell,
and says what that saves. Which can change places is found in :mod:`srigl_fx.passes.channels.exchange`, which order is
wanted in :mod:`srigl_fx.masks.similar_rows`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import TOLERANCE, relative_error
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.masks.row_groups import RowGroups
from srigl_fx.masks.similar_rows import similar_order
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import EXPORT_LOCK, capture
from srigl_fx.passes.channels.exchange import Exchange, FreeChannels, find_exchanges, unread_parameters
from srigl_fx.passes.channels.propagate import Propagation
from srigl_fx.passes.channels.rules import rule_of
from srigl_fx.passes.model_runs import run_model
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Program, tensor_at
from srigl_fx.passes.remove_dead import known_values, one_user_each
from srigl_fx.passes.wrappers import unwrapped
from srigl_fx.reports.text_tables import format_table
from srigl_fx.specs import check_group_size, check_sparsity


@dataclass(frozen=True, kw_only=True)
class ReorderedWeight:
    """A weight whose rows are in another order.

    Attributes:
        name: Its name in the model.
        neurons: Its rows.
        moved: How many of them are in another place.
        before: The share of the sum of its magnitudes that a mask of its groups keeps, in the old order.
        after: The same in the new order.
    """

    name: str
    neurons: int
    moved: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Reordering:
    """What :func:`reorder_neurons` did.

    Attributes:
        group_size: Neighbouring neurons that are to share their inputs.
        sparsity: The sparsity for which it was done.
        weights: The weights whose neurons are in another order, in the model's.
        left: Why the neurons of the other weights stay where they are, by name.
    """

    group_size: int
    sparsity: float
    weights: tuple[ReorderedWeight, ...] = ()
    left: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [(one.name, one.neurons, one.moved, f"{one.before:.1%}", f"{one.after:.1%}") for one in self.weights]
        table = format_table(("weight", "neurons", "moved", "kept before", "kept now"), lines, right=(1, 2, 3, 4))
        left = "".join(f"\n{name}: left as it is; {reason}" for name, reason in self.left.items())
        return f"groups of {self.group_size}, sparsity {self.sparsity:g}\n{table}{left}"


def reorder_neurons(model: nn.Module, example_inputs: Any, *, group_size: int, sparsity: float = 0.9) -> Reordering:
    """Put similar neurons of a trained model next to each other, in place; its function stays the same.

    Call it before ``sparsify(model, group_size=..., mask_init="magnitude")``: neurons of a group keep the same inputs,
    and lose less where they want the same ones. Neurons change places where nothing but contractions, batch
    normalisation and operators element by element see them, such as the hidden units of an MLP or the channels between
    two convolutions; all parameters and buffers that know of them follow. Streams of a residual network, channels
    under a layer normalisation, heads of attention and outputs of the model stay as they are. Outputs on the example
    inputs are compared before and after; an order that changed them is taken back.

    Args:
        model: A trained model without masks, float32; in training mode or not.
        example_inputs: A tuple of arguments, or (args, kwargs).
        group_size: Neighbouring neurons that are to share their inputs: 2, 4, 8, 16 or 32.
        sparsity: The sparsity for which neurons are compared, of every layer: it need not be met exactly.

    Returns:
        What changed, and why the rest did not; print it.

    Raises:
        SparsifyError: The model has masks already: the order comes first.
        RuleError: The group size or the sparsity is out of range.
        CaptureError: The model does not run on the inputs, or cannot be captured as one graph.

    An optimizer that has state knows the old order: make it anew.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> inputs = torch.randn(5, 16)
        >>> before = model(inputs)
        >>> report = reorder_neurons(model, (inputs,), group_size=4, sparsity=0.75)
        >>> [weight.name for weight in report.weights], report.left
        (['0.weight'], {'2.weight': 'it is an output of the model'})
        >>> bool((model(inputs) - before).abs().max() < 1e-5)
        True
    """
    check_group_size(group_size, "reorder_neurons")
    check_sparsity(sparsity, "reorder_neurons")
    model = unwrapped(model)
    if sparse_weights(model):
        raise SparsifyError("reorder_neurons: the model has masks already; put its neurons in order before sparsify")
    with EXPORT_LOCK, _eval_mode(model):
        program = run((Normalize(),), capture(model, example_inputs)).subject
        one_user_each(program.module)
        _, independent = known_values(program)
        flow = Propagation(program, independent, rule_of).run()
        exchange = find_exchanges(program, flow)
        if unread := unread_parameters(program):
            reason = f"the graph does not read {unread[0]}, and what else reads the neurons cannot be told"
            return Reordering(group_size=group_size, sparsity=sparsity, left=dict.fromkeys(_matrices(model), reason))
        return _reorder(program, exchange, group_size, sparsity)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _matrices(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]


def _reorder(program: Program, exchange: Exchange, size: int, sparsity: float) -> Reordering:
    """Change all places that can be changed, and take back what shows in the outputs."""
    model = program.model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    density = 1 - sparsity
    orders = [similar_order(_features(program, one), size=size, density=density) for one in exchange.free]
    before = {name: _kept_share(matrix, size, density) for name, matrix in _row_matrices(program, exchange, names)}
    expected = pytree.tree_leaves(run_model(model, program.args, program.kwargs))
    kept = list(zip(exchange.free, orders, strict=True))
    _apply(kept)
    undone: list[FreeChannels] = []
    if not _same(program, expected):
        _apply([(one, order.argsort()) for one, order in reversed(kept)])
        kept, undone = [], []
        for one, order in zip(exchange.free, orders, strict=True):
            _apply([(one, order)])
            if _same(program, expected):
                kept.append((one, order))
            else:
                _apply([(one, order.argsort())])
                undone.append(one)
    moved: dict[str, int] = {}
    for one, order in kept:
        position = torch.full((int(one.numbers.max()) + 1,), -1)
        position[one.numbers] = torch.arange(len(order))
        changed = order != torch.arange(len(order))
        for site, numbers in one.rows:
            name = names[id(tensor_at(program.module, str(site.weight.target)))]
            ours = numbers[torch.isin(numbers, one.numbers)]
            moved[name] = moved.get(name, 0) + int(changed[position[ours]].sum())
    after = {name: _kept_share(matrix, size, density) for name, matrix in _row_matrices(program, exchange, names)}
    weights = tuple(
        ReorderedWeight(
            name=name,
            neurons=len(matrix),
            moved=moved[name],
            before=before[name],
            after=after[name],
        )
        for name, matrix in _row_matrices(program, exchange, names)
        if name in moved
    )
    reasons = {
        names[id(tensor_at(program.module, target))]: reason
        for target, reason in exchange.kept.items()
        if id(tensor_at(program.module, target)) in names
    }
    for one in undone:
        for site, _ in one.rows:
            name = names[id(tensor_at(program.module, str(site.weight.target)))]
            reasons[name] = "another order of its neurons shows in the outputs"
    left = {
        name: reasons.get(name, "the graph does not multiply with it as it is")
        for name in _matrices(model)
        if name not in moved
    }
    return Reordering(group_size=size, sparsity=sparsity, weights=weights, left=left)


def _features(program: Program, free: FreeChannels) -> list[Tensor]:
    """What the neurons weigh: one matrix (n, F) for each weight whose rows they are, and each place that they have."""
    found: list[Tensor] = []
    for site, numbers in free.rows:
        matrix = site.matrix(tensor_at(program.module, str(site.weight.target)).detach()).flatten(0, 1).flatten(1)
        places = [(numbers == number).nonzero()[:, 0] for number in free.numbers.tolist()]
        found += [matrix[[int(place[turn]) for place in places]] for turn in range(len(places[0]))]
    return found


def _row_matrices(program: Program, exchange: Exchange, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor]]:
    """The weights some of whose rows are free, as matrices (n, F), each once."""
    seen: set[str] = set()
    for free in exchange.free:
        for site, _ in free.rows:
            tensor = tensor_at(program.module, str(site.weight.target)).detach()
            name = names[id(tensor_at(program.module, str(site.weight.target)))]
            if name not in seen:
                seen.add(name)
                yield name, site.matrix(tensor).flatten(0, 1).flatten(1)


def _kept_share(matrix: Tensor, size: int, density: float) -> float:
    """The share of the sum of magnitudes that groups of neighbours keep, each its inputs of the largest sums."""
    sums = RowGroups(rows=len(matrix), size=size).sum(matrix.abs())
    kept = sums.topk(max(1, round(density * matrix.shape[1])), dim=1).values.sum()
    return float(kept / sums.sum().clamp(min=torch.finfo(torch.float64).tiny))


@torch.no_grad()
def _apply(changes: Sequence[tuple[FreeChannels, Tensor]]) -> None:
    for free, order in changes:
        for one in free.axes:
            index = free.index(one, order).to(one.tensor.device)
            one.tensor.copy_(one.tensor.index_select(one.axis, index))


def _same(program: Program, expected: Sequence[Any]) -> bool:
    got = pytree.tree_leaves(run_model(program.model, program.args, program.kwargs))
    return all(relative_error(one, other) <= TOLERANCE for one, other in zip(expected, got, strict=True))
