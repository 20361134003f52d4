"""The memory layout between neighbouring condensed linear layers.

Owns :class:`FeatureMajor` and the rule by which a tensor may be stored feature-major. It must not know kernels: which
of them reads and writes feature-major tensors, and from how many samples on that pays, it asks the plan.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.condensed_nodes import LINEAR, condensed_nodes, same_shape, set_arguments
from srigl_fx.passes.operators import is_pointwise
from srigl_fx.passes.program import Program, arguments
from srigl_fx.runtime.cpu.kernels import plan


class FeatureMajor(Pass[Program]):
    """Keep what is between condensed linear layers feature-major: (..., n) with the memory of (n, ...).

    With X the (samples, features) that a layer is handed, ``Y = X W.T`` is computed as ``Y.T = W X.T``: these have
    one feature after the other.

    Batches are computed over the samples of one feature after the other, so that a layer that is handed rows transposes
    them, and transposes back. Where the layers are neighbours, neither is needed.

    1. The output of a condensed linear layer is feature-major where every path from it leads to the data operand of
       condensed linear layers, through nothing but operators that treat each element for itself. Those with several
       tensors, a condensed linear layer with its output and its residual among them, have all of them feature-major or
       none. The layers that read such a tensor are told so.
    2. Only where it pays: at ``min_samples`` samples or more (the product of the leading sizes), as smaller batches are
       computed from rows; and only for layers that have a kernel for it, which very wide ones have not. Layers with
       values of eight bits measure each sample, which is faster where it is a row.
    3. Values never depend on it: the operators look at the strides that they are given. What is exported states the
       permutations.

    Args:
        batch: The batch size to decide for; by default that of the example inputs.
        min_samples: From how many samples on a layer's output is made feature-major.
    """

    only_improves = True

    def __init__(self, batch: int | None = None, min_samples: int = plan.LEAST_FEATURE_MAJOR) -> None:
        self.batch = batch
        self.min_samples = min_samples

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        graph = subject.module.graph
        batch = subject.batch_size if self.batch is None else self.batch
        worth = [
            node
            for node in graph.find_nodes(op="call_function", target=LINEAR)
            if _samples(node, subject, batch) >= self.min_samples and _has_kernel(node, self.min_samples)
        ]
        changed = settle_layouts(graph, worth)
        if changed:
            graph.lint()
            subject.module.recompile()
        return PassResult(subject=subject, changed=changed)


def settle_layouts(graph: fx.Graph, wanted: Iterable[fx.Node]) -> bool:
    """Store the outputs of the ``wanted`` condensed linear nodes feature-major where rule 1 of :class:`FeatureMajor`
    lets them be, and all others in rows; say whether anything changed.

    Args:
        graph: A functional graph with fake values in ``node.meta["val"]``.
        wanted: Condensed linear nodes of the graph.
    """
    found = _feature_major(graph, set(wanted))
    changed = False
    for node in found:
        value = node.meta["val"]
        node.meta["val"] = value.new_empty((value.shape[-1], *value.shape[:-1])).movedim(0, -1)
    for node in condensed_nodes(graph):
        if node.target is not LINEAR:
            continue
        given = arguments(node)
        flags = {"x_feature_major": given["x"] in found, "y_feature_major": node in found}
        different = {name: value for name, value in flags.items() if given[name] != value}
        set_arguments(node, **different)
        changed |= bool(different)
    return changed


def _feature_major(graph: fx.Graph, wanted: set[fx.Node]) -> set[fx.Node]:
    """The nodes whose values can be feature-major: the largest set in which each one's neighbours agree."""
    found = {node for node in graph.nodes if node in wanted or is_pointwise(node.target)}
    waiting = list(found)
    while waiting:
        node = waiting.pop()
        if node in found and not _fits(node, found):
            found.remove(node)
            waiting += [neighbour for neighbour in (*node.all_input_nodes, *node.users) if neighbour in found]
    return found


def _fits(node: fx.Node, found: set[fx.Node]) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return False
    sources = _read_in_its_layout(node)
    if not all(one in found and same_shape(one, node) for one in sources):
        return False
    return all(user in found or (user.target is LINEAR and _reads_as_data(user, node)) for user in node.users)


def _read_in_its_layout(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values must lie as the value of ``node`` does."""
    if node.target is not LINEAR:
        return node.all_input_nodes
    residual = arguments(node)["residual"]
    return [] if residual is None else [residual]


def _reads_as_data(linear: fx.Node, node: fx.Node) -> bool:
    given = arguments(linear)
    return given["x"] is node and given["residual"] is not node


def _has_kernel(node: fx.Node, samples: int) -> bool:
    """Whether a layer's feature-major tensors are computed as they lie, as fast as rows."""
    given = arguments(node)
    n_active, k = given["values"].meta["val"].shape
    if given["scales"] is not None:
        return False
    # The instruction set decides between kernels for rows alone.
    return plan.linear_kernel(0, given["in_features"], n_active, k, samples, True, True) == plan.TILE


def _samples(node: fx.Node, program: Program, batch: int) -> int:
    """The samples of a layer at this batch size; 0 where the graph does not say."""
    value = node.meta.get("val")
    sizes = value.shape[:-1] if isinstance(value, Tensor) else ()
    samples, free = int(bool(sizes)), False
    for size in sizes:
        if isinstance(size, torch.SymInt):
            free = True
            size = size.node.hint if size.node.has_hint() else 0
        samples *= size
    # A batch of one was repeated to two for the capture, as export takes ones for constants.
    return samples * batch // max(2, program.batch_size) if free and program.dynamic else samples
