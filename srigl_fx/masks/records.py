"""What is known about one weight: where it is, how its neurons lie in it, and what was decided for it.

Owns :class:`WeightSite` (found by discovery), :class:`WeightRecord` (a site plus the decision), where records are
kept (beside the weight, on the module that owns it) and the live handle :class:`SparseWeight`. It must not know how
sites are found, how masks are drawn or how they are trained.

Everything is keyed by the parameter's fully-qualified name (FQN). A record travels with its module through deepcopy,
pickle and wrappers; handles are made anew from the model whenever they are needed and never kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from torch import Tensor, fx, nn

from srigl_fx.errors import InvariantError, SriglError
from srigl_fx.masks.presence import parameter_on, why_missing
from srigl_fx.masks.row_groups import RowGroups

Kind = Literal[
    "linear",  # (out, in)
    "linear_in_out",  # (in, out): Hugging Face Conv1D, x @ w
    "conv1d",
    "conv2d",
    "conv3d",  # (out, in / groups, kernel...)
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",  # (in, out / groups, kernel...)
    "attention_in",  # (3 d, d), packed in-projection: blocks q, k, v
    "rnn_gates",  # (gates * hidden, in): one block a gate
    "stack",  # one matrix for each expert, head or position: one block each
    "einsum",  # any other product with axes of its own
    "other",  # anything that can only stay dense
]
Structure = Literal["constant_fan_in", "unstructured", "block"]
Role = Literal[
    "width",  # the layer's own: nothing else depends on how many there are
    "stream",  # channels of a residual stream, which other layers write and read
    "attention",  # queries, keys or values: factors of a product with other neurons
    "normalised",  # read by a normalisation over all of them alone, whose statistics each one changes
]

MASK_SUFFIX = "_mask"
_RECORDS = "_srigl_fx_records"
_MOVED = "_srigl_fx_moved"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of rows of a weight's matrix view that is budgeted, ranked and ablated on its own.

    Most weights are one block with an empty name; a packed attention in-projection has three, ``q``, ``k`` and ``v``.
    """

    name: str = ""
    start: int
    stop: int
    ablatable: bool = True

    @property
    def rows(self) -> int:
        """The number of neurons in the block."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class WeightSite:
    """A contraction weight: its name, its kind and its matrix view.

    Attributes:
        owner: FQN of the module that owns the parameter ("" for the root).
        attr: The parameter's name on its owner.
        kind: How the weight is laid out.
        shape: The parameter's shape.
        groups: Groups of a convolution, else 1.
        view: The shape as which the parameter is read to name its axes: its own, unless an axis holds two things.
        neuron_axes: The axes of that view that together number the neurons, outermost first.
        input_axes: The axes that together number a neuron's inputs; with the neurons' they are all.
        blocks: The row blocks of the matrix view; they cover it without overlap.
        aliases: Other FQNs of the same (tied) parameter.
        nodes: Names of the graph nodes that use the weight, where a GraphModule was given.
        feeds_output: Whether no other contraction stands between the weight and an output; None where nobody looked.
        role: What its neurons are to the rest of the model; None where nobody looked, or could tell.
    """

    owner: str
    attr: str
    kind: Kind
    shape: tuple[int, ...]
    groups: int = 1
    view: tuple[int, ...] = ()
    neuron_axes: tuple[int, ...] = ()
    input_axes: tuple[int, ...] = ()
    blocks: tuple[Block, ...] = ()
    aliases: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    feeds_output: bool | None = None
    role: Role | None = None

    def __post_init__(self) -> None:
        if not self.view:
            for name, value in zip(("view", "neuron_axes", "input_axes"), _axes(self), strict=True):
                object.__setattr__(self, name, value)
        if not self.blocks:
            object.__setattr__(self, "blocks", (Block(start=0, stop=self.matrix_shape[0]),))

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Sites that were pickled before they named their axes have them by their kind.
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def fqn(self) -> str:
        """The parameter's fully-qualified name."""
        return f"{self.owner}.{self.attr}" if self.owner else self.attr

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(n, F): neurons and dense fan-in of the matrix view."""
        return (
            math.prod(self.view[axis] for axis in self.neuron_axes),
            math.prod(self.view[axis] for axis in self.input_axes),
        )

    def to_matrix(self, tensor: Tensor) -> Tensor:
        """The (n, F) matrix view of a tensor of the weight's shape: a view where the layout allows, else a copy.

        Example:
            >>> import torch
            >>> site = WeightSite(owner="", attr="weight", kind="linear_in_out", shape=(3, 2))
            >>> site.to_matrix(torch.arange(6).reshape(3, 2)).tolist()
            [[0, 2, 4], [1, 3, 5]]
        """
        return tensor.reshape(self.view).permute(self.neuron_axes + self.input_axes).reshape(self.matrix_shape)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`: a contiguous tensor of the weight's shape."""
        order = self.neuron_axes + self.input_axes
        apart = matrix.reshape([self.view[axis] for axis in order])
        back = sorted(range(len(order)), key=order.__getitem__)
        return apart.permute(back).reshape(self.shape).contiguous()


def _axes(site: WeightSite) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(view, neuron axes, input axes) of a parameter that is laid out as is usual for its kind."""
    shape = site.shape
    if site.kind == "linear_in_out":
        return shape, (1,), (0,)
    if site.kind.startswith("conv_transpose"):
        view = (site.groups, shape[0] // site.groups, *shape[1:])
        return view, (0, 2), (1, *range(3, len(view)))
    return shape, (0,), tuple(range(1, len(shape)))


@dataclass(frozen=True, kw_only=True)
class WeightRecord:
    """A site and what was decided for it.

    Attributes:
        site: The weight.
        structure: The mask structure, or None where the weight stays dense.
        reason: Why it stays dense ("" where it is sparse).
        budgets: For each block, the number of weights it may keep.
        ablation: For each block, its own ablation threshold from a rule; None means the trainer's.
        group_size: Neighbouring rows of a block that share their inputs; 1 leaves each row by itself.
        block_width: With the structure "block", neighbouring inputs that such rows keep together or not at all.
        dense_start: Whether the mask starts full and may exceed the budget until gradual pruning has reached it.
        asked: The recipe of the call that decided it, without decisions (:mod:`srigl_fx.recipes`); None where there
            is none. Nothing here looks into it.
    """

    site: WeightSite
    structure: Structure | None
    reason: str = ""
    budgets: tuple[int, ...] = ()
    ablation: tuple[float | None, ...] = ()
    group_size: int = 1
    block_width: int = 1
    dense_start: bool = False
    asked: object | None = field(default=None, compare=False, repr=False)

    @property
    def sparse(self) -> bool:
        """Whether the weight is mask-managed."""
        return self.structure is not None

    def row_groups(self, block: Block) -> RowGroups:
        """The rows of one of its blocks that share their inputs; those of one convolution group at most.

        Example:
            >>> site = WeightSite(owner="", attr="weight", kind="conv2d", shape=(6, 4, 3, 3), groups=2)
            >>> record = WeightRecord(site=site, structure="constant_fan_in", budgets=(60,), group_size=2)
            >>> record.row_groups(site.blocks[0]).index.tolist()
            [0, 0, 1, 2, 2, 3]
        """
        section = self.site.matrix_shape[0] // self.site.groups
        width = self.block_width
        return RowGroups(rows=block.rows, size=self.group_size, section=section, start=block.start, width=width)


@dataclass(frozen=True)
class SparseWeight:
    """A live handle on one mask-managed weight of a model; parameter and mask are looked up at every access.

    Attributes:
        fqn: The parameter's name in the model at hand.
        owner: The module that owns it.
        record: What was decided for it.
        key: A name that stays the same in every wrapper and on every process; what is saved goes by it.
    """

    fqn: str
    owner: nn.Module
    record: WeightRecord
    key: str

    @property
    def weight(self) -> nn.Parameter:
        """The parameter, as its owner holds it now.

        Raises:
            InvariantError: It holds none under that name any more; the message says what took it away.
        """
        attr = self.record.site.attr
        parameter = parameter_on(self.owner, attr)
        if parameter is None:
            raise InvariantError(f"{self.fqn}: {self._moved() or why_missing(self.owner, attr)}")
        return parameter

    @property
    def mask(self) -> Tensor:
        """The bool mask buffer, of the parameter's shape.

        Raises:
            InvariantError: It was removed.
        """
        mask = getattr(self.owner, self.record.site.attr + MASK_SUFFIX, None)
        if not isinstance(mask, Tensor):
            gone = (
                "its mask was removed from its module: sparsify a model alike, load the weights into that, and "
                "register its mask here"
            )
            raise InvariantError(f"{self.fqn}: {self._moved() or gone}")
        return mask

    def _moved(self) -> str:
        """Where the mask went; "" if it did not."""
        name = (kept_on(self.owner, _MOVED) or {}).get(self.record.site.attr)
        return (
            f"its transform was removed, and its mask is that of {name!r} now: detach the trainer, then create the "
            "optimizer and the trainer anew"
            if name
            else ""
        )

    @property
    def mask_fqn(self) -> str:
        """The fully-qualified name of the mask buffer."""
        return self.fqn + MASK_SUFFIX


def kept_on(module: nn.Module, key: str) -> Any:
    """What was kept on a module under this key; None where nothing was.

    Example:
        >>> kept_on(nn.Linear(3, 2), "note")
    """
    found = module.__dict__.get(key)
    return module.meta.get(key) if found is None and isinstance(module, fx.GraphModule) else found


def keep_on(module: nn.Module, key: str, value: Any) -> None:
    """Keep something on a module, and on its copies; what is empty is removed.

    Of a GraphModule's own attributes deepcopy keeps ``meta``, pickle ``__dict__``.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> keep_on(layer, "note", "hello")
        >>> kept_on(layer, "note")
        'hello'
    """
    stores: list[dict[str, Any]] = [module.__dict__]
    if isinstance(module, fx.GraphModule):
        stores.append(module.meta)
    for store in stores:
        store.pop(key, None)
        if value:
            store[key] = value


def records_on(module: nn.Module) -> dict[str, WeightRecord]:
    """The records kept on one module, by the parameter's name relative to it; empty where it has none.

    A module keeps those of the parameters it owns. A GraphModule also keeps those of the bare containers below it,
    which its copies rebuild from the graph alone.
    """
    return cast("dict[str, WeightRecord]", kept_on(module, _RECORDS) or {})


def set_records(module: nn.Module, records: dict[str, WeightRecord]) -> None:
    """Keep ``records`` on ``module``; an empty dict removes them."""
    keep_on(module, _RECORDS, records)


def move_record(source: nn.Module, name: str, owner: nn.Module, site: WeightSite) -> None:
    """Keep a record on another module, or under another name."""
    records = records_on(source)
    record = replace(records[name], site=site)
    set_records(source, {other: kept for other, kept in records.items() if other != name})
    set_records(owner, {**records_on(owner), site.attr: record})


def note_moved(source: nn.Module, name: str, fqn: str) -> None:
    """Have whoever still looks for a mask where it was be told where it is."""
    keep_on(source, _MOVED, {**(kept_on(source, _MOVED) or {}), name: fqn})


def all_records(model: nn.Module) -> Iterator[tuple[str, nn.Module, WeightRecord]]:
    """Yield (live FQN, owner, record) for every recorded weight below ``model``, in registration order.

    The FQN is the one ``model.named_parameters()`` would give now, also where ``model`` wraps the sparsified one. Of a
    weight that was left dense and is not there any more, there is nothing to tell.

    Raises:
        SriglError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise SriglError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    for prefix, module in model.named_modules():
        for name, record in records_on(module).items():
            path, _, _ = name.rpartition(".")
            owner = module.get_submodule(path) if path else module  # a ScriptModule knows no get_submodule
            if not record.sparse and parameter_on(owner, record.site.attr) is None:
                continue
            yield (f"{prefix}.{name}" if prefix else name), owner, record


def sparse_weights(model: nn.Module) -> list[SparseWeight]:
    """Live handles on every mask-managed weight below ``model``, in registration order."""
    found = [(fqn, owner, record) for fqn, owner, record in all_records(model) if record.sparse]
    # The name at the time of sparsification, unless parts of the model were sparsified one by one and share names.
    given = {record.site.fqn for _, _, record in found}
    unique = len(given) == len(found)
    return [SparseWeight(fqn, owner, record, record.site.fqn if unique else plain(fqn)) for fqn, owner, record in found]


def replace_record(model: nn.Module, handle: SparseWeight, record: WeightRecord) -> None:
    """Keep another record of a weight where its own is kept below ``model``."""
    for module in model.modules():
        found = records_on(module)
        if own := [name for name, kept in found.items() if kept is handle.record]:
            set_records(module, {**found, own[0]: record})


def plain(name: str) -> str:
    """A parameter's name without the prefixes of torch.compile and data parallelism.

    Example:
        >>> plain("module._orig_mod.fc.weight")
        'fc.weight'
    """
    return name.replace("_orig_mod.", "").removeprefix("module.")


def set_dense_start(model: nn.Module, value: bool) -> None:
    """Say for every mask-managed weight below ``model`` whether its mask may exceed the budget for now."""
    for module in model.modules():
        if records := records_on(module):
            set_records(
                module,
                {name: replace(kept, dense_start=value and kept.sparse) for name, kept in records.items()},
            )


def dense_record(site: WeightSite, reason: str) -> WeightRecord:
    """The record of a weight that stays dense."""
    return WeightRecord(site=site, structure=None, reason=reason)
