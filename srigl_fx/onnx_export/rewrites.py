"""What torch.onnx cannot translate, in terms that it can.

Owns :func:`rewrite`, from a graph to one that computes the same. It must not know ONNX, files or masks.
"""

import functools
import operator
import sys
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

import srigl_fx.runtime.ops  # noqa: F401 - registers the operators named below
from srigl_fx.passes.condensed_nodes import ROUND, is_condensed, set_arguments, settled_padding
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import arguments, new_buffer, tensor_at

aten = torch.ops.aten

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
_CONDENSED = torch.ops.srigl_fx.condensed_conv.default
_EXTENDED = frozenset({"transposed convolution", "any convolution"})
_SPLITS = frozenset({aten.split.Tensor, aten.unsafe_split.Tensor})
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
_LARGEST = frozenset({aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default})
_REDUCTIONS = frozenset({aten.amax.default, aten.amin.default})


def rewrite(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that ``torch.onnx`` translates; parameters and buffers are shared.

    1. ``split`` into pieces whose size depends on the batch becomes slices: the optimizer of ONNX models fails on a
       sequence of unknown length.
    2. ``amax`` and ``amin`` of everything name all dimensions.
    3. A convolution's bias that only an instance normalisation reads, which takes it away again, becomes zero: a
       channel without weights is then exactly zero everywhere, where rounding would be magnified by 1 / sqrt(eps).
    4. What is returned beside tensors (numbers, strings, sizes) is left out, as None is.
    5. Integers that are subtracted from a float (``1.0 - mask``) become floats first: type promotion fails on
       ``rsub``, which has no overload of that order.
    6. Padding of condensed weights that is no longer zero is zero again: the fallback adds it.
    7. Output padding of a transposed convolution that is its stride or more, which ONNX Runtime does not take, becomes
       zeros after its data: each of them makes the output longer by a stride.
    8. Batch normalisation that is training becomes sums and products: ``torch.onnx`` takes it for one that is not.
    9. Samples that are rounded once for several condensed operators, and are stored feature-major, are rounded by each
       of them: what is stored so is known to be read by condensed operators alone.
    10. ``repeat_interleave`` by a number that depends on a size becomes an expanded dimension.
    11. Between padding by zeros and the largest element of a window stands a maximum of the padded tensor with itself:
        ONNX Runtime would make both one MaxPool, whose own padding is no number.

    Args:
        module: A functional graph of ATen operators, with fake values in ``node.meta["val"]``.

    Example:
        >>> class Range(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x.amax() - x.amin()
        >>> module = torch.export.export(Range(), (torch.ones(4, 3),)).module()
        >>> [node.args[1:] for node in rewrite(module).graph.nodes if node.target is aten.amax.default]
        [([0, 1], False)]
    """
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    returned = graph.graph_copy(module.graph, copies)
    graph.output(pytree.tree_map(_tensor_only, returned))
    graph.set_codegen(module.graph._codegen)
    normalised = []
    for node in list(graph.nodes):
        if node.target in _SPLITS and isinstance(node.args[1], fx.Node):
            _slice(graph, node)
        elif node.target in _REDUCTIONS and not arguments(node)["dim"]:
            given = arguments(node)
            node.args = (given["self"], list(range(given["self"].meta["val"].dim())), given["keepdim"])
            node.kwargs = {}
        elif node.target is aten.rsub.Scalar and _promotes(node):
            with graph.inserting_before(node):
                given = arguments(node)["self"]
                node.replace_input_with(
                    given, graph.call_function(aten._to_copy.default, (given,), {"dtype": _dtype(node)})
                )
        elif node.target is aten.repeat_interleave.self_int and isinstance(arguments(node)["repeats"], fx.Node):
            _expand(graph, node)
        elif node.target is ROUND and any(_is_feature_major(user) for user in node.users):
            node.replace_all_uses_with(arguments(node)["x"])
            graph.erase_node(node)
        elif node.target in _PADS and any(user.target in _LARGEST for user in node.users):
            with graph.inserting_after(node):
                kept = graph.call_function(aten.maximum.default, (node, node))
            kept.meta = dict(node.meta)
            node.replace_all_uses_with(kept, delete_user_cb=lambda user, kept=kept: user is not kept)
        elif _may_extend(node) and arguments(node).get("transposed", True):
            _extend(graph, node)
        elif node.target is aten.instance_norm.default and arguments(node)["use_input_stats"]:
            normalised.append(node)
        elif node.target is aten._native_batch_norm_legit_functional.default and arguments(node)["training"]:
            _normalise_by_batch(graph, node)
    rewritten = fx.GraphModule(module, graph)
    for node, values in settled_padding(rewritten):
        with graph.inserting_before(node):
            node.replace_all_uses_with(new_buffer(rewritten, str(node.target), values))
    for node in normalised:
        _clear_bias(rewritten, arguments(node)["input"])
    graph.lint()
    rewritten.recompile()
    return rewritten


def _is_feature_major(node: fx.Node) -> bool:
    return is_condensed(node) and bool(arguments(node).get("x_feature_major"))


def _may_extend(node: fx.Node) -> bool:
    return operator_of(node.target).family in _EXTENDED or node.target is _CONDENSED


def _normalise_by_batch(graph: fx.Graph, node: fx.Node) -> None:
    """Statistics of the batch, what is normalised by them, and the running ones a step further."""
    given = arguments(node)
    dims = [dim for dim in range(given["input"].meta["val"].dim()) if dim != 1]
    with graph.inserting_before(node):

        def call(function: Any, *args: Any) -> fx.Node:
            return graph.call_function(function, args)

        def along(values: fx.Node) -> fx.Node:
            """Values of the channels, in the place of these among the input's dimensions."""
            return call(aten.view.default, values, [1, -1, *[1] * (len(dims) - 1)])

        def further(running: fx.Node, values: fx.Node) -> fx.Node:
            kept = call(aten.mul.Tensor, running, 1 - given["momentum"])
            return call(aten.add.Tensor, kept, call(aten.mul.Tensor, values, given["momentum"]))

        mean = call(aten.mean.dim, given["input"], dims)
        centred = call(aten.sub.Tensor, given["input"], along(mean))
        variance = call(aten.mean.dim, call(aten.mul.Tensor, centred, centred), dims)
        # The running variance is that of a sample: the sum of squares over one less than there are.
        count = functools.reduce(
            lambda one, other: call(operator.mul, one, other),
            [call(aten.sym_size.int, given["input"], dim) for dim in dims],
        )
        unbiased = call(aten.mul.Tensor, variance, call(operator.truediv, count, call(operator.sub, count, 1)))
        scale = call(aten.rsqrt.default, call(aten.add.Tensor, variance, given["eps"]))
        output = call(aten.mul.Tensor, centred, along(scale))
        if given["weight"] is not None:
            output = call(aten.mul.Tensor, output, along(given["weight"]))
        if given["bias"] is not None:
            output = call(aten.add.Tensor, output, along(given["bias"]))
        running = further(given["running_mean"], mean), further(given["running_var"], unbiased)
    results = (output, mean, scale, *running)
    for user in list(node.users):
        position = user.args[1]
        assert isinstance(position, int)
        user.replace_all_uses_with(results[position])
        graph.erase_node(user)
    graph.erase_node(node)


def _extend(graph: fx.Graph, node: fx.Node) -> None:
    """Zeros after the data of a transposed convolution instead of output padding by whole strides."""
    given = arguments(node)
    data = node.args[0]
    assert isinstance(data, fx.Node)
    rank = len(given["weight_shape"] if "weight_shape" in given else given["weight"].meta["val"].shape) - 2
    strides, extra = (list(given[name]) or [0] for name in ("stride", "output_padding"))
    strides, extra = (numbers * rank if len(numbers) == 1 else numbers for numbers in (strides, extra))
    more = [added // stride for added, stride in zip(extra, strides, strict=True)]
    if any(more):
        zeros = [number for count in reversed(more) for number in (0, count)]
        nothing = given["x_offset"] if data.meta["val"].dtype is torch.uint8 else 0  # what bytes have for zero
        with graph.inserting_before(node):
            longer = graph.call_function(aten.constant_pad_nd.default, (data, zeros, nothing))
        longer.meta["val"] = aten.constant_pad_nd.default(data.meta["val"], zeros, nothing)
        node.update_arg(0, longer)
        set_arguments(node, output_padding=[added % stride for added, stride in zip(extra, strides, strict=True)])


def _expand(graph: fx.Graph, node: fx.Node) -> None:
    """Each element along a dimension beside its repetitions, and both dimensions as one."""
    given = arguments(node)
    data, repeats, dim = given["self"], given["repeats"], given["dim"]
    with graph.inserting_before(node):
        if dim is None:
            data, dim = graph.call_function(aten.flatten.using_ints, (data,)), 0
            rank = 1
        else:
            rank = data.meta["val"].dim()
        dim %= rank
        apart = graph.call_function(aten.unsqueeze.default, (data, dim + 1))
        sizes = [repeats if i == dim + 1 else -1 for i in range(rank + 1)]
        repeated = graph.call_function(aten.expand.default, (apart, sizes))
        flat = graph.call_function(aten.flatten.using_ints, (repeated, dim, dim + 1))
    flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat)
    graph.erase_node(node)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _promotes(node: fx.Node) -> bool:
    return _dtype(node) != _dtype(arguments(node)["self"])


def _clear_bias(module: fx.GraphModule, node: fx.Node) -> None:
    is_convolution = operator_of(node.target).family == "convolution" or node.target is _CONDENSED
    if not is_convolution or len(node.users) > 1:
        return
    given = arguments(node)
    bias = given["bias"]
    if given.get("residual") is not None or given.get("activation", "none") != "none":
        return
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        return
    with module.graph.inserting_before(node):
        node.replace_input_with(
            bias, new_buffer(module, str(bias.target), torch.zeros_like(tensor_at(module, str(bias.target))))
        )


def is_tensor(value: Any) -> bool:
    """Whether what a graph returns is a tensor, and so an output of a file.

    Example:
        >>> is_tensor(3), is_tensor(fx.Graph().placeholder("x"))
        (False, True)
    """
    return isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), _NUMBERS)


def _tensor_only(value: Any) -> fx.Node | None:
    return value if is_tensor(value) else None


def _slice(graph: fx.Graph, split: fx.Node) -> None:
    given = arguments(split)
    data, size, dim = given["self"], given["split_size"], given["dim"]
    last = len(split.meta["val"]) - 1
    for item in list(split.users):
        index = item.args[1]
        with graph.inserting_before(item):
            start = graph.call_function(operator.mul, (size, index))
            stop = sys.maxsize if index == last else graph.call_function(operator.add, (start, size))
            piece = graph.call_function(aten.slice.Tensor, (data, dim, start, stop))
        piece.meta = dict(item.meta)
        item.replace_all_uses_with(piece)
        graph.erase_node(item)
    graph.erase_node(split)
