"""Which weight's removed channels were read by which other, and through what, for the report.

Owns the search for such pairs. It must not change the graph, nor know why a channel goes.
"""

from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor, fx

from srigl_fx.passes.channels.decision import RemovalDecision
from srigl_fx.passes.channels.flow import Site
from srigl_fx.passes.operators import plain_name
from srigl_fx.passes.removal import Link

_STEPS = 200  # nodes looked at for one reader, so that a residual stream does not pair each layer with each other
_UNTOLD = {"getitem", "clone", "contiguous", "alias"}


def removal_links(sites: Sequence[Site], decision: RemovalDecision) -> tuple[Link, ...]:
    """The pairs of a producer and a reader of removed channels, by their positions among ``sites``.

    The graph must still be the one that ``decision`` was taken for. A depthwise convolution is passed through.

    Example:
        >>> import torch
        >>> from srigl_fx.passes.capture import capture
        >>> from srigl_fx.passes.remove_dead import RemoveDead
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()
        >>> model[2].weight.data[:, 0] = 0.0
        >>> RemoveDead().run(capture(model, (torch.ones(2, 4),))).subject.removals.links
        (Link(producer=0, reader=1, through=('relu',)),)
    """
    makers = {site.node: position for position, site in enumerate(sites)}
    rows = [_groups(decision, site.rows) for site in sites]
    through = {site.node for site in sites if site.coupled}
    links = []
    for reader, site in enumerate(sites):
        columns = set() if site.data is None or site.coupled else _groups(decision, site.columns)
        if not columns or site.data is None:
            continue
        for node, path in _sources(site.data, makers.keys() - through, makers.keys()).items():
            if rows[makers[node]] & columns:
                links.append(Link(producer=makers[node], reader=reader, through=path))
    return tuple(sorted(links, key=lambda link: (link.producer, link.reader)))


def _groups(decision: RemovalDecision, labels: Tensor) -> set[int]:
    return set(decision.groups.of(labels[decision.gone(labels)]).tolist())


def _sources(data: fx.Node, ends: Collection[fx.Node], wanted: Collection[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
    """The nearest ``wanted`` nodes that ``data`` is computed from, with the operators on the way; ``ends`` stop it."""
    paths: dict[fx.Node, tuple[str, ...]] = {data: ()}
    queue = deque([data])
    found = {}
    while queue and len(paths) < _STEPS:
        node = queue.popleft()
        if node in wanted:
            found[node] = paths[node]
        if node in ends:
            continue
        name = plain_name(node.target)
        path = paths[node] if name in _UNTOLD else (name, *paths[node])
        for operand in node.all_input_nodes:
            if operand not in paths and operand.op == "call_function":
                paths[operand] = path
                queue.append(operand)
    return found
