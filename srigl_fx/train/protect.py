"""Which layers are never ablated.

Owns how the trainers' ``protect`` argument becomes names of weights. It must not know how masks are updated.
"""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import fx, nn

from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import WeightRecord, all_records

_Weights = list[tuple[str, nn.Module, WeightRecord]]


def protected_weights(model: nn.Module, protect: str | Iterable[str]) -> frozenset[str]:
    """The names of the weights, among those of ``model``, whose neurons may not be ablated.

    With "output" these are the weights that feed the model's outputs: those from which a GraphModule's output can be
    reached without passing another contraction; else those that discovery saw to feed the outputs of its example
    inputs; else the last contraction in registration order, dense ones counted.

    Args:
        model: A sparsified model, wrapped or not.
        protect: "output", or names and globs of modules and weights (``*`` crosses dots; a module covers all below it).

    Returns:
        Live fully-qualified names; dense weights may be among them.

    Raises:
        TrainerError: A name matches no weight, or ``protect`` is another string.

    Example:
        >>> protected_weights(nn.Linear(3, 2), "output")
        frozenset()
    """
    weights = list(all_records(model))
    if isinstance(protect, str):
        if protect != "output":
            raise TrainerError(f'protect={protect!r}: pass "output", or a list of names: protect=[{protect!r}]')
        return _feeding_output(model, [entry for entry in weights if entry[2].site.kind != "other"])
    if not isinstance(protect, Iterable) or not all(isinstance(pattern, str) for pattern in protect):
        raise TrainerError(f'protect must be "output" or a list of names and globs, not {protect!r}')
    found: set[str] = set()
    for pattern in protect:
        matches = {fqn for fqn, _, record in weights if _matches(pattern, fqn) or _matches(pattern, record.site.fqn)}
        if not matches:
            known = ", ".join(record.site.fqn for _, _, record in weights[:8])
            raise TrainerError(f"protect: {pattern!r} matches no weight of the model; it has {known}, ...")
        found |= matches
    return frozenset(found)


def _matches(pattern: str, fqn: str) -> bool:
    """Whether ``pattern`` is, or matches, the weight or one of the modules around it."""
    parts = fqn.split(".")
    return any(fnmatchcase(".".join(parts[:depth]), pattern) for depth in range(1, len(parts) + 1))


def _feeding_output(model: nn.Module, weights: _Weights) -> frozenset[str]:
    graph_module = _unwrap(model)
    if isinstance(graph_module, fx.GraphModule) and (found := _behind_output(graph_module, weights)):
        return found
    if any(record.site.feeds_output is not None for _, _, record in weights):
        return frozenset(fqn for fqn, _, record in weights if record.site.feeds_output)
    # A tied weight is used last where its last name is registered: a head tied to an embedding is the last layer.
    order = {id(parameter): i for i, (_, parameter) in enumerate(model.named_parameters(remove_duplicate=False))}
    last = max(weights, key=lambda entry: order.get(id(getattr(entry[1], entry[2].site.attr)), -1), default=None)
    return frozenset() if last is None else frozenset({last[0]})


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and data parallelism's wrappers."""
    while not isinstance(model, fx.GraphModule):
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None or len(model._modules) != 1:
            return model
        model = inner
    return model


def _behind_output(model: fx.GraphModule, weights: _Weights) -> frozenset[str]:
    """The weights met first on the way back from the graph's outputs, through nodes that use none."""
    by_node: dict[str, set[str]] = {}
    for fqn, _, record in weights:
        for node in record.site.nodes:
            by_node.setdefault(node, set()).add(fqn)
    pending = [node for node in model.graph.nodes if node.op == "output"]
    seen = set(pending)
    found: set[str] = set()
    while pending:
        node = pending.pop()
        used = by_node.get(node.name) or _used_by_module(model, node, weights)
        found |= used
        following = [] if used else [source for source in node.all_input_nodes if source not in seen]
        seen.update(following)
        pending += following
    return frozenset(found)


def _used_by_module(model: fx.GraphModule, node: fx.Node, weights: _Weights) -> set[str]:
    """The weight that feeds the output of a called module: the last of those it owns."""
    if node.op != "call_module":
        return set()
    inside = {id(module) for module in model.get_submodule(str(node.target)).modules()}
    owned = [fqn for fqn, owner, _ in weights if id(owner) in inside]
    return set(owned[-1:])
