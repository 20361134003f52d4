"""Weights that are transformed before they are used: which of them can be masked, and how.

Owns their recognition in a module's own forward, and the verdict on each parameter; it must not write to a model, nor
know how the masking is done (:mod:`srigl_fx.nn.effective` does it).

Rules:
    1. There must be one value in the module's graph that takes the weight's place in every contraction, and what the
       graph makes it of must be fit to be masked (:mod:`srigl_fx.passes.sites.value_transforms`).
    2. The forward must be regenerable from its graph (:mod:`srigl_fx.nn.regenerated`), in training mode and in
       evaluation mode.
    3. A parametrised weight goes by the parameter it is computed from
       (:mod:`srigl_fx.passes.sites.parametrised_weights`).
    4. Everything else stays dense, with the reason.
"""

import functools
from dataclasses import dataclass, replace

from torch import fx, nn

from srigl_fx.nn import regenerated
from srigl_fx.nn.effective import Masking, Transform
from srigl_fx.nn.regenerated import RegenerationError
from srigl_fx.passes.sites.parametrised_weights import Stored, kind_of, stored_weights, with_zero_neurons
from srigl_fx.passes.sites.value_transforms import (
    CompanionError,
    UnfitError,
    attribute,
    check_values,
    is_elementwise,
    zero_dims,
)
from srigl_fx.passes.sites.weight_layout import Layout
from srigl_fx.passes.sites.weight_uses import ParameterUse, uses_in


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """A weight that one module's forward transforms.

    Attributes:
        layout: How the effective weight's neurons lie, and so the stored one's.
        transform: How it is masked.
        reason: Why it can only stay dense, or "".
        no_weight: Why it is no contraction weight at all, or "".
        owner: The module through which the forward reads it.
    """

    layout: Layout | None = None
    transform: Transform | None = None
    reason: str = ""
    no_weight: str = ""
    owner: nn.Module | None = None


class TransformedWeights:
    """What the modules of one model say of weights that are transformed, keyed by the Parameter's identity."""

    def __init__(self) -> None:
        self._stored: dict[int, tuple[nn.Module, Stored]] = {}
        self._magnitudes: set[int] = set()
        self._read: dict[int, list[Recognised]] = {}

    def look_at(self, name: str, module: nn.Module) -> dict[str, Stored]:
        """The computed attributes of a module; they are remembered."""
        found = stored_weights(name, module)
        for stored in found.values():
            if id(stored.parameter) in self._stored:
                stored = replace(stored, reason="two parametrisations share it")
            self._stored[id(stored.parameter)] = module, stored
            self._magnitudes.update(stored.others)
        return found

    def read(self, name: str, module: nn.Module, uses: list[dict[int, list[ParameterUse]]], *, traced: bool) -> None:
        """Remember the weights that a module's forward transforms; ``uses`` is what its graphs show."""
        joined: dict[int, list[ParameterUse]] = {}
        for each in uses:
            for key, found in each.items():
                joined.setdefault(key, []).extend(found)
        for key, recognised in recognise(name, module, joined if traced else None).items():
            if key not in self._stored:
                self._read.setdefault(key, []).append(recognised)

    def holder(self, parameter: nn.Parameter, owner: nn.Module) -> nn.Module:
        """The module that a parameter belongs to: of a parametrised one, not the list that keeps it."""
        return self._stored[id(parameter)][0] if id(parameter) in self._stored else owner

    def settle(
        self, parameter: nn.Parameter, owner: nn.Module, uses: list[ParameterUse], layouts: list[Layout]
    ) -> tuple[list[ParameterUse], tuple[Transform, ...]]:
        """The uses of a parameter, its transforms looked through, and what has to be masked behind them.

        Args:
            parameter: Any.
            owner: The module under whose name it goes, and that gets its mask.
            uses: Its uses, where they are known.
            layouts: The layouts in which modules are known to read it, or what is computed from it.
        """
        plain = [use for use in uses if use.kind != "transformed"]
        if id(parameter) in self._magnitudes:  # rule 3: g of g v / |v|
            return [ParameterUse(kind="none", detail="the magnitudes of a weight normalisation")], ()
        if id(parameter) in self._stored:  # rule 3
            module, stored = self._stored[id(parameter)]
            if stored.reason:
                return [ParameterUse(kind="transformed", detail=stored.reason)], ()
            plain = [use for use in plain if use.kind != "none"]
            read_as = [*layouts, *(use.layout for use in plain if use.layout is not None)]
            if stored.transform is None or not read_as:
                return plain, ()
            chain = module.get_submodule(stored.name.rpartition(".")[0])
            transform = with_zero_neurons(stored.transform, read_as[0], chain, parameter)
            if isinstance(transform, str):
                detail = f"its values come from {kind_of(chain[0])}: {transform}"  # type: ignore[index]
                return [ParameterUse(kind="transformed", detail=detail)], ()
            return plain, (transform,)
        recognised = self._read.get(id(parameter), [])
        if not recognised:
            return uses, ()
        # Rule 4: one reading that cannot be masked is enough.
        reason = next((found.reason for found in recognised if found.reason), "")
        if any(found.owner is not None and found.owner is not owner for found in recognised):
            reason = "modules share it, and the one that transforms it is not the first of them"
        if reason:
            return [
                replace(use, detail=f"{use.detail}: {reason}") if use.kind == "transformed" else use for use in uses
            ], ()
        if all(found.no_weight for found in recognised):  # it only scales what is the weight
            return [*plain, ParameterUse(kind="none", detail=recognised[0].no_weight)], ()
        plain = [use for use in plain if use.kind != "none"]
        plain += [ParameterUse(kind="weight", layout=found.layout) for found in recognised if not found.no_weight]
        return plain, tuple(found.transform for found in recognised if found.transform is not None)


def recognise(name: str, module: nn.Module, uses: dict[int, list[ParameterUse]] | None) -> dict[int, Recognised]:
    """The parameters that the module's forward transforms before a contraction reads them, by their ids.

    Args:
        name: The module's FQN.
        module: Any module but a GraphModule.
        uses: What is known of its parameters from a first look; None where that failed.

    Example:
        >>> class Standardised(nn.Linear):
        ...     def forward(self, x):
        ...         return x @ (self.weight - self.weight.mean(1, keepdim=True)).t()
        >>> layer = Standardised(4, 3)
        >>> found = recognise("fc", layer, None)[id(layer.weight)]
        >>> found.layout.kind, found.transform.training.zero_dims
        ('linear', (1,))
    """
    wanted = None if uses is None else {key for key, all_ in uses.items() if any(map(_may_transform, all_))}
    if wanted is not None and not wanted:
        return {}
    try:  # rule 2
        graphs = [regenerated.trace(module, training=training) for training in (False, True)]
    except RegenerationError as error:
        reason = f"the forward around it cannot be regenerated: {error}"
        return dict.fromkeys(wanted or (), Recognised(reason=reason))
    targets: dict[int, str] = {}
    for node in graphs[0].nodes:
        value = attribute(module, node.target) if node.op == "get_attr" else None
        if isinstance(value, nn.Parameter) and value.dim() >= 2:
            targets[id(value)] = node.target
    if wanted is None:  # the first look saw nothing: this one may
        seen = uses_in(graphs[0], functools.partial(attribute, module))
        wanted = {key for key, all_ in seen.items() if any(map(_may_transform, all_))}
    return {key: _recognised(name, module, graphs, targets[key]) for key in wanted if key in targets}


def _may_transform(use: ParameterUse) -> bool:
    """Whether a look behind this use is worth it; a child may be what transforms the weight."""
    child = use.kind == "none" and use.node is not None and use.node.op == "call_module"
    return use.kind == "transformed" or child


def _recognised(name: str, module: nn.Module, graphs: list[fx.Graph], target: str) -> Recognised:
    weight: nn.Parameter = module.get_parameter(target)
    if not weight.is_floating_point():
        return Recognised(reason="its values are not real numbers")
    maskings, layouts = [], []
    try:
        # Rule 1, in both modes unless they are the same.
        for graph in graphs[: 1 if str(graphs[0]) == str(graphs[1]) else 2]:
            source, end, layout = _span(module, graph, target, weight)
            elementwise = is_elementwise(module, source, end, weight, name)
            transform = functools.partial(regenerated.between(graph, target, end.name), module)
            dims: tuple[int, ...] = ()
            # Not run where children make it place by place: they may observe what they are run on.
            if not elementwise or not any(node.op == "call_module" for node in regenerated.ancestors(end)):
                check_values(transform, weight)
                dims = zero_dims(transform, weight, layout, elementwise=elementwise)
            maskings.append(Masking(elementwise=elementwise, zero_dims=dims, node=end.name))
            layouts.append(layout)
    except CompanionError as error:
        return Recognised(no_weight=str(error))
    except UnfitError as error:
        return Recognised(reason=str(error))
    if layouts[0] != layouts[-1]:
        return Recognised(reason="training and evaluation read it in different layouts")
    found = Transform(reader=name, path=target, evaluation=maskings[0], training=maskings[-1])
    return Recognised(layout=layouts[0], transform=found, owner=module.get_submodule(target.rpartition(".")[0]))


def _span(module: nn.Module, graph: fx.Graph, target: str, weight: nn.Parameter) -> tuple[fx.Node, fx.Node, Layout]:
    """The node that reads the weight, the first whose value is all that contractions read of it, and how they do."""
    source = next(node for node in graph.nodes if node.op == "get_attr" and node.target == target)
    below = _descendants(source)
    for node in graph.nodes:
        # One value that takes its place: all that is made of the weight lies before it or behind it, nothing beside.
        if (
            node not in below | {source}
            or node.op == "output"
            or below - _descendants(node) - regenerated.ancestors(node) - {node}
        ):
            continue
        seen = {use.kind: use for use in _uses_as_weight(module, graph, node, weight)}
        if set(seen) == {"weight"} and (layout := seen["weight"].layout) is not None:
            return source, node, layout
    raise UnfitError("there is no one value that takes its place")


def _uses_as_weight(module: nn.Module, graph: fx.Graph, node: fx.Node, weight: nn.Parameter) -> list[ParameterUse]:
    """How the graph would use the weight if it stood in the place of ``node``."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for each in graph.nodes:
        stands_in = each is node
        copies[each] = new.get_attr("stand_in") if stands_in else new.node_copy(each, copies.__getitem__)
    # What only served to make the value would be seen as uses of its own.
    behind = regenerated.ancestors(node) - {node}
    for each in reversed(list(graph.nodes)):
        if each in behind and each.op != "placeholder" and not copies[each].users:
            new.erase_node(copies[each])
    found = uses_in(new, lambda name: weight if name == "stand_in" else attribute(module, name))
    return found.get(id(weight), [])


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    open_nodes = [node]
    while open_nodes:
        for user in open_nodes.pop().users:
            if user not in found:
                found.add(user)
                open_nodes.append(user)
    return found
