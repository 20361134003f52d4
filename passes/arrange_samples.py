"""Samples that lie innermost between condensed convolutions.

Owns :class:`ArrangeSamples`: which tensors are arranged (:mod:`srigl_fx.runtime.arranged`), and where they are brought
there and back. It must not know kernels: which layers have one for it, it asks the plan.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from srigl_fx.passes.arranged_forms import arranged_form, readers, taker
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.condensed_nodes import ARRANGE, CONV, name_of, same_shape, set_arguments
from srigl_fx.passes.operators import is_pointwise
from srigl_fx.passes.program import Program, arguments, drop_unread
from srigl_fx.runtime.arranged import block_samples
from srigl_fx.runtime.cpu.kernels import plan

_BORDER = 2  # numbers that are moved through a tile of a convolution while one is brought across a border


class ArrangeSamples(Pass[Program]):
    """Keep the samples of a block innermost between condensed convolutions.

    A convolution lays its inputs out before it multiplies: each channel at each tap, for some output positions. Where
    each number of an image has those of other images beside it, nothing needs that: strides and borders are addresses.
    Shapes stay what they are, and so does all that treats each number for itself.

    1. Condensed convolutions over one or two axes are arranged, if their values are floats, they are not transposed,
       and the plan would fill tiles for them.
    2. So are operators between them that treat each element for itself, where each of their tensors is arranged and of
       the result's shape; padding by a number, concatenation of channels, and batch norms with stored statistics; and
       pooling of what is arranged, by the largest element or by the mean, that of a whole image included where its size
       is known.
    3. A tensor that is arranged for some readers and not for others exists twice: ``arrange_samples`` stands before the
       first of the others, once for all.
    4. Only where it pays: from a block of samples on, as smaller batches stay as they are; and where the numbers that
       the convolutions of a region need not lay out are more than twice those that cross its borders.

    Args:
        batch: The batch size to decide for; by default that of the example inputs.
        min_samples: From how many samples on tensors are arranged; by default from a block on, which is 16 samples
            with AVX-512, and 8 on other processors.
    """

    only_improves = True

    def __init__(self, batch: int | None = None, min_samples: int | None = None) -> None:
        self.batch = batch
        self.min_samples = min_samples

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph, notes = subject.module.graph, []
        batch = subject.batch_size if self.batch is None else self.batch
        least = block_samples() if self.min_samples is None else self.min_samples
        convolutions = [
            node
            for node in graph.find_nodes(op="call_function", target=CONV)
            if _has_kernel(node) and _samples(node, subject, batch) >= least
        ]
        for region in _regions(subject.module, convolutions):
            layers = [node for node in region if node.target is CONV]
            spared, moved = sum(map(_laid_out, layers)), sum(map(_numbers, _borders(subject.module, region)))
            if spared <= _BORDER * moved:
                notes += [
                    Note(where=name_of(node), reason="samples not innermost: as much would move at the borders")
                    for node in layers
                ]
                continue
            _arrange(subject.module, region)
            count = f"{len(layers)} convolution{'s' if len(layers) > 1 else ''}"
            notes += [Note(where=name_of(node), reason=f"samples innermost, as in {count}") for node in layers]
        changed = any(arguments(node)["arranged"] for node in convolutions)
        if changed:
            drop_unread(subject)
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


def _regions(module: fx.GraphModule, convolutions: list[fx.Node]) -> Iterator[list[fx.Node]]:
    """The connected parts of what can be arranged, each in the graph's order."""
    operands, waiting = {node: _operands(module, node) for node in convolutions}, []
    for node in module.graph.nodes:  # in the graph's order, so that what it reads has been looked at
        if is_pointwise(node.target):
            sources = _operands(module, node)
            fits = bool(sources) and all(same_shape(one, node) for one in sources)
            keeps_size = True
        else:
            form = arranged_form(module, node)
            fits, keeps_size = form is not None, form is None or form.keeps_size
            sources = [] if form is None else list(form.tensors)
        if fits and all(one in operands for one in sources):
            operands[node] = sources
            if keeps_size:
                waiting.append(node)
    # Rule 2 asks for readers, too: what nothing arranged reads is left to its place behind the border. Of what is
    # pooled less crosses it.
    for node in reversed(waiting):
        if not any(user in operands for user in readers(node)):
            del operands[node]
    beside: dict[fx.Node, set[fx.Node]] = {node: set() for node in operands}
    for node, sources in operands.items():
        for source in sources:
            if source in operands:
                beside[node].add(source)
                beside[source].add(node)
    seen: set[fx.Node] = set()
    for first in module.graph.nodes:
        if first not in operands or first in seen:
            continue
        region, open_ = {first}, [first]
        while open_:
            more = beside[open_.pop()] - region
            region |= more
            open_ += more
        seen |= region
        yield [node for node in module.graph.nodes if node in region]


def _operands(module: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The operands of a node that must lie as its result does, if that is arranged."""
    if node.target is CONV:
        given = arguments(node)
        return [given[name] for name in ("x", "residual") if given[name] is not None]
    if form := None if is_pointwise(node.target) else arranged_form(module, node):
        return list(form.tensors)
    return [one for one in node.all_input_nodes if isinstance(one.meta.get("val"), Tensor)]


def _borders(module: fx.GraphModule, region: list[fx.Node]) -> list[fx.Node]:
    """The tensors that cross the borders of a region, each once."""
    inside = set(region)
    entering = {one: None for node in region for one in _operands(module, node) if one not in inside}
    leaving = {node: None for node in region if any(user not in inside for user in readers(node))}
    return [*entering, *leaving]


def _arrange(module: fx.GraphModule, region: list[fx.Node]) -> None:
    """Arrange a region, and what crosses its borders (rule 3)."""
    graph, inside = module.graph, set(region)
    operands = {node: _operands(module, node) for node in region}
    leaving = [(node, [taker(user) for user in readers(node) if user not in inside]) for node in region]
    for source in {one: None for node in region for one in operands[node] if one not in inside}:
        takers = [taker(user) for user in region if source in operands[user]]
        moved = _moved(graph, source, takers[0], back=False)
        for user in takers:
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
        elif not is_pointwise(node.target) and (form := arranged_form(module, node)):
            form.rewrite(module, node)


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
