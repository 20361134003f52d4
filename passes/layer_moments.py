"""What weights are multiplied with, summed up in runs of the model.

Owns the order in which data meets the weights, the stages in which their inputs are summed up, and these sums. It must
not know what they are for.

Rules:
    1. The order is that of the first uses in the first inputs that reach the weights.
    2. Neighbours in that order which read one and the same tensor in the same way, whole and once, and unchanged in
       between, as projections of an attention do, are a group: their sums are the same, and are made once.
    3. A stage has as many groups as its sums fit the memory, but at least one; where stages are to be of one group,
       what was changed between them is seen by the later ones.
    4. A run ends as soon as a stage has seen all it needs, unless a weight of it was used more than once.
    5. Where the caller says which positions count, a product whose rows are as many as there are positions leaves the
       others out. Inside nn.MultiheadAttention, positions go before samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.moments import Moments
from srigl_fx.masks.records import WeightSite
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.passes.sites.census import evaluating, run_on
from srigl_fx.passes.sites.weight_inputs import SeenInput, WeightInputs
from srigl_fx.passes.tracing import plain_attention

Positions = Callable[..., Tensor]
Sections = dict[tuple[int, int], Moments]  # by first row, and the first one behind


@dataclass
class Group:
    """Weights whose inputs are the same.

    Attributes:
        sites: The weights.
        once: Whether each is used once in a run.
        bytes: Of the sums.
    """

    sites: list[WeightSite]
    once: bool
    bytes: int


class _Enough(BaseException):
    """Ends a run of the model; no forward of a user catches it by accident."""


@dataclass
class _Uses:
    """The uses of each weight so far, and which of them read the same numbers as the one before."""

    found: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    number: int = 0
    last: tuple[Tensor, tuple[object, ...]] | None = None

    def see(self, use: SeenInput) -> None:
        # The last tensor is held, so that no other can be in its place; its identity is that of the time of its use.
        identity = _identity(use)
        if self.last is None or self.last[1] != identity:
            self.number += 1
            self.last = use.source, identity
        self.found.setdefault(use.weight, []).append((use.start, use.stop, self.number))


def _identity(use: SeenInput) -> tuple[object, ...]:
    """What two uses have in common whose rows are the same (rule 2)."""
    source = use.source
    return source.data_ptr(), source.shape, source.stride(), source.dtype, use.version, use.how


def groups_in_order(model: nn.Module, sites: Sequence[WeightSite], batches: Sequence[Inputs]) -> list[Group]:
    """The weights in the order in which data meets them (rules 1 and 2).

    Raises:
        SparsifyError: The model does not run on the inputs, or they do not reach a weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> usual = dict(attr="weight", kind="linear")
        >>> sites = [WeightSite(owner="1", shape=(4, 2), **usual), WeightSite(owner="0", shape=(2, 3), **usual)]
        >>> [group.sites[0].owner for group in groups_in_order(model, sites, [((torch.ones(1, 3),), {})])]
        ['0', '1']
    """
    by_name = {site.fqn: site for site in sites}
    uses = _Uses()  # of all inputs: weights that only some of them reach share nothing with others
    order = uses.found
    for index, batch in enumerate(batches):
        uses.last = None  # two inputs may hold one tensor
        _run(model, [site for site in sites if site.fqn not in order], batch, index, uses.see)
        if len(order) == len(sites):
            break
    if missing := [site.fqn for site in sites if site.fqn not in order]:
        raise SparsifyError(
            f"no calibration input reaches {', '.join(map(repr, missing[:5]))}{' and others' if missing[5:] else ''}, "
            "or the weight is copied before it is used (by autocast, say): give inputs that use it, or leave it dense "
            "with the rule None"
        )
    groups: list[Group] = []
    before = -1
    for name, found in order.items():
        site = by_name[name]
        rows, inputs = site.matrix_shape
        once = len(found) == 1
        number = found[0][2] if once and found[0][:2] == (0, rows) else -1
        if number == before != -1:
            groups[-1].sites.append(site)
        else:
            sections = len({use[:2] for use in found})
            groups.append(Group([site], once or site.groups == len(found), 8 * inputs**2 * sections))
        before = number
    return groups


def stages(groups: Iterable[Group], memory: int) -> Iterator[list[Group]]:
    """The groups whose inputs are summed up together (rule 3), in their order.

    Example:
        >>> groups = [Group([], True, size) for size in (3, 4, 9, 1)]
        >>> [[group.bytes for group in stage] for stage in stages(groups, 8)]
        [[3, 4], [9], [1]]
    """
    stage: list[Group] = []
    for group in groups:
        if stage and sum(one.bytes for one in stage) + group.bytes > memory:
            yield stage
            stage = []
        stage.append(group)
    if stage:
        yield stage


def summed_up(
    model: nn.Module,
    stage: Sequence[Group],
    batches: Sequence[Inputs],
    *,
    positions: Positions | None = None,
    after: Callable[[], object] = lambda: None,
) -> list[Sections]:
    """The sums of each group's inputs, by the rows that read them.

    Args:
        model: The model, which is afterwards as it was.
        stage: The groups.
        batches: Inputs of the model.
        positions: Says which positions of an input count (rule 5): a function of what the model is called with, that
            gives a bool tensor of the leading sizes of layers' inputs.
        after: Called after each of the inputs.

    Raises:
        SparsifyError: The model does not run on the inputs, ``positions`` gives something else, or a weight is given
            numbers that are not finite, or nothing that counts.
    """
    leaders = {group.sites[0].fqn: index for index, group in enumerate(stage)}
    sums: list[Sections] = [{} for _ in stage]
    for index, batch in enumerate(batches):
        counted = None if positions is None else _counted(positions, batch, index)
        left = {name: group.sites[0].groups for name, group in zip(leaders, stage, strict=True)}

        def see(use: SeenInput, counted: Tensor | None = counted, left: dict[str, int] = left) -> None:
            moments = sums[leaders[use.weight]].setdefault((use.start, use.stop), Moments())
            for rows in use.parts():
                moments.add(_chosen(rows, counted, model, use.weight))
            if left.get(use.weight, 1) > 1:
                left[use.weight] -= 1
            else:
                left.pop(use.weight, None)
            if not left and all(group.once for group in stage):  # rule 4
                raise _Enough

        _run(model, [group.sites[0] for group in stage], batch, index, see)
        after()
    for name, sections in zip(leaders, sums, strict=True):
        if not all(moments.finite for moments in sections.values()):
            raise SparsifyError(
                f"{name!r} is given numbers that are not finite, NaN or infinite: look for the calibration input that "
                "makes them, and leave it out"
            )
        if not sections or not all(moments.count for moments in sections.values()):
            raise SparsifyError(f"none of the positions that {name!r} is given counts: look at what positions returns")
    return sums


def _run(
    model: nn.Module, sites: Sequence[WeightSite], batch: Inputs, index: int, seen: Callable[[SeenInput], None]
) -> None:
    weights = {site: model.get_parameter(site.fqn) for site in sites}
    with evaluating(model), torch.no_grad(), plain_attention():
        try:
            with WeightInputs(weights, seen):
                run_on(model, batch, f"calibration input {index}")
        except _Enough:
            return


def _counted(positions: Positions, batch: Inputs, index: int) -> Tensor:
    args, kwargs = batch
    found = positions(*args, **kwargs)
    if not isinstance(found, Tensor) or found.dtype is not torch.bool:
        what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise SparsifyError(f"positions gives {what} for calibration input {index}, not a bool tensor")
    return found


def _chosen(rows: Tensor, counted: Tensor | None, model: nn.Module, weight: str) -> Tensor:
    """The rows that count (rule 5)."""
    if counted is None or counted.numel() != len(rows):
        return rows
    owner, _, _ = weight.rpartition(".")
    above, _, _ = owner.rpartition(".")
    modules = map(model.get_submodule, (owner, above))
    around = [module for module in modules if isinstance(module, nn.MultiheadAttention)]
    if around and around[0].batch_first and counted.dim() == 2:
        counted = counted.T
    return rows[counted.reshape(-1).to(rows.device)]
