"""Find every weight of a model, and how its neurons lie in it.

Owns discovery; it must not know which of the weights will be made sparse. Works without example inputs, and then never
runs the model: each module's own forward is traced by torch.fx with its children as leaves, and only to look at.

Rules:
    1. A module of a registered type names its own weights (:mod:`srigl_fx.passes.sites.registry`).
    2. Any other module is traced by torch.fx with its children as leaves (:mod:`srigl_fx.passes.sites.local_trace`); a
       GraphModule brings its graph. The data flow from each parameter of two or more dimensions, its own or a child's,
       decides (:mod:`srigl_fx.passes.sites.weight_uses`).
    3. A tied parameter is one weight, under the first of its names in registration order. Where it is also an embedding
       table, or its uses disagree on the layout, it stays dense.
    4. A depthwise convolution stays dense: its fan-in is the kernel alone.
    5. With example inputs, one forward pass over them (:mod:`srigl_fx.passes.sites.census`) decides what the graphs did
       not: forwards that cannot be traced, sizes known only then. Each site then also says whether it feeds an output,
       and a note names the weights that were not used. Lazy modules get their shapes from that pass.
    6. What could not be traced is reported with the error that stopped the tracer, as not reached.
    7. A weight whose values are not real floating-point numbers of 16 bits or more stays dense.
    8. The data flow through the whole model says what the neurons of each weight are to the rest of it
       (:mod:`srigl_fx.passes.sites.roles`).
    9. A weight that is transformed before it is used goes by what can be masked behind the transform
       (:mod:`srigl_fx.passes.sites.transformed_weights`). One that ``torch.nn.utils.prune`` masks on its own stays
       dense until that is made permanent.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn
from torch.jit import ScriptModule
from torch.nn.utils.parametrize import ParametrizationList, type_before_parametrizations

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.presence import pruned_by_torch
from srigl_fx.masks.records import Role, WeightSite
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.draft import Draft, Finding
from srigl_fx.passes.sites.census import initialise_lazy, uses_on, weights_feeding_outputs
from srigl_fx.passes.sites.local_trace import Trace, traces_of
from srigl_fx.passes.sites.parametrised_weights import as_stored
from srigl_fx.passes.sites.registry import Known, lookup
from srigl_fx.passes.sites.roles import roles_of
from srigl_fx.passes.sites.transformed_weights import TransformedWeights
from srigl_fx.passes.sites.weight_layout import Layout
from srigl_fx.passes.sites.weight_uses import ParameterUse, uses_in

_REAL = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


@dataclass(frozen=True)
class Discover(Pass[Draft]):
    """Fill ``draft.findings`` with every parameter of two or more dimensions (rules 1-9 of the module)."""

    example_inputs: Any = None

    def requires(self, subject: Draft) -> None:
        """Every parameter must have its shape and its values, and be one that training can write."""
        if isinstance(subject.model, ScriptModule):
            raise SparsifyError("a scripted model is opaque to torch.fx; call sparsify on the model it was made from")
        if self.example_inputs is not None:
            initialise_lazy(subject.model, self.example_inputs)
        for name, parameter in subject.model.named_parameters():
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                raise SparsifyError(
                    f"the parameter {name!r} of a lazy module has no shape yet; pass example_inputs, or run the "
                    "model once on a batch, then call sparsify"
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
            evidence.roles = roles_of(model, evidence.traces)
        names = list(_parameter_names(model))
        if self.example_inputs is None:
            subject.findings = [evidence.finding(each) for each in names]
            return PassResult(subject=subject, changed=False)
        evidence.seen = uses_on(model, self.example_inputs)
        subject.findings = self._with_outputs(model, [evidence.finding(each) for each in names])
        unused = [each[0] for each in names if id(model.get_parameter(each[0])) not in evidence.seen]
        notes = tuple(Note(where=name, reason="no use of it was seen on the example inputs") for name in unused)
        return PassResult(subject=subject, changed=False, notes=notes)

    def _with_outputs(self, model: nn.Module, findings: list[Finding]) -> list[Finding]:
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
        self.uses: dict[int, list[tuple[bool, ParameterUse]]] = {}  # (the graph is the model's own, the use)
        self.seen: dict[int, list[ParameterUse]] = {}  # uses in a run on the example inputs
        self.calls: dict[str, list[str]] = {}  # module FQN -> call_module nodes of the model's own graph
        self.failures: dict[str, str] = {}
        self.transformed = TransformedWeights()
        self.roles: dict[int, Role] = {}
        self._traced: dict[int, tuple[list[Trace], Iterator[Trace]]] = {}

    def traces(self, module: nn.Module) -> Iterator[Trace]:
        """The ways through a module's forward; each is traced once, when it is first asked for."""
        seen, rest = self._traced.setdefault(id(module), ([], traces_of(module)))
        for position in itertools.count():
            if position == len(seen):
                following = next(rest, None)
                if following is None:
                    return
                seen.append(following)
            yield seen[position]

    def look_at(self, name: str, module: nn.Module) -> None:
        known = lookup(module)
        stored = self.transformed.look_at(name, module)
        if known is not None:  # rule 1
            for attr, fact in known.items():
                parameter = stored[attr].parameter if attr in stored else getattr(module, attr)
                self.known.setdefault(id(parameter), []).append(fact)
            return
        # Rule 2.
        if isinstance(module, fx.GraphModule):
            self._read_graph(module, module.graph, own=name == "")
        elif _worth_tracing(module):
            found, failures = [], []
            for trace in self.traces(module):
                found.append(self._read_graph(module, trace.graph, own=False, constants=trace.constants))
                failures.append(trace.failure)
                if not trace.failure and not self._has_open_weights(module):  # further ways would show nothing new
                    break
            if all(failures):  # rule 6
                self.failures[name] = failures[0]
            self.transformed.read(name, module, found, traced=not all(failures))

    def _has_open_weights(self, module: nn.Module) -> bool:
        """Whether a parameter that no other forward accounts for was not seen as a weight yet."""
        held = [*module.parameters(recurse=False)]
        bare = [child for child in module.children() if getattr(type(child), "forward", None) is nn.Module.forward]
        held += [parameter for child in bare for parameter in child.parameters()]
        return any(p.dim() >= 2 and all(use.kind == "none" for _, use in self.uses.get(id(p), ())) for p in held)

    def _read_graph(
        self, root: nn.Module, graph: fx.Graph, *, own: bool, constants: Mapping[str, object] = MappingProxyType({})
    ) -> dict[int, list[ParameterUse]]:
        graph = as_stored(root, graph)
        uses = uses_in(graph, lambda target: constants[target] if target in constants else _resolve(root, target))
        for source, found in uses.items():
            self.uses.setdefault(source, []).extend((own, use) for use in found)
        if own:
            for node in graph.find_nodes(op="call_module"):
                self.calls.setdefault(node.target, []).append(node.name)
        return uses

    def finding(self, names: list[str]) -> Finding:
        """Decide what the parameter with these names is (the first is the one it goes by)."""
        owner_name, _, attr = names[0].rpartition(".")
        owner = self.model.get_submodule(owner_name)
        parameter: nn.Parameter = getattr(owner, attr)
        if unsupported := _unsupported_dtype(parameter):  # rule 7
            site = WeightSite(owner=owner_name, attr=attr, kind="other", shape=tuple(parameter.shape))
            return Finding(site=site, owner=owner, reason=unsupported)
        known = self.known.get(id(parameter), [])
        uses = self.uses.get(id(parameter), [])
        # Rule 5.
        evidence = _conclusive([use for _, use in uses], self.seen.get(id(parameter), []))
        layouts = [fact.layout_of(parameter) for fact in known if not fact.reason]
        # Rule 9.
        evidence, transforms = self.transformed.settle(parameter, owner, evidence, layouts)
        holder = self.transformed.holder(parameter, owner)
        layouts += [use.layout for use in evidence if use.layout is not None]
        reason, reached = self._why_dense(owner_name, owner, attr, known, evidence, layouts)
        if not reached and self.seen and id(parameter) not in self.seen and not isinstance(owner, ScriptModule):
            reason = f"no use of it was seen on the example inputs, and {reason}"
        layout = layouts[0] if layouts and len(set(layouts)) == 1 else Layout.usual("other", parameter.shape)
        nodes = [use.node.name for own, use in uses if own and use.node is not None and use.kind == "weight"]
        nodes += [call for name in names for call in self.calls.get(name.rpartition(".")[0], [])]
        site = WeightSite(
            owner=owner_name,
            attr=attr,
            kind=layout.kind,
            shape=tuple(parameter.shape),
            groups=layout.groups,
            view=layout.view,
            neuron_axes=layout.neuron_axes,
            input_axes=layout.input_axes,
            blocks=layout.blocks,
            aliases=tuple(names[1:]),
            nodes=tuple(nodes),
            role=self.roles.get(id(parameter)),
        )
        if reason:
            return Finding(site=site, owner=holder, reason=reason, reached=reached)
        reason = _unsuitable(site)
        # Of an empty one there is nothing to make up for.
        compensated = bool(reason) and parameter.numel() > 0
        return Finding(site=site, owner=holder, reason=reason, compensated=compensated, transforms=transforms)

    def _why_dense(
        self,
        owner_name: str,
        owner: nn.Module,
        attr: str,
        known: list[Known],
        uses: list[ParameterUse],
        layouts: list[Layout],
    ) -> tuple[str, bool]:
        """(the reason the parameter can only stay dense or "", whether its use is understood)."""
        if (pruned := pruned_by_torch(owner).get(attr)) is not None:  # rule 9: two masks would fight over the values
            return (
                f"torch.nn.utils.prune computes {pruned!r} from it: call prune.remove(layer, {pruned!r}) first",
                False,
            )
        reasons = [fact.reason for fact in known if fact.reason]
        # Rule 3: the mask of the contraction would thin out what is looked up.
        if layouts and (reasons or any(use.kind == "lookup" for use in uses)):
            return "tied with an embedding table, which is looked up whole", True
        if reasons:  # rule 1
            return reasons[0], True
        for use in uses:
            if use.kind in ("transformed", "unsupported"):
                return use.detail, False
        if len(set(layouts)) > 1:  # rule 3
            return "its uses read it in different layouts, so its neurons are not the same rows", False
        if layouts:
            return "", True
        if any(use.kind == "lookup" for use in uses):
            return "an embedding table is looked up, not multiplied", True
        # A trace that stopped early may have missed the contraction; a run has seen all that happened.
        if uses and (owner_name not in self.failures or self.seen):
            detail = next((use.detail for use in uses if use.detail), "it only meets other operations")
            return f"not a contraction weight: {detail}", True
        if isinstance(owner, ParametrizationList):
            return "its values come from a parametrisation that is not understood", False
        if isinstance(owner, ScriptModule):
            return "a scripted module cannot take a mask any more; call sparsify before torch.jit.script", False
        if owner_name in self.failures:  # rule 6
            where = f"{owner_name!r} ({type(owner).__name__})" if owner_name else type(owner).__name__
            return f"the forward of {where} cannot be traced by torch.fx: {self.failures[owner_name]}", False
        return "no forward that torch.fx can follow reads it", False


def _conclusive(traced: list[ParameterUse], seen: list[ParameterUse]) -> list[ParameterUse]:
    """What was seen to happen, where only that shows the weight in a contraction; else what the graphs show."""
    if any(use.kind == "weight" for use in seen) and not any(use.kind == "weight" for use in traced):
        return seen
    return traced or seen


def _unsupported_dtype(parameter: nn.Parameter) -> str:
    """Why values of this type cannot be masked and trained, or ""."""
    if parameter.is_complex():
        return "complex weights are not supported"
    if parameter.dtype in _REAL:
        return ""
    return f"weights of type {str(parameter.dtype).removeprefix('torch.')} are not supported"


def _unsuitable(site: WeightSite) -> str:
    rows, fan_in = site.matrix_shape
    if rows == 0 or fan_in == 0:
        return f"an empty weight of shape {site.shape}"
    if site.groups > 1 and fan_in == math.prod(site.shape[2:]):  # rule 4
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
    if isinstance(module, ScriptModule | ParametrizationList):
        return False
    if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
        return True
    own_code = not type_before_parametrizations(module).__module__.startswith("torch.nn.")
    return own_code and next(module.parameters(), None) is not None


@contextmanager
def _unchanged_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def _resolve(root: nn.Module, target: str) -> object:
    value: object = root
    for part in target.split("."):
        value = getattr(value, part, None)
    return value
