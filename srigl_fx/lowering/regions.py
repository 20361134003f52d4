"""What lowering returns for a model that is not one graph: a copy of it, parts of which run as lowered graphs.

Owns :class:`LoweredRegions` and how a lowered graph takes the place of a sub-module. It must not know how regions are
found or lowered.

The copy shares parameters with the model. A sub-module that is replaced keeps its class, its name and its attributes,
so that code around it which reads them goes on working; tensors that its graph no longer reads leave a stand-in of the
same type and shape, filled with NaN and taking no memory, so that code which computes with them is found out.
"""

import copy
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from srigl_fx.errors import LoweringError
from srigl_fx.lowering.lowered import LoweredModule, LoweringReport
from srigl_fx.masks.records import records_on
from srigl_fx.nn.sparse_module import detach_masks
from srigl_fx.passes.example_inputs import Inputs
from srigl_fx.recipe_parts import only
from srigl_fx.recipes import Recipe

_GRAPH = "_srigl_fx_graph"
_CLASSES: "weakref.WeakKeyDictionary[type[nn.Module], type[nn.Module]]" = weakref.WeakKeyDictionary()


class LoweredRegions(nn.Module):
    """A lowered model that torch.export cannot capture whole: its own code around graphs of its parts.

    It takes and returns what the model does, keeps its report through ``copy.deepcopy``, and may be called from several
    threads.

    Attributes:
        model: The copy of the model.
        graphs: The lowered graphs, in the order of :attr:`regions`.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Mapping[str, LoweredModule],
        report: LoweringReport,
        region_inputs: Mapping[str, Inputs],
    ) -> None:
        """Put together what :func:`assemble` made of the model, and what is known of it."""
        super().__init__()
        self.model = model
        self.graphs = nn.ModuleList(regions.values())
        self._names = tuple(regions)
        self._report = report
        self._region_inputs = dict(region_inputs)
        self.eval()

    def __repr__(self) -> str:
        graphs = f"{len(self._names)} graph{'' if len(self._names) == 1 else 's'}"
        return f"LoweredRegions({graphs} in {type(self.model).__name__}: {self._report.outline})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    @property
    def report(self) -> LoweringReport:
        """What was lowered, what was not, and why; ``str()`` is a table."""
        return self._report

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the model that was lowered; None where it had none, or parts of it have their own."""
        return only(self.recipes)

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of the model's parts, as :func:`srigl_fx.recipes.recipes_of` gives them."""
        return next((graph.recipes for graph in self.regions.values()), {})

    @property
    def regions(self) -> dict[str, LoweredModule]:
        """The lowered graphs by the names of the sub-modules they stand for: each can be saved and exported."""
        return cast("dict[str, LoweredModule]", dict(zip(self._names, self.graphs, strict=True)))

    @property
    def region_inputs(self) -> dict[str, Inputs]:
        """Example inputs of each region as (args, kwargs): one of the calls that the example inputs led to."""
        return self._region_inputs

    def save(self, path: str | os.PathLike[str]) -> NoReturn:
        """Not possible: such a model's own code is not part of any file.

        Raises:
            LoweringError: Always; regions can be saved one by one.
        """
        raise LoweringError(
            f"cannot save {path}: the model is not one graph, but its own code around {len(self._names)} graphs "
            f"({', '.join(self._names)}), and code has no file form; save a region with "
            "lowered.regions[name].save(path), or lower the model again where it is needed"
        )


def assemble(model: nn.Module, regions: Mapping[str, LoweredModule], written: Iterable[str] = ()) -> nn.Module:
    """A copy of ``model`` in which the sub-modules named in ``regions`` run as those graphs.

    Args:
        model: A model with masks; unchanged.
        regions: Lowered graphs by the names of sub-modules.
        written: The names of the buffers that the model writes into: these are copied, all others shared.

    Raises:
        LoweringError: The model cannot be copied.
    """
    copied = _copy(model, set(written))
    for module in copied.modules():
        if records_on(module) and not isinstance(module, torch.jit.ScriptModule):
            detach_masks(module)
    heads = {name: copied.get_submodule(name) for name in regions}
    for name, module in heads.items():
        _replace(module, name, regions[name])
    used = {id(tensor) for graph in regions.values() for tensor in (*graph.parameters(), *graph.buffers())}
    outside = _reachable(copied, set(heads.values()))
    for head in heads.values():
        for module in head.modules():
            if module not in outside:
                _release(module, used)
        if not any(True for _ in head.parameters()):
            # Code around it may ask for the type or device of its first parameter.
            head.register_parameter(_GRAPH + "_empty", nn.Parameter(torch.empty(0), requires_grad=False))
    return copied


def call_instead(copied: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Let a copy that :func:`assemble` made call these modules in the place of its graphs, by the same names."""
    for name, module in modules.items():
        vars(copied.get_submodule(name))[_GRAPH] = (name, module)


def _copy(model: nn.Module, written: set[str]) -> nn.Module:
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    memo |= {id(buffer): buffer.clone() if name in written else buffer for name, buffer in model.named_buffers()}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            memo[id(module)] = module
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that the forward pass computes
                memo[id(value)] = value.detach()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise LoweringError(
            f"{type(model).__name__} cannot be copied ({error}), and so not be lowered in parts: remove attributes "
            "that copy.deepcopy does not take (locks, files, generators), or make it a model that torch.export captures"
        ) from error


def _reachable(root: nn.Module, barriers: set[nn.Module]) -> set[nn.Module]:
    """The modules below ``root`` that can be reached without entering one of ``barriers``."""
    found: set[nn.Module] = set()
    waiting = [root]
    while waiting:
        module = waiting.pop()
        if module not in found and module not in barriers:
            found.add(module)
            waiting += [child for child in module._modules.values() if child is not None]
    return found


def _replace(module: nn.Module, name: str, graph: LoweredModule) -> None:
    """Let ``module`` run ``graph``, in which its own hooks are captured."""
    for attribute, value in vars(module).items():
        if attribute.startswith(("_forward_hooks", "_forward_pre_hooks")):
            value.clear()
    vars(module).pop("forward", None)
    vars(module)[_GRAPH] = (name, graph)  # not a child: code around it may iterate over those
    module.__class__ = _graph_class(type(module))


class _RunsGraph:
    """What a replaced sub-module does; mixed in before its own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, graph = vars(self)[_GRAPH]
        try:
            return graph(*args, **kwargs)
        except LoweringError as error:
            raise LoweringError(f"in the region {name}: {error}") from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A generated class cannot be pickled by name: rebuild it from its base.
        return _blank, (type(self).__mro__[2],), cast(Any, self).__getstate__()


def _graph_class(base: type[nn.Module]) -> type[nn.Module]:
    if base not in _CLASSES:
        namespace = {"__module__": base.__module__, "__doc__": base.__doc__}
        _CLASSES[base] = type(f"Lowered{base.__name__}", (_RunsGraph, base), namespace)
    return _CLASSES[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    cls = _graph_class(base)
    return cls.__new__(cls)


def _release(module: nn.Module, used: set[int]) -> None:
    """Replace the tensors of ``module`` that no graph reads by stand-ins."""
    for store in (module._parameters, module._buffers):
        for name, tensor in list(store.items()):
            if tensor is not None and id(tensor) not in used:
                del store[name]
                module._non_persistent_buffers_set.discard(name)
                value = float("nan") if tensor.is_floating_point() else 0
                vars(module)[name] = torch.full((), value, dtype=tensor.dtype, device=tensor.device).expand(
                    tensor.shape
                )
