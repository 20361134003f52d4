"""The parts of a model that can be captured, where the model as a whole cannot.

Owns the search for regions: the largest sub-modules that ``torch.export`` captures and that, between them, reach as
many mask-managed weights as can be reached. It must not know what is done with a region, nor the graph passes.

A region's program names the whole model as its ``model``: weights keep their full names, and one that is tied across
regions is known in each.

1. From the top down: a module is tried before its children, which are looked at only where it fails. A module without
   masked weights is left alone, and one that has several names is tried under the first.
2. A module compiled by TorchScript has no graph that can be rewritten, nor have those below it.
3. A single layer's graph is built by hand (:mod:`srigl_fx.passes.regions.module_local`), which is quick and takes any
   leading shape. Any other module is exported.
4. After two failures of a class of which nothing was ever captured, further modules of it are not tried: an attempt at
   export takes seconds, and a model has many blocks of one class. Their children are.
5. One graph must serve all recorded calls of the module: the same structure and constants, and tensors of the same
   types and ranks. Sizes that differ from call to call must be free in the graph; the leading one may be.
6. A module that writes into buffers, or holds a TorchScript module, is not tried: a part of a model must not write
   where the rest of it may read, and export cannot look into TorchScript.
7. Nor is one whose outputs change from call to call with what it keeps in other attributes (a counter, a cache): a
   graph would give those of the first call for ever.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srigl_fx.errors import CaptureError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.capture import Failure, capture_region
from srigl_fx.passes.capture_checks import class_name
from srigl_fx.passes.model_runs import run_steps
from srigl_fx.passes.program import Program
from srigl_fx.passes.regions.module_local import module_local
from srigl_fx.passes.regions.recording import ModuleCall, Recording, record
from srigl_fx.passes.tracing import plain_experts

_ENOUGH = 2  # failed modules of a class of which none was captured, after which further ones are not tried


@dataclass(frozen=True)
class Region:
    """A sub-module with a graph of its own.

    Attributes:
        name: Its fully-qualified name.
        module: The sub-module, as the model holds it.
        program: Its graph, with one of its recorded calls as example inputs.
        any_rank: Whether it takes inputs of any number of leading dimensions.
    """

    name: str
    module: nn.Module
    program: Program
    any_rank: bool = False


class RegionFinder:
    """Searches one model for regions, top-down; what could not be captured is in ``failures``.

    Example:
        >>> import srigl_fx as sx
        >>> class Branches(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(16, 8)
        ...     def forward(self, x):
        ...         return self.fc(x) if x.sum() > 0 else x
        >>> finder = RegionFinder(sx.sparsify(Branches(), sparsity=0.5).eval(), (torch.ones(2, 16),), {})
        >>> [region.name for region in finder.below("")]
        ['fc']
    """

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], failures: tuple[Failure, ...] = ()
    ) -> None:
        """Run ``model`` once on the inputs to record what its sub-modules are called with.

        ``failures`` are those of the attempts on the model itself.
        """
        self.model = model
        self.recording: Recording = record(model, args, kwargs)
        self.failures = list(failures)
        self.exports = 0
        self._masked = {id(weight.weight) for weight in sparse_weights(model)}
        self._seen = {id(model)}
        self._failed: Counter[type] = Counter()
        self._captured: set[type] = set()

    def below(self, name: str) -> list[Region]:
        """The regions among the children of the module ``name`` and theirs; each module is looked at once."""
        module = self.model.get_submodule(name) if name else self.model
        found: list[Region] = []
        for child_name, child in _children(module):
            found += self._visit(f"{name}.{child_name}" if name else child_name, child)
        return found

    def why_not(self, owner: str) -> str:
        """Why the weights that the module ``owner`` holds are in no region."""
        failures = [failure for failure in self.failures if _within(owner, failure.name)]
        module = self.model.get_submodule(owner) if owner else self.model
        called = module in self.recording.calls or isinstance(module, torch.jit.ScriptModule)
        hint = "" if called else f" ({owner} is not called on the example inputs)"
        return f"in no captured region: {max(failures, key=lambda failure: len(failure.name))}{hint}"

    def give_up(self, region: Region, error: str) -> None:
        """Enter a region among the failures: it can be captured, but not be used."""
        self.failures.append(
            Failure(name=region.name, type=class_name(region.module), attempt=region.program.how, error=error)
        )

    def _visit(self, name: str, module: nn.Module) -> list[Region]:
        # Rule 1.
        if id(module) in self._seen or not any(id(parameter) in self._masked for parameter in module.parameters()):
            return []
        self._seen.add(id(module))
        if isinstance(module, torch.jit.ScriptModule):  # rule 2
            self._fail(name, module, "it is compiled by TorchScript, which has no graph that can be rewritten")
            return []
        calls = self.recording.calls.get(module)
        region = self._region(name, module, calls) if calls else None
        return [region] if region else self.below(name)

    def _region(self, name: str, module: nn.Module, calls: list[ModuleCall]) -> Region | None:
        local = module_local(self.model, module, calls)
        if local is not None:  # rule 3; a convolution has a fixed rank
            return Region(name, module, local, any_rank=isinstance(module, nn.Linear))
        # Rule 4.
        if self._failed[type(module)] >= _ENOUGH and type(module) not in self._captured:
            self._fail(name, module, f"as {_ENOUGH} others of its class")
            return None
        try:
            example, free, varying = _merge(calls)  # rule 5
            # Rule 6.
            if written := sorted(buffer for buffer in self.recording.written if _within(buffer, name)):
                raise CaptureError(f"it writes into {', '.join(written)}")
            if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
                raise CaptureError("a module inside it is compiled by TorchScript")
            # Rule 7.
            kept = [attribute for attribute in self.recording.changed if _within(attribute, name)]
            if kept and _changes_its_outputs(module, example):
                raise CaptureError(f"its outputs depend on what it keeps in {', '.join(kept)}")
        except CaptureError as error:
            self._fail(name, module, str(error))
            return None
        self.exports += 1
        args, kwargs = example.inputs
        with plain_experts(self.model):
            done = capture_region(module, args, kwargs, free, varying, name)
        if done.program is None:
            self.failures += done.failures[:1]
            self._failed[type(module)] += 1
            return None
        self._captured.add(type(module))
        done.program.model = self.model
        return Region(name, module, done.program)

    def _fail(self, name: str, module: nn.Module, error: str) -> None:
        self.failures.append(Failure(name=name, type=class_name(module), attempt="not tried", error=error))


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            yield name, child


def _within(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(part + ".")


def _changes_its_outputs(module: nn.Module, call: ModuleCall) -> bool:
    """Whether calls in a row on the same inputs give different outputs."""
    first, *others = (run.results.outputs for run in run_steps(module, *call.inputs))
    return any(not _equal(one, other) for outputs in others for one, other in zip(first, outputs, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one.nan_to_num(), other.nan_to_num())
    return bool(one == other)


def _merge(calls: list[ModuleCall]) -> tuple[ModuleCall, dict[int, frozenset[int]], dict[int, frozenset[int]]]:
    """Rule 5: the call to capture with, and by flat input the sizes that may and those that must be free.

    Raises:
        CaptureError: One graph cannot serve all calls.
    """
    if problem := next((call.problem for call in calls if call.problem), ""):
        raise CaptureError(problem)
    first = calls[0]
    if any(call.spec != first.spec for call in calls):
        raise CaptureError("its calls differ in the number or structure of their inputs")
    free, varying = {}, {}
    for position, leaves in enumerate(zip(*(call.leaves for call in calls), strict=True)):
        if not isinstance(leaves[0], Tensor):  # export makes a part of the graph of what is no tensor
            if any(type(leaf) is not type(leaves[0]) or leaf != leaves[0] for leaf in leaves):
                raise CaptureError(f"the constant input {position} differs from call to call")
            continue
        if any(not isinstance(x, Tensor) or x.dtype != leaves[0].dtype or x.dim() != leaves[0].dim() for x in leaves):
            raise CaptureError(f"input {position} differs in type or rank from call to call")
        if leaves[0].dim():
            vary = frozenset(dim for dim in range(leaves[0].dim()) if len({leaf.shape[dim] for leaf in leaves}) > 1)
            free[position] = vary | {0}
            if vary:
                varying[position] = vary
    # Export takes sizes of 0 and 1 for constants: the call that has the largest among its smallest.
    example = max(
        calls, key=lambda call: min((call.leaves[i].shape[d] for i, dims in free.items() for d in dims), default=0)
    )
    # Nor can it free the size of an empty batch, and there is no sample to repeat: it is made one of two.
    roomy = [
        leaf.new_zeros((2, *leaf.shape[1:])) if i in free and not leaf.shape[0] else leaf
        for i, leaf in enumerate(example.leaves)
    ]
    return ModuleCall(roomy, example.spec), free, varying
