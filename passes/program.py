"""The subject of the lowering passes: a captured graph, the inputs it was captured with, and its sparse layers.

Owns :class:`Program` and what its passes share: finding a tensor by name, reading a node's arguments, making inputs of
another batch size. It must not know how a graph is captured, nor what is decided for a layer.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Limit, limit
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.passes.promises import kept
from srigl_fx.passes.removal import Removals
from srigl_fx.passes.sizes import BATCH, At, Sizes

Decision = Literal["condensed", "shrunk", "dense"]
Times = dict[int, dict[Decision, float]]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds a call, by weight name, batch size and form.

    Attributes:
        measured: For each layer that was measured, now or earlier.
        estimated: For every layer with a choice, by the cost model.
    """

    measured: dict[str, Times] = field(default_factory=dict)
    estimated: dict[str, Times] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MaskedTensor:
    """What is known of a tensor of the graph that holds a mask-managed weight, or a part or a function of one.

    Attributes:
        fqn: The weight it comes from.
        mask: bool, of the tensor's own shape; the tensor is zero off it.
    """

    fqn: str
    mask: Tensor


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The settings of a convolution, one number for each of its axes.

    Attributes:
        kernel: The kernel's sizes.
        stride: Steps of the window; of a transposed convolution, of the output.
        padding: Zeros on both sides.
        dilation: Distances between taps.
        groups: Groups of channels.
        transposed: Whether it is a transposed convolution.
        output_padding: What a transposed convolution's output has more on the far side.
        extra: Zeros on the far side in addition to ``padding``: an even kernel with padding "same" needs them.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The (n, C / groups * prod(kernel)) matrix view of a weight as torch's convolution takes it.

        Example:
            >>> one = (1,)
            >>> geometry = Geometry(kernel=one, stride=one, padding=(0,), dilation=one, groups=2, transposed=True)
            >>> geometry.to_matrix(torch.arange(8).reshape(4, 2, 1)).tolist()
            [[0, 2], [1, 3], [4, 6], [5, 7]]
        """
        if not self.transposed:
            return weight.reshape(weight.shape[0], -1)
        # Torch has (C, n / groups, *kernel): the groups are cut out of the C inputs, the neurons out of each group.
        per_group = weight.shape[1]
        apart = weight.reshape(self.groups, -1, per_group, *self.kernel)
        return apart.transpose(1, 2).reshape(self.groups * per_group, -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`to_matrix`, where there is one group."""
        weight = matrix.reshape(matrix.shape[0], matrix.shape[1] // math.prod(self.kernel), *self.kernel)
        return weight.transpose(0, 1).contiguous() if self.transposed else weight


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """One node that contracts with a masked tensor, in the terms of a condensed operator.

    Attributes:
        node: The node.
        target: The tensor it reads.
        weight: (n, F) matrix view of the tensor.
        mask: bool (n, F).
        geometry: The settings of a convolution; None of a linear layer.
        x_scale: With values of eight bits, the scale that its input is rounded with; None where each sample has its
            own, found at each call.
        x_offset: What belongs to it: 0 or 128.
    """

    node: fx.Node
    target: str
    weight: Tensor
    mask: Tensor
    geometry: Geometry | None = None
    x_scale: float | None = None
    x_offset: int = 0

    @property
    def x(self) -> fx.Node:
        """The node's data operand."""
        x: fx.Node = operands(self.node)[0]
        return x

    @property
    def bias(self) -> fx.Node | None:
        """The node's bias, if it has one."""
        bias: fx.Node | None = operands(self.node)[2]
        return bias


@dataclass
class MatchedLayer:
    """A mask-managed weight of the model, where the graph reads it, and what is decided for it.

    Attributes:
        weight: The live handle on parameter and mask.
        uses: The nodes that a condensed operator can replace.
        others: The operators of other nodes that read the weight; they keep the dense parameter alive.
        decision: What the lowered graph does with it.
        reason: Why, in one sentence ("" where it is simply condensed).
        times: Seconds a call, by batch size and by what could be decided; empty where nothing was measured.
        estimates: The same by the cost model; empty where nothing was estimated.
        bytes_after: What the lowered module stores for the weight; filled in by the rewrite.
        value_dtype: What its values are stored in where it is condensed.
        snr: The signal-to-noise ratio in dB of its outputs with values of eight bits; None where it is not rounded to
            these.
        unrounded: Why it is stored in float32 although eight bits were asked for; "" where it is not so.
    """

    weight: SparseWeight
    uses: list[Use] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    decision: Decision = "dense"
    reason: str = ""
    times: Times = field(default_factory=dict)
    estimates: Times = field(default_factory=dict)
    bytes_after: int = 0
    value_dtype: torch.dtype = torch.float32
    snr: float | None = None
    unrounded: str = ""

    @property
    def calibrated(self) -> bool:
        """Whether the scales of its inputs are given."""
        return any(use.x_scale is not None for use in self.uses)


@dataclass
class Program:
    """A captured model.

    Attributes:
        module: The graph, its parameters shared with the model.
        model: The model it was captured from.
        args: Example arguments, as the user gave them.
        kwargs: Example keyword arguments.
        how: How it was captured, for the report.
        sizes: Which sizes of the leaves of (args, kwargs) are free.
        masked: The tensors of the graph that are masked, by the target of the ``get_attr`` nodes that read them;
            :func:`enter_masks` fills it in, which ``lower`` does before the first pass. A pass
            that puts another tensor in a masked one's place (transposed, scaled, without some rows) enters it here.
        folded: Why mask-managed weights were made into constants that are not masked, by the weights' names.
        layers: The mask-managed weights, in the model's order; filled in by a pass.
        removals: What became of dead channels; None before a pass removed them.
        value_dtype: What condensed values are stored in.
        value_dtypes: The same of single weights, by name; all others have ``value_dtype``.
    """

    module: fx.GraphModule
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    how: str
    sizes: Sizes = field(default_factory=Sizes)
    masked: dict[str, MaskedTensor] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    layers: list[MatchedLayer] = field(default_factory=list)
    removals: Removals | None = None
    value_dtype: torch.dtype = torch.float32
    value_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def limit(self) -> Limit:
        """How far off the graph's outputs may be: what rounding the layers condensed so far may have caused."""
        return limit(layer.value_dtype for layer in self.layers if layer.decision == "condensed")

    @property
    def dynamic(self) -> bool:
        """Whether the batch size is free."""
        return bool(self.sizes.batch)

    @property
    def symbolic(self) -> bool:
        """Whether any size is free."""
        return any(self.sizes.axes)

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each leaf of (args, kwargs), whether its leading dimension counts samples, as many as are given."""
        return tuple(map(self.sizes.batched, range(len(pytree.tree_leaves((self.args, self.kwargs))))))

    @property
    def batch_size(self) -> int:
        """The leading size of the example inputs, which is the batch by convention; 1 where they have none."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        sized = [leaf.shape[0] for leaf, batched in zip(leaves, self.batched, strict=True) if batched]
        sized += [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
        return sized[0] if sized else 1

    def copy(self) -> "Program":
        """The same program with a graph of its own; tensors, values of nodes and records are shared.

        Example:
            >>> from srigl_fx.passes.capture import capture
            >>> program = capture(nn.Linear(3, 2).eval(), (torch.ones(2, 3),))
            >>> copied = program.copy()
            >>> copied.module.graph is program.module.graph, copied.module.weight is program.module.weight
            (False, True)
        """
        module, nodes = copy_module(self.module)
        return replace(
            self,
            module=module,
            masked=dict(self.masked),
            folded=dict(self.folded),
            layers=[
                replace(
                    layer,
                    uses=[replace(use, node=nodes.get(use.node, use.node)) for use in layer.uses],
                    others=list(layer.others),
                )
                for layer in self.layers
            ],
        )

    @contextmanager
    def promised(self) -> Iterator[Callable[["Program"], None]]:
        """Watch over a pass that gets this program, as :func:`srigl_fx.passes.promises.kept` does."""
        with kept(self.module, [(masked.fqn, masked.mask) for masked in self.masked.values()]) as check:
            yield lambda program: check(program.module)

    @property
    def other_batch(self) -> int:
        """A second batch size to check at: odd, and no multiple of the example's unless that is 1."""
        return self.batch_size + 1 + self.batch_size % 2

    @property
    def trials(self) -> list[At]:
        """The sizes at which a graph is compared with the model: the example's, and others of those that are free.

        Where equal sizes are not tied by the graph, different ones show whether it was made for equal ones after all.
        """
        if self.sizes.asked and self.symbolic:
            example = self.sizes.example(pytree.tree_leaves((self.args, self.kwargs)))
            return [At.of({**example, **values}) for values in ({}, *self.sizes.tried)]
        if not self.dynamic:
            return [At.of({BATCH: self.batch_size})]
        return [At.of(self.batches(size)) for size in (self.batch_size, self.other_batch)]

    def batches(self, size: int, *, apart: bool = True) -> dict[str, int]:
        """Numbers for the batches; ``apart`` gives those that are not tied different ones, each larger by 2."""
        return {name: size + 2 * i * apart for i, name in enumerate(self.sizes.batch)}

    def inputs_at(self, at: At | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs with other sizes: what they hold is repeated or cut."""
        if at is None or not self.symbolic:
            return self.args, self.kwargs
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        args, kwargs = pytree.tree_unflatten(self.sizes.resized(leaves, dict(at.values)), spec)
        return args, kwargs

    def inputs(self, batch: int | None = None, *, apart: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example inputs; with ``batch``, their samples repeated or cut to that many.

        ``apart`` gives inputs whose batches the graph does not tie different ones, each larger by 2 than the last.
        """
        if batch is None or not self.dynamic:
            return self.args, self.kwargs
        return self.inputs_at(At.of(self.batches(batch, apart=apart)))


def enter_masks(program: Program) -> None:
    """Enter each mask-managed weight that the graph reads in ``program.masked``, by its parameter.

    A tied weight is entered under every name the graph has for it. What is entered already stays.
    """
    handles = {id(handle.weight): handle for handle in sparse_weights(program.model)}
    for node in program.module.graph.find_nodes(op="get_attr"):
        handle = handles.get(id(attribute_at(program.module, str(node.target))))
        if handle is not None:
            program.masked.setdefault(str(node.target), MaskedTensor(fqn=handle.fqn, mask=handle.mask))


def drop_unread(program: Program) -> None:
    """Take out of a graph what a pass has left without a reader, masked tensors among it, and make its code anew."""
    module = program.module
    module.graph.eliminate_dead_code()
    read = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    program.masked = {target: masked for target, masked in program.masked.items() if target in read}
    module.graph.lint()
    module.recompile()


def copy_module(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A module with a copy of the graph and the tensors that it reads, and the new nodes by the old ones.

    The graphs of branches are copied too; nodes keep their names and values.
    """
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    returned = graph.graph_copy(module.graph, nodes)  # of all nodes but the output, which it gives back unmade
    (last,) = module.graph.find_nodes(op="output")
    nodes[last] = graph.output(returned)
    nodes[last].meta = dict(last.meta)
    graph.set_codegen(copy.copy(module.graph._codegen))
    copied = fx.GraphModule(module, graph)
    for node in graph.find_nodes(op="get_attr"):
        owner, _, attr = str(node.target).rpartition(".")
        branch = attribute_at(module, str(node.target))
        if isinstance(branch, fx.GraphModule):
            setattr(copied.get_submodule(owner), attr, copy_module(branch)[0])
    return copied, nodes


def attribute_at(module: nn.Module, target: str) -> object:
    """What a ``get_attr`` node with this target reads: a tensor, the graph of a branch, a random generator."""
    owner, _, attr = target.rpartition(".")
    return getattr(module.get_submodule(owner), attr)


def tensor_at(module: nn.Module, target: str) -> Tensor:
    """The parameter or buffer that a ``get_attr`` node with this target reads."""
    tensor = attribute_at(module, target)
    assert isinstance(tensor, Tensor)
    return tensor


def new_buffer(
    module: fx.GraphModule, name: str, tensor: Tensor, *, same: Callable[[Any, Tensor], bool] = lambda *_: False
) -> fx.Node:
    """A ``get_attr`` node, at the graph's insertion point, that reads ``tensor`` from a new buffer.

    The buffer is called ``name``, with underscores added where the module has that name already.

    Args:
        module: Where the buffer is put.
        name: Its name, with that of the sub-module that holds it, which is made where there is none.
        tensor: Its content.
        same: Whether what has the name already is as good as ``tensor``, and is read instead.

    Example:
        >>> module = fx.symbolic_trace(nn.Sequential(nn.Linear(3, 2)))
        >>> with module.graph.inserting_before(next(iter(module.graph.nodes))):
        ...     new_buffer(module, "0.weight", torch.ones(2, 3)).target
        '0.weight_'
    """
    owner_name, _, attr = name.rpartition(".")
    try:
        owner = module.get_submodule(owner_name)
    except AttributeError:
        owner = nn.Module()
        module.add_submodule(owner_name, owner)
    while hasattr(owner, attr) and not same(getattr(owner, attr), tensor):
        attr += "_"
    if not hasattr(owner, attr):
        owner.register_buffer(attr, tensor.detach().contiguous())
    node = module.graph.get_attr(f"{owner_name}.{attr}" if owner_name else attr)
    node.meta["val"] = tensor
    return node


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator node by name, defaults filled in.

    Example:
        >>> graph = fx.Graph()
        >>> node = graph.call_function(torch.ops.aten.softmax.int, (graph.placeholder("x"), -1))
        >>> arguments(node) == {"self": node.args[0], "dim": -1, "dtype": None}
        True
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {**dict(zip((argument.name for argument in schema), node.args, strict=False)), **node.kwargs}
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def operands(node: fx.Node) -> tuple[Any, Any, Any]:
    """(data, weight, bias or None) of a linear node or a convolution."""
    given = arguments(node)
    return given["input"], given["weight"], given["bias"]
