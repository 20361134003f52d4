"""Samples that lie innermost between condensed convolutions.

Owns :class:`ArrangeSamples`: which tensors are arranged (:mod:`srigl_fx.runtime.arranged`), and where they are brought
there and back. It must not know kernels: which layers have one for it, it asks the plan.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.condensed_nodes import ARRANGE, CONV, POOL, name_of, same_shape, set_arguments
from srigl_fx.passes.operators import is_pointwise
from srigl_fx.passes.program import Program, arguments
from srigl_fx.runtime.cpu.kernels import plan

_aten = torch.ops.aten
_WHOLE = (_aten.mean.dim, _aten.adaptive_avg_pool1d.default, _aten.adaptive_avg_pool2d.default)  # of all positions
# Which operators pool, and whether that is a mean.
_POOLING = {
    _aten.max_pool1d.default: False,
    _aten.max_pool2d.default: False,
    _aten.avg_pool1d.default: True,
    _aten.avg_pool2d.default: True,
    **dict.fromkeys(_WHOLE, True),
}
_BORDER = 2  # numbers that are moved through a tile of a convolution while one is brought across a border


class ArrangeSamples(Pass[Program]):
    """Keep sixteen samples innermost between condensed convolutions.

    A convolution lays its inputs out before it multiplies: each channel at each tap, for some output positions. Where
    each number of an image has those of fifteen others beside it, nothing needs that: strides and borders are
    addresses. Shapes stay what they are, and so does all that treats each number for itself.

    1. Condensed convolutions over one or two axes are arranged, if their values are floats, they are not transposed,
       and the plan would fill tiles for them.
    2. So are operators between them that treat each element for itself, where each of their tensors is arranged and of
       the result's shape; and pooling of what is arranged, by the largest element or by the mean, that of a whole image
       included where its size is known.
    3. A tensor that is arranged for some readers and not for others exists twice: ``arrange_samples`` stands before the
       first of the others, once for all.
    4. Only where it pays: at ``min_samples`` samples or more, as smaller batches stay as they are; and where the
       numbers that the convolutions of a region need not lay out are more than twice those that cross its borders.

    Args:
        batch: The batch size to decide for; by default that of the example inputs.
        min_samples: From how many samples on tensors are arranged.
    """

    only_improves = True

    def __init__(self, batch: int | None = None, min_samples: int = plan.LANES) -> None:
        self.batch = batch
        self.min_samples = min_samples

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph, notes = subject.module.graph, []
        batch = subject.batch_size if self.batch is None else self.batch
        convolutions = [
            node
            for node in graph.find_nodes(op="call_function", target=CONV)
            if _has_kernel(node) and _samples(node, subject, batch) >= self.min_samples
        ]
        for region in _regions(graph, convolutions):
            layers = [node for node in region if node.target is CONV]
            spared, moved = sum(map(_laid_out, layers)), sum(map(_numbers, _borders(region)))
            if spared <= _BORDER * moved:
                notes += [
                    Note(where=name_of(node), reason="samples not innermost: as much would move at the borders")
                    for node in layers
                ]
                continue
            _arrange(graph, region)
            count = f"{len(layers)} convolution{'s' if len(layers) > 1 else ''}"
            notes += [Note(where=name_of(node), reason=f"samples innermost, as in {count}") for node in layers]
        changed = any(arguments(node)["arranged"] for node in convolutions)
        if changed:
            graph.lint()
            subject.module.recompile()
        return PassResult(subject=subject, changed=changed, notes=tuple(notes))


def _has_kernel(node: fx.Node) -> bool:
    """Whether a convolution can be arranged, and gains from it (rule 1)."""
    given = arguments(node)
    values, shape = given["values"].meta["val"], given["weight_shape"]
    n_active, k = values.shape
    plain = given["scales"] is None and not given["transposed"] and len(shape) <= 4 and not given["arranged"]
    if not plain or not isinstance(node.meta.get("val"), Tensor):
        return False
    tiles = plan.conv_kernel(math.prod(shape[1:]), n_active, k, shape[0] // given["groups"], True) == plan.TILE
    return tiles and plan.may_be_innermost(shape[1] * given["groups"], shape[0], shape[-1], given["dilation"][-1])


def _regions(graph: fx.Graph, convolutions: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The connected parts of what can be arranged, each in the graph's order."""
    found, waiting = set(convolutions), []
    for node in graph.nodes:  # in the graph's order, so that what it reads has been looked at
        if is_pointwise(node.target):
            sources = [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]
            if sources and all(one in found and same_shape(one, node) for one in sources):
                found.add(node)
                waiting.append(node)
        elif _pooling(node) is not None and node.all_input_nodes[0] in found:
            found.add(node)
    # Rule 2 asks for readers, too: what nothing arranged reads is left to its place behind the border. Of what is
    # pooled less crosses it.
    for node in reversed(waiting):
        if not any(user in found for user in node.users):
            found.remove(node)
    seen: set[fx.Node] = set()
    for first in graph.nodes:
        if first not in found or first in seen:
            continue
        region, open_ = {first}, [first]
        while open_:
            node = open_.pop()
            for neighbour in (*_arranged_operands(node), *node.users):
                reads = neighbour in node.all_input_nodes or node in _arranged_operands(neighbour)
                if neighbour in found and neighbour not in region and reads:
                    region.add(neighbour)
                    open_.append(neighbour)
        seen |= region
        yield [node for node in graph.nodes if node in region]


def _arranged_operands(node: fx.Node) -> list[fx.Node]:
    """The operands of a node that must lie as its result does, if that is arranged."""
    if node.target is CONV:
        given = arguments(node)
        return [given[name] for name in ("x", "residual") if given[name] is not None]
    return [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]


def _pooling(node: fx.Node) -> tuple[list[int], list[int], list[int], list[int], bool] | None:
    """What :data:`POOL` does as a node does, by its arguments: window, stride, padding, dilation, mean."""
    if node.target not in _POOLING or not node.all_input_nodes:
        return None
    x, y, given = node.all_input_nodes[0].meta.get("val"), node.meta.get("val"), arguments(node)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype is y.dtype is torch.float32):
        return None
    axes, means = x.dim() - 2, _POOLING[node.target]
    if axes not in (1, 2) or y.dim() != x.dim():
        return None
    if node.target in _WHOLE:
        dims = given.get("dim", range(2, x.dim()))  # None for all
        sizes = [given["output_size"]] if "output_size" in given else []
        if any(size != 1 for one in sizes for size in ([one] if isinstance(one, int) else one)):
            return None
        whole = [size for size in x.shape[2:] if isinstance(size, int)]
        if dims is None or {dim % x.dim() for dim in dims} != set(range(2, x.dim())) or len(whole) < axes:
            return None
        return whole, whole, [0] * axes, [1] * axes, True
    plain = not given["ceil_mode"] and given.get("divisor_override") is None
    settings = [
        _each(given[name] or default, axes)
        for name, default in (("kernel_size", 1), ("stride", given["kernel_size"]), ("padding", 0))
    ]
    if not plain or (means and any(settings[2]) and not given["count_include_pad"]):
        return None
    window, stride, padding = settings
    return window, stride, padding, _each(given.get("dilation", 1), axes), means


def _each(given: int | Sequence[int], axes: int) -> list[int]:
    """A number for each axis, where one alone is meant for all."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * axes if len(numbers) == 1 else numbers


def _borders(region: list[fx.Node]) -> list[fx.Node]:
    """The tensors that cross the borders of a region, each once."""
    inside = set(region)
    entering = {one: None for node in region for one in _arranged_operands(node) if one not in inside}
    leaving = {node: None for node in region if any(user not in inside for user in node.users)}
    return [*entering, *leaving]


def _arrange(graph: fx.Graph, region: list[fx.Node]) -> None:
    """Arrange a region, and what crosses its borders (rule 3)."""
    inside = set(region)
    leaving = [(node, [user for user in node.users if user not in inside]) for node in region]
    for source in {one: None for node in region for one in _arranged_operands(node) if one not in inside}:
        readers = [user for user in graph.nodes if user in inside and source in _arranged_operands(user)]
        moved = _moved(graph, source, readers[0], back=False)
        for user in readers:
            user.replace_input_with(source, moved)
    for node, users in leaving:
        if users:
            order = {one: place for place, one in enumerate(graph.nodes)}
            moved = _moved(graph, node, min(users, key=order.__getitem__), back=True)
            for user in users:
                user.replace_input_with(node, moved)
    for node in region:
        if node.target is CONV:
            set_arguments(node, arranged=True)
        elif pooling := _pooling(node):
            node.args, node.kwargs, node.target = (node.all_input_nodes[0], *pooling), {}, POOL


def _moved(graph: fx.Graph, source: fx.Node, before: fx.Node, back: bool) -> fx.Node:
    with graph.inserting_before(before):
        moved = graph.call_function(ARRANGE, (source, back))
    moved.meta = {**source.meta, "val": torch.empty_like(source.meta["val"], memory_format=torch.contiguous_format)}
    return moved


def _laid_out(node: fx.Node) -> int:
    """The numbers that a convolution lays out for each sample: each channel at each tap of each output position."""
    given = arguments(node)
    shape = given["weight_shape"]
    positions = math.prod(map(_size, node.meta["val"].shape[2:]))
    return int(math.prod(shape[1:]) * given["groups"] * positions)


def _numbers(node: fx.Node) -> int:
    """The numbers of a tensor for each sample."""
    return math.prod(map(_size, node.meta["val"].shape[1:]))


def _size(size: int | torch.SymInt) -> int:
    """A size, or of a free one that of the example; 1 where the graph does not say."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else 1


def _samples(node: fx.Node, program: Program, batch: int) -> int:
    """The samples of a convolution at this batch size; 0 where the graph does not say."""
    size = node.meta["val"].shape[0]
    if not isinstance(size, torch.SymInt):
        return int(size)
    samples = int(size.node.hint) if size.node.has_hint() else 0
    # A batch of one was repeated to two for the capture, as export takes ones for constants.
    return samples * batch // max(2, program.batch_size) if program.dynamic else samples
