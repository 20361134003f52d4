"""From dense contractions to condensed ones, in the graph.

Owns the rewriting of one node in each of its forms, and :class:`Condense`, which applies what was decided. It must not
know how a decision came about, nor any kernel: the operators are named through ``torch.ops``.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators named below
from srigl_fx.errors import FormatError, InvariantError
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.program import Decision, Layer, Program, Use, arguments, pair, tensor_at
from srigl_fx.runtime.format import CondensedWeight

aten = torch.ops.aten


class Condense(Pass[Program]):
    """Rewrite the uses of each layer as its decision says.

    1. "condensed": the node becomes a condensed operator; values, indices and active rows are buffers named after the
       weight. Where the blocks of a packed projection keep different fan-ins, it becomes one operator a block and their
       concatenation. A layer without bias gets a buffer of zeros.
    2. "shrunk": the dense operator computes the active rows only; the others are filled with their bias.
    3. "dense": nothing changes.
    4. Dense weights that no node reads any more are gone from the module.
    """

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph = subject.module.graph
        for layer in subject.layers:
            before = _stored(subject.module)
            for use in layer.uses:
                rewrite(subject.module, layer, use, layer.decision)
            added = {name: size for name, size in _stored(subject.module).items() if name not in before}
            layer.bytes_after = sum(added.values())
        graph.eliminate_dead_code()
        graph.lint()
        subject.module.delete_all_unused_submodules()
        # A GraphModule made from a graph keeps just the tensors that the graph reads.
        subject.module = fx.GraphModule(subject.module, graph)
        kept = {id(tensor_at(subject.module, str(node.target))) for node in graph.nodes if node.op == "get_attr"}
        for layer in subject.layers:
            if id(layer.weight.weight) in kept:
                layer.bytes_after += layer.weight.weight.nbytes
        return PassResult(subject=subject, changed=any(layer.decision != "dense" for layer in subject.layers))

    def ensures(self, subject: Program) -> None:
        """No condensed layer is still contracted densely."""
        left = {use.node for layer in subject.layers if layer.decision != "dense" for use in layer.uses}
        assert not left & set(subject.module.graph.nodes)


def _stored(module: nn.Module) -> dict[str, int]:
    return {name: buffer.nbytes for name, buffer in module.named_buffers()}


def condensed_rows(layer: Layer, start: int, stop: int) -> list[tuple[int, int, CondensedWeight]]:
    """Rows ``start`` to ``stop`` of a layer as condensed weights: one if all keep one fan-in, else one a block.

    Raises:
        InvariantError: Rows within a block keep different fan-ins.
    """
    weight, mask = (matrix.numpy() for matrix in layer.matrices())
    cuts = [(start, stop)]
    counts = mask[start:stop].sum(axis=1)
    if len(set(counts[counts > 0].tolist())) > 1:
        blocks = layer.weight.record.site.blocks
        cuts = [(max(start, b.start), min(stop, b.stop)) for b in blocks if b.start < stop and start < b.stop]
    try:
        return [(first, last, CondensedWeight.from_dense(weight[first:last], mask[first:last])) for first, last in cuts]
    except FormatError as error:
        raise InvariantError(f"{layer.weight.fqn} does not have a constant fan-in: {error}") from error


def rewrite(module: fx.GraphModule, layer: Layer, use: Use, decision: Decision) -> None:
    """Replace one use of a layer in ``module``'s graph by the form ``decision`` names."""
    if decision == "dense":
        return
    node, given = use.node, arguments(use.node)
    with module.graph.inserting_before(node):
        new = (_condensed if decision == "condensed" else _shrunk)(module, layer, use, given)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)


def _condensed(module: fx.GraphModule, layer: Layer, use: Use, given: dict[str, Any]) -> fx.Node:
    graph = module.graph
    pieces = condensed_rows(layer, use.start, use.stop)
    outputs = []
    for first, last, weight in pieces:
        stem = _stem(layer, first, last)
        operands = [
            _buffer(module, f"{stem}_{name}", torch.from_numpy(array))
            for name, array in (("values", weight.values), ("indices", weight.indices), ("active", weight.active))
        ]
        if given["bias"] is None:
            operands.append(_buffer(module, f"{stem}_bias", torch.zeros(last - first)))
        elif len(pieces) == 1:
            operands.append(_bias(module, given["bias"], f"{stem}_bias"))
        else:
            rows = (given["bias"], 0, first - use.start, last - use.start)
            operands.append(_bias(module, graph.call_function(aten.slice.Tensor, rows), f"{stem}_bias"))
        if use.node.target is aten.conv2d.default:
            shape = list(layer.weight.record.site.shape)
            geometry = (shape, pair(given["stride"]), pair(given["padding"]), pair(given["dilation"]), given["groups"])
            operator = torch.ops.srigl_fx.condensed_conv2d.default
            outputs.append(graph.call_function(operator, (given["input"], *operands, *geometry)))
        else:
            operator = torch.ops.srigl_fx.condensed_linear.default
            outputs.append(graph.call_function(operator, (given["input"], *operands, layer.fan_in)))
    return outputs[0] if len(outputs) == 1 else graph.call_function(aten.cat.default, (outputs, -1))


def can_shrink(layer: Layer, use: Use) -> bool:
    """Whether computing the active rows only would spare work: some are ablated, and no groups tie them together."""
    active = layer.matrices()[1][use.start : use.stop].any(1)
    return bool(active.any()) and not bool(active.all()) and layer.weight.record.site.groups == 1


def _shrunk(module: fx.GraphModule, layer: Layer, use: Use, given: dict[str, Any]) -> fx.Node:
    """Pad the active rows' outputs with one channel of zeros, pick each row's channel from that, and add the bias."""
    graph = module.graph
    active = layer.matrices()[1][use.start : use.stop].any(1)
    rows = layer.weight.weight.detach()[use.start : use.stop][active]
    count = rows.shape[0]
    channel = torch.where(active, active.cumsum(0) - 1, count)
    stem = _stem(layer, use.start, use.stop)
    weight = _buffer(module, f"{stem}_rows", rows)
    picked = _buffer(module, f"{stem}_channel", channel)
    convolution = use.node.target is aten.conv2d.default
    if convolution:
        settings = (given["stride"], given["padding"], given["dilation"], given["groups"])
        y = graph.call_function(aten.conv2d.default, (given["input"], weight, None, *settings))
    else:
        y = graph.call_function(aten.linear.default, (given["input"], weight))
    axis, sides = (1, [0, 0, 0, 0, 0, 1]) if convolution else (-1, [0, 1])
    y = graph.call_function(aten.constant_pad_nd.default, (y, sides, 0.0))
    y = graph.call_function(aten.index_select.default, (y, axis, picked))
    if given["bias"] is None:
        return y
    bias = given["bias"]
    if convolution:
        bias = graph.call_function(aten.reshape.default, (bias, [-1, 1, 1]))
    return graph.call_function(aten.add.Tensor, (y, bias))


def _stem(layer: Layer, start: int, stop: int) -> str:
    whole = stop - start == layer.weight.record.site.matrix_shape[0]
    return layer.weight.fqn if whole else f"{layer.weight.fqn}_rows{start}_{stop}"


def _buffer(module: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    """A node that reads ``tensor`` from a buffer ``name``: the one that holds it already, or a new one."""
    owner_name, _, attr = name.rpartition(".")
    try:
        owner = module.get_submodule(owner_name)
    except AttributeError:
        owner = nn.Module()
        module.add_submodule(owner_name, owner)
    while hasattr(owner, attr) and not _same(
        getattr(owner, attr), tensor
    ):  # the model has this name for something else
        attr += "_"
    if not hasattr(owner, attr):
        owner.register_buffer(attr, tensor.contiguous())
    node = module.graph.get_attr(f"{owner_name}.{attr}" if owner_name else attr)
    node.meta["val"] = tensor
    return node


def _same(held: object, tensor: Tensor) -> bool:
    if not isinstance(held, Tensor) or held.dtype != tensor.dtype:
        return False
    return np.array_equal(held.detach().numpy(), tensor.numpy(), equal_nan=True)


def _bias(module: fx.GraphModule, node: fx.Node, name: str) -> fx.Node:
    """The bias as one tensor read by name: rows of a parameter are cut out once, here, rather than at every call."""
    constant = _constant(module, node)
    if node.op == "get_attr" or constant is None:
        return node
    return _buffer(module, name, constant)


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The value of a node that depends on no input, or None."""
    if node.op == "get_attr":
        return tensor_at(module, str(node.target)).detach()
    if node.op != "call_function" or any(_constant(module, source) is None for source in node.all_input_nodes):
        return None
    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _constant(module, source))
    value = node.target(*args, **kwargs)
    return value.detach().clone() if isinstance(value, Tensor) else value


def variants(layer: Layer, use: Use, decisions: Iterable[Decision]) -> Iterator[tuple[Decision, fx.GraphModule]]:
    """The one contraction of ``use`` on its own, in each form: what a measurement compares.

    Each module takes the input of the node and returns its output.
    """
    given = arguments(use.node)
    for decision in decisions:
        graph = fx.Graph()
        root = nn.Module()
        root.register_buffer("weight", layer.weight.weight.detach()[use.start : use.stop])
        root.register_buffer("bias", torch.ones(use.stop - use.start))
        x, weight = graph.placeholder("x"), graph.get_attr("weight")
        bias = None if given["bias"] is None else graph.get_attr("bias")
        settings = [value for name, value in given.items() if name not in ("input", "weight", "bias")]
        assert callable(use.node.target)
        node = graph.call_function(use.node.target, (x, weight, bias, *settings))
        graph.output(node)
        module = fx.GraphModule(root, graph)
        rewrite(module, layer, Use(node, use.start, use.stop), decision)
        graph.eliminate_dead_code()
        module.recompile()
        yield decision, module
