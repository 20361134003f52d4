"""Find every weight of a model, and how its neurons lie in it.

Owns discovery; it must not know which of the weights will be made sparse. Works without example inputs, and then never
runs the model: each module's own forward is traced by torch.fx with its children as leaves, and only to look at.

Rules:
    1. A module of a registered type names its own weights (:mod:`srigl_fx.passes.registry`).
    2. Any other module is traced by torch.fx with its children as leaves; a GraphModule brings its graph. The data flow
       from each parameter of two or more dimensions, its own or a child's, decides
       (:mod:`srigl_fx.passes.weight_uses`).
    3. A tied parameter is one weight, under the first of its names in registration order. Where it is also an embedding
       table, or its uses disagree on the layout, it stays dense.
    4. A depthwise convolution stays dense: its fan-in is the kernel alone.
    5. With example inputs, each site also says whether it feeds an output (:mod:`srigl_fx.passes.census`).
    6. What could not be traced is reported with the error that stopped the tracer, as not reached.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import WeightSite
from srigl_fx.passes.base import Pass, PassResult
from srigl_fx.passes.census import weights_feeding_outputs
from srigl_fx.passes.draft import Draft, Finding
from srigl_fx.passes.registry import Known, lookup
from srigl_fx.passes.weight_uses import Use, uses_of

log = logging.getLogger(__name__)

_PARAMETRISED = "its value is computed from a parametrisation (weight normalisation, say), which is not supported yet"


class ChildrenAsLeaves(fx.Tracer):
    """Traces one module's own forward; every child is a leaf, so nothing below it runs."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Every module is a leaf."""
        return True


@dataclass(frozen=True)
class Discover(Pass[Draft]):
    """Fill ``draft.findings`` with every parameter of two or more dimensions (rules 1-6 of the module)."""

    example_inputs: Any = None

    def requires(self, subject: Draft) -> None:
        """Every parameter must have its shape and its values, and be one that training can write."""
        if isinstance(subject.model, torch.jit.ScriptModule):
            raise SparsifyError("a scripted model is opaque to torch.fx; call sparsify on the model it was made from")
        for name, parameter in subject.model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise SparsifyError(
                    f"the parameter {name!r} of a lazy module has no shape yet; run the model once on a batch, "
                    "then call sparsify"
                )
            if parameter.is_meta:
                raise SparsifyError(
                    f"the parameter {name!r} is on the meta device and has no values to choose from; materialise the "
                    "model first (model.to_empty(device=...), then initialise or load it)"
                )
            if parameter.is_inference():
                raise SparsifyError(
                    f"the parameter {name!r} was made under torch.inference_mode() and cannot be trained; build the "
                    "model outside of it"
                )

    def run(self, subject: Draft) -> PassResult[Draft]:
        """Look at every module once and at every parameter's uses."""
        model = subject.model
        evidence = _Evidence(model)
        with _unchanged_random_state():
            for name, module in model.named_modules():
                evidence.look_at(name, module)
        subject.findings = [evidence.finding(names) for names in _parameter_names(model)]
        if self.example_inputs is not None:
            subject.findings = self._with_census(model, subject.findings)
        return PassResult(subject=subject, changed=False)

    def _with_census(self, model: nn.Module, findings: list[Finding]) -> list[Finding]:
        weights = {id(model.get_parameter(finding.site.fqn)) for finding in findings if finding.site.kind != "other"}
        feeding = weights_feeding_outputs(model, self.example_inputs, weights)
        return [
            replace(
                finding, site=replace(finding.site, feeds_output=id(model.get_parameter(finding.site.fqn)) in feeding)
            )
            for finding in findings
        ]


class _Evidence:
    """What the modules say of each parameter, keyed by the Parameter's identity."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known: dict[int, list[Known]] = {}
        self.uses: dict[int, list[tuple[bool, Use]]] = {}  # (the graph is the model's own, the use)
        self.calls: dict[str, list[str]] = {}  # module FQN -> call_module nodes of the model's own graph
        self.failures: dict[str, str] = {}

    def look_at(self, name: str, module: nn.Module) -> None:
        known = lookup(module)
        if known is not None:
            for attr, fact in known.items():
                self.known.setdefault(id(getattr(module, attr)), []).append(fact)
            return
        if isinstance(module, fx.GraphModule):
            self._read_graph(module, module.graph, own=name == "")
        elif _worth_tracing(module):
            try:
                graph = _trace(module)
            except Exception as error:  # user code under the tracer may raise anything
                self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                log.debug("local tracing of %r failed", name, exc_info=True)
            else:
                self._read_graph(module, graph, own=False)

    def _read_graph(self, root: nn.Module, graph: fx.Graph, *, own: bool) -> None:
        for node in graph.nodes:
            if node.op == "get_attr":
                parameter = _resolve(root, node.target)
                if isinstance(parameter, nn.Parameter) and parameter.dim() >= 2:
                    found = uses_of(node, parameter.dim())
                    self.uses.setdefault(id(parameter), []).extend((own, use) for use in found)
            elif own and node.op == "call_module":
                self.calls.setdefault(node.target, []).append(node.name)

    def finding(self, names: list[str]) -> Finding:
        """Decide what the parameter with these names is (the first is the one it goes by)."""
        owner_name, _, attr = names[0].rpartition(".")
        owner = self.model.get_submodule(owner_name)
        parameter: nn.Parameter = getattr(owner, attr)
        known = self.known.get(id(parameter), [])
        uses = self.uses.get(id(parameter), [])
        layouts = {(fact.kind, fact.groups, fact.blocks) for fact in known if not fact.reason}
        layouts |= {(use.layout, use.groups, ()) for _, use in uses if use.kind == "weight"}
        reason, reached = self._why_dense(owner_name, owner, known, [use for _, use in uses], layouts)
        kind, groups, blocks = next(iter(layouts)) if len(layouts) == 1 else ("other", 1, ())
        nodes = [use.node.name for own, use in uses if own and use.kind == "weight"]
        nodes += [call for name in names for call in self.calls.get(name.rpartition(".")[0], [])]
        site = WeightSite(
            owner=owner_name,
            attr=attr,
            kind=kind,
            shape=tuple(parameter.shape),
            groups=groups,
            blocks=blocks,
            aliases=tuple(names[1:]),
            nodes=tuple(nodes),
        )
        if reason:
            return Finding(site=site, owner=owner, reason=reason, reached=reached)
        reason = _unsuitable(site)
        return Finding(site=site, owner=owner, reason=reason, compensated=bool(reason))

    def _why_dense(
        self, owner_name: str, owner: nn.Module, known: list[Known], uses: list[Use], layouts: set[Any]
    ) -> tuple[str, bool]:
        """(the reason the parameter can only stay dense or "", whether its use is understood)."""
        reasons = [fact.reason for fact in known if fact.reason]
        if layouts and (reasons or any(use.kind == "lookup" for use in uses)):
            return "tied with an embedding table, which is looked up whole", True
        if reasons:
            return reasons[0], True
        for use in uses:
            if use.kind in ("transformed", "unsupported"):
                return use.detail, False
        if len(layouts) > 1:
            return "its uses read it in different layouts, so its neurons are not the same rows", False
        if layouts:
            return "", True
        if any(use.kind == "lookup" for use in uses):
            return "an embedding table is looked up, not multiplied", True
        if uses:
            return "not a contraction weight: it only meets other operations", True
        if isinstance(owner, ParametrizationList) or lookup(owner) is not None:
            return _PARAMETRISED, False
        if isinstance(owner, torch.jit.ScriptModule):
            return "a scripted module is opaque to torch.fx", False
        if owner_name in self.failures:
            where = f"{owner_name!r} ({type(owner).__name__})" if owner_name else type(owner).__name__
            return f"the forward of {where} cannot be traced by torch.fx: {self.failures[owner_name]}", False
        return "no forward that torch.fx can follow reads it", False


def _unsuitable(site: WeightSite) -> str:
    rows, fan_in = site.matrix_shape
    if rows == 0 or fan_in == 0:
        return f"an empty weight of shape {site.shape}"
    if site.groups > 1 and fan_in == math.prod(site.shape[2:]):
        return "depthwise convolution: its fan-in is the kernel alone"
    return ""


def _parameter_names(model: nn.Module) -> Iterator[list[str]]:
    """The names of every parameter of two or more dimensions, all names of a tied one together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() >= 2:
            names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def _worth_tracing(module: nn.Module) -> bool:
    """Whether the module's own forward could use a weight that no other look at it would show.

    torch's own containers pass data through their children; one that holds a matrix itself is always looked at.
    """
    if isinstance(module, torch.jit.ScriptModule | ParametrizationList):
        return False
    if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
        return True
    own_code = not type(module).__module__.startswith("torch.nn.")
    return own_code and next(module.parameters(), None) is not None


def _trace(module: nn.Module) -> fx.Graph:
    """The graph of the module's own forward; whatever its code writes to the module under the tracer is undone."""
    attributes = module.__dict__.copy()
    buffers = dict(module._buffers)
    try:
        return ChildrenAsLeaves().trace(module)
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        module._buffers.clear()
        module._buffers.update(buffers)


@contextmanager
def _unchanged_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _resolve(root: nn.Module, target: str) -> object:
    value: object = root
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
