"""Weights that a parametrisation or an old-style hook computes: from which parameter, and what has to be masked.

Owns their recognition on a module and in graphs that read them; it must not write to a model.

Rules:
    1. Weight normalisation, in both forms torch has, keeps zeros where they are: its direction is the masked weight.
       So does spectral normalisation.
    2. What any other parametrisation makes of one parameter is masked, if it can be
       (:mod:`srigl_fx.passes.sites.value_transforms`).
    3. Everything else stays dense, with the reason.

With v for the stored direction or weight, weight normalisation reads g v / |v|, a norm for each row, and spectral
normalisation v / sigma(v), one number for all: zero stays zero, and no other place is touched but by a scale.
"""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from srigl_fx.nn import regenerated, weight_norm
from srigl_fx.nn.effective import Masking, Transform
from srigl_fx.nn.regenerated import RegenerationError
from srigl_fx.passes.sites.value_transforms import UnfitError, check_values, is_elementwise, zero_dims
from srigl_fx.passes.sites.weight_layout import Layout

_SPECTRAL: type[nn.Module] = parametrizations._SpectralNorm


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The parameter from which a parametrised attribute is computed.

    Attributes:
        name: Its name, relative to the module with the attribute.
        parameter: It.
        transform: What must be masked; None where the stored zeros are enough.
        reason: Why it can only stay dense, or "".
        others: Ids of the other parameters that the attribute is computed from.
    """

    name: str
    parameter: nn.Parameter
    transform: Transform | None = None
    reason: str = ""
    others: tuple[int, ...] = ()


def computed_names(module: nn.Module) -> set[str]:
    """The attributes of ``module`` that a parametrisation or an old-style hook computes.

    Example:
        >>> computed_names(parametrizations.weight_norm(nn.Linear(3, 2)))
        {'weight'}
    """
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm | WeightNorm)]
    names = {hook.name for hook in hooks}
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        names.update(lists)
    return names


def stored_weights(name: str, module: nn.Module) -> dict[str, Stored]:
    """The attributes of ``module`` (called ``name``) that a parametrisation or an old-style hook computes.

    Example:
        >>> layer = parametrizations.weight_norm(nn.Linear(3, 2))
        >>> [(attr, stored.name) for attr, stored in stored_weights("fc", layer).items()]
        [('weight', 'parametrizations.weight.original1')]
    """
    found: dict[str, Stored] = {}
    if not computed_names(module):
        return found
    for attr, hook in weight_norm.hooks_on(module).items():
        magnitude = getattr(module, f"{hook.name}_g")
        found[hook.name] = Stored(name=attr, parameter=getattr(module, attr), others=(id(magnitude),))
    for spectral in module._forward_pre_hooks.values():
        if isinstance(spectral, SpectralNorm):
            stored = f"{spectral.name}_orig"
            found[spectral.name] = Stored(name=stored, parameter=getattr(module, stored))
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for attr, chain in lists.items():
            if (one := _parametrised(name, attr, chain)) is not None:
                found[attr] = one
    return found


def _parametrised(name: str, attr: str, chain: ParametrizationList) -> Stored | None:
    """What is known of one parametrised attribute; None where no parameter is behind it."""
    own = dict(chain.named_parameters(recurse=False))
    path = f"parametrizations.{attr}"
    reader = f"{name}.{path}" if name else path
    rest = list(chain)
    if weight_norm.is_weight_norm(rest[0]) and "original1" in own:  # rule 1: original0 is g, original1 is v
        wrong = next((part for part in rest[1:] if type(part) is not _SPECTRAL), None)
        reason = "" if wrong is None else f"its values come from {type(wrong).__name__} after weight normalisation"
        others = tuple(id(own[other]) for other in own if other != "original1")
        return Stored(name=f"{path}.original1", parameter=own["original1"], reason=reason, others=others)
    if not own:  # it parametrises a buffer
        return None
    if len(own) > 1 or "original" not in own:  # rule 3: there is no one value that each effective value stands for
        reason = f"its values come from {kind_of(rest[0])}, which makes them of several parameters"
        return Stored(name=f"{path}.{next(iter(own))}", parameter=next(iter(own.values())), reason=reason)
    stored = own["original"]
    if all(type(part) is _SPECTRAL for part in rest):  # rule 1
        return Stored(name=f"{path}.original", parameter=stored)
    try:  # rule 2
        maskings = [
            _chain_masking(chain, stored, f"{name}.{path}" if name else path, training=training)
            for training in (False, True)
        ]
    except (UnfitError, RegenerationError) as error:
        return Stored(name=f"{path}.original", parameter=stored, reason=str(error))
    transform = Transform(reader=reader, path="original", evaluation=maskings[0], training=maskings[1])
    return Stored(name=f"{path}.original", parameter=stored, transform=transform)


def kind_of(module: nn.Module) -> str:
    """What a parametrisation is called.

    Example:
        >>> kind_of(nn.Tanh())
        'Tanh'
    """
    return type(module).__name__.lstrip("_")


def _chain_masking(chain: ParametrizationList, stored: nn.Parameter, name: str, *, training: bool) -> Masking:
    """How what a chain of parametrisations gives is masked; where neurons lie in it is not known here."""
    elementwise = True
    for i, part in enumerate(chain):
        try:
            graph = regenerated.trace(part, training=training, exact=False, like=stored)
            (source,) = [node for node in graph.nodes if node.op == "placeholder"]
            (end,) = graph.output_node().all_input_nodes
            elementwise &= is_elementwise(part, source, end, stored, f"{name}.{i}")
        except (RegenerationError, UnfitError, ValueError) as error:
            raise UnfitError(
                f"its values come from {kind_of(part)}, which fills pruned weights again: {error}"
            ) from error

    def transform(value: Tensor) -> Tensor:
        return functools.reduce(lambda value, part: part(value), chain, value)

    check_values(transform, stored)
    return Masking(elementwise=elementwise)


def with_zero_neurons(transform: Transform, layout: Layout, module: nn.Module, weight: Tensor) -> Transform | str:
    """Rule 2 once the layout is known: what becomes of a neuron of zeros; or the reason it can only stay dense."""
    assert isinstance(module, ParametrizationList)

    def values(value: Tensor) -> Tensor:
        return functools.reduce(lambda value, part: part(value), module, value)

    try:
        dims = zero_dims(values, weight, layout, elementwise=transform.evaluation.elementwise)
    except UnfitError as error:
        return str(error)
    maskings = [
        Masking(elementwise=masking.elementwise, zero_dims=() if masking.elementwise else dims)
        for masking in (transform.evaluation, transform.training)
    ]
    return Transform(reader=transform.reader, path=transform.path, evaluation=maskings[0], training=maskings[1])


def as_stored(root: nn.Module, graph: fx.Graph) -> fx.Graph:
    """The graph with each computed weight read as the parameter it is computed from; a copy, if anything changes.

    Example:
        >>> class Reads(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = parametrizations.weight_norm(nn.Linear(3, 2))
        ...     def forward(self, x):
        ...         return x @ self.fc.weight.t()
        >>> reads = Reads()
        >>> graph = as_stored(reads, regenerated.trace(reads, training=False))
        >>> [node.target for node in graph.nodes if node.op == "get_attr"]
        ['fc.parametrizations.weight.original1']
    """
    targets = {node: target for node in graph.nodes if (target := _stored_target(root, node)) is not None}
    if not targets:
        return graph
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in targets:
            copies[node] = new.create_node("get_attr", targets[node], name=node.name)
        else:
            copies[node] = new.node_copy(node, copies.__getitem__)
    return new


def _stored_target(root: nn.Module, node: fx.Node) -> str | None:
    if node.op not in ("get_attr", "call_module"):
        return None
    path, _, attr = str(node.target).rpartition(".")
    if node.op == "call_module":  # a tracer that takes the list of parametrisations for a child: fc.parametrizations.w
        path, _, table = path.rpartition(".")
        if table != "parametrizations" and path + table != "parametrizations":
            return None
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return None
    if node.op == "get_attr" and isinstance(getattr(module, attr, None), nn.Parameter):
        return None
    stored = stored_weights("", module).get(attr)
    return None if stored is None else f"{path}.{stored.name}" if path else stored.name
