"""Which layers are never ablated.

Owns how the trainers' ``protect`` argument becomes names of weights; the reasons for its default stand in
docs/methods.md, "Which neurons are ablated". It must not know how masks are updated, nor how anybody found out what
neurons are to the rest of a model (:class:`~srigl_fx.masks.records.WeightSite` says it).
"""

import logging
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from typing import Literal

from torch import fx, nn

from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import Role, WeightRecord, all_records

Protection = Literal["auto", "output", "none"]

_log = logging.getLogger(__name__)
_Weights = list[tuple[str, nn.Module, WeightRecord]]
_OUTPUT = "it feeds the model's outputs"
_SHARED: dict[Role | None, str] = {
    "stream": "it writes into a residual stream",
    "attention": "it gives queries, keys or values of attention",
    "normalised": "only a normalisation over its neurons reads it",
}


def protected_weights(model: nn.Module, protect: Protection | Iterable[str] = "auto") -> dict[str, str]:
    """The weights, among those of ``model``, whose neurons may not be ablated, and why.

    "auto" protects what feeds the outputs and what others count on: channels of a residual stream, queries, keys and
    values, and what is read by a normalisation alone (docs/methods.md, "Which neurons are ablated").

    Args:
        model: A sparsified model, wrapped or not.
        protect: "auto"; "output" for the outputs alone: the weights from which a GraphModule's output can be reached
            without passing another contraction, else those that discovery saw to feed the outputs of its example
            inputs, else the last contraction in registration order, dense ones counted; "none"; or names and globs of
            modules and weights (``*`` crosses dots; a module covers all below it), which are protected besides "auto".

    Returns:
        Live fully-qualified names, each with the reason; dense weights may be among them.

    Raises:
        TrainerError: A name matches no weight, or ``protect`` is another string.

    Example:
        >>> protected_weights(nn.Linear(3, 2))
        {}
    """
    weights = list(all_records(model))
    if protect == "none":
        return {}
    if isinstance(protect, str) and protect not in ("auto", "output"):
        raise TrainerError(
            f'protect={protect!r}: pass "auto", "output", "none", or a list of names: protect=[{protect!r}]'
        )
    patterns = list(protect) if isinstance(protect, Iterable) and not isinstance(protect, str) else []
    if not isinstance(protect, Iterable) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TrainerError(f'protect must be "auto", "output", "none" or a list of names and globs, not {protect!r}')
    outputs = _feeding_output(model, [entry for entry in weights if entry[2].site.kind != "other"])
    found = {fqn: _OUTPUT for fqn, _, _ in weights if fqn in outputs}
    if protect != "output":
        for fqn, _, record in weights:
            if record.site.role in _SHARED:
                found.setdefault(fqn, _SHARED[record.site.role])
    for pattern in patterns:
        matches = [fqn for fqn, _, record in weights if _matches(pattern, fqn) or _matches(pattern, record.site.fqn)]
        if not matches:
            known = ", ".join(record.site.fqn for _, _, record in weights[:8])
            raise TrainerError(f"protect: {pattern!r} matches no weight of the model; it has {known}, ...")
        for fqn in matches:
            found.setdefault(fqn, f"protect names it: {pattern!r}")
    return found


def warn_of_unknown(model: nn.Module, protected: Container[str]) -> None:
    """Name in the log the weights that may be ablated although nobody could tell what their neurons are to the rest.

    Args:
        model: A sparsified model, wrapped or not.
        protected: The names of those that may not.

    Example:
        >>> warn_of_unknown(nn.Linear(3, 2), ())
    """
    names = [
        fqn
        for fqn, _, record in all_records(model)
        if record.sparse
        and record.site.role is None
        and fqn not in protected
        and any(block.ablatable for block in record.site.blocks)
    ]
    if names:
        _log.warning(
            "it is not known what the neurons of %s%s are to the rest of the model, which sparsify could not follow: "
            "they may be ablated. Name in protect=[...] what writes into a residual stream or gives queries, keys or "
            "values",
            ", ".join(names[:5]),
            " and others" if len(names) > 5 else "",
        )


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
