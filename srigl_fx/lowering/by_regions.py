"""Lowering a model that is not one graph: find regions, lower each, put the model together again and check it.

Owns the order of these steps, which regions are given up, and the report on the whole. It must not know how one graph
is lowered.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Comparison, Limit, Results, compare
from srigl_fx.errors import LoweringError, PassError, SriglError
from srigl_fx.lowering.lowered import LayerReport, LoweredModule, LoweringReport
from srigl_fx.lowering.regions import LoweredRegions, assemble, call_instead
from srigl_fx.lowering.verification import CapturedGraphError
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.nn.model_state import restored
from srigl_fx.passes import trees
from srigl_fx.passes.base import Note, brief
from srigl_fx.passes.capture import Capture, uncapturable
from srigl_fx.passes.capture_checks import first_line
from srigl_fx.passes.model_runs import run_model
from srigl_fx.passes.program import Program
from srigl_fx.passes.regions.finder import Region, RegionFinder
from srigl_fx.passes.sizes import At


@dataclass(frozen=True)
class _Lowered:
    """A region and its graph.

    ``full`` is the report on all weights of the model that lowering it gave, ``found`` how it compares with the
    sub-module on the recorded inputs; None where that was not asked for.
    """

    region: Region
    graph: LoweredModule
    full: LoweringReport
    found: Comparison | None


def lower_regions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    attempts: Capture,
    lower_one: Callable[[Program, nn.Module, bool], LoweredModule],
    *,
    verify: bool,
) -> LoweredRegions:
    """Lower the parts of ``model`` that can be captured.

    A region with which the model's own code fails, or does not give the same outputs, is given up, and the regions
    inside it are tried.

    Args:
        model: A model with masks, in eval mode.
        args: Example arguments.
        kwargs: Example keyword arguments.
        attempts: What came of the attempts to capture the model whole.
        lower_one: Lowers one graph, captured from the sub-module it is given too; True has the outputs compared after
            each pass. Its report is on all the weights of the model.
        verify: Put the largest error into the report, and raise where it is beyond the tolerance.

    Raises:
        CaptureError: There is no region.
        PassError: A pass failed, or is why the outputs differ, and does more than improve.
        LoweringError: The model cannot be copied, gives a sparse tensor, or does not give the same outputs.
    """
    finder = RegionFinder(model, args, kwargs, attempts.failures)
    _require_dense(model, finder.recording.output)

    def lowered(name: str) -> list[_Lowered]:
        return [_lower_one(region, lower_one, verify=verify) for region in finder.below(name)]

    kept = lowered("")
    if not kept:
        raise uncapturable(model, attempts)
    found = _compared(finder, kept, args, kwargs)
    if isinstance(found, str):
        waiting, kept = kept, []
        while waiting:
            candidate = waiting.pop(0)
            alone = _compared(finder, [*kept, candidate], args, kwargs)
            if isinstance(alone, str):
                finder.give_up(candidate.region, alone)
                waiting[:0] = lowered(candidate.region.name)
            else:
                kept.append(candidate)
                found = alone
    if not kept:
        raise uncapturable(model, Capture(None, tuple(finder.failures), attempts.cause))
    if isinstance(found, str):
        raise LoweringError(f"the parts of {type(model).__name__} do not make a whole: {found}")
    regions = {one.region.name: one.graph for one in kept}
    copied = assemble(model, regions, finder.recording.written)
    report = _report(finder, kept, copied, found if verify else None)
    return LoweredRegions(
        copied, regions, report, {one.region.name: (one.region.program.args, one.region.program.kwargs) for one in kept}
    )


def _lower_one(
    region: Region, lower_one: Callable[[Program, nn.Module, bool], LoweredModule], *, verify: bool
) -> _Lowered:
    """Lower a region; its report is on the weights that its graph reads."""
    try:
        try:
            return _attempt(region, lower_one, each_pass=False, verify=verify)
        except LoweringError as wrong:
            try:
                return _attempt(region, lower_one, each_pass=True, verify=verify)
            except (PassError, CapturedGraphError):
                raise
            except SriglError:
                raise wrong from None
    except (PassError, CapturedGraphError) as error:
        raise type(error)(f"in the region {region.name}: {error}") from error


def _attempt(
    region: Region, lower_one: Callable[[Program, nn.Module, bool], LoweredModule], *, each_pass: bool, verify: bool
) -> _Lowered:
    owned = {id(tensor) for tensor in region.program.module.parameters()}
    read = {weight.fqn for weight in sparse_weights(region.program.model) if id(weight.weight) in owned}
    elsewhere = {weight.fqn for weight in sparse_weights(region.program.model)} - read
    graph = lower_one(region.program, region.module, each_pass)
    inside = region.name + "."
    report = replace(
        graph.report,
        layers=tuple(replace(one, region=region.name) for one in graph.report.layers if one.fqn in read),
        others=tuple(one for one in graph.report.others if one.fqn.startswith(inside)),
        notes=tuple(
            note if note.where in read else _placed(note, region.name)
            for note in graph.report.notes
            if note.where not in elsewhere
        ),
    )
    inputs = [item and {**item, "any_rank": True} for item in graph.inputs] if region.any_rank else graph.inputs
    built = LoweredModule.build(graph, report, inputs)
    found = None
    if verify:
        inputs_at = region.program.inputs_at

        def got(at: At, _: int) -> list[Results]:
            try:
                return [_results(run_model(built, *inputs_at(at)))]
            except Exception as error:  # of any operator
                raise LoweringError(
                    f"the lowered region {region.name} fails at {at} ({brief(error)}), where the module does "
                    "not. A module whose sizes depend on more than its inputs cannot be verified: pass verify=False if "
                    "that is so"
                ) from error

        found = compare(
            region.program.trials,
            lambda at: [_results(run_model(region.module, *inputs_at(at)))],
            got,
            report.limit,
        )
        if found.wrong is not None:
            raise LoweringError(
                f"the lowered region {region.name} {found.wrong.off(report.limit)}{found.wrong.place} "
                f"({report.limit}). A module whose outputs depend on more than its inputs cannot be verified: pass "
                "verify=False if that is so"
            )
        built = LoweredModule.build(built, replace(report, max_error=found.worst, min_snr=found.snr), inputs)
    return _Lowered(region, built, graph.report, found)


def _placed(note: Note, region: str) -> Note:
    """A note that names its region: the names of weights do, "the graph" and those of nodes do not."""
    return note if note.where.startswith(f"{region}.") else replace(note, where=f"{region}: {note.where}")


def _compared(
    finder: RegionFinder, parts: list[_Lowered], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Comparison | str:
    """How the model with these parts lowered compares with the model, or what is wrong with its outputs."""
    copied = assemble(finder.model, {one.region.name: one.graph for one in parts}, finder.recording.written)
    ran: set[nn.Module] = set()
    hooks = [one.graph.register_forward_hook(lambda graph, *_: ran.add(graph)) for one in parts]
    try:
        output = run_model(copied, args, kwargs)
    except Exception as error:  # the model's own code, which did run before: any type
        return f"with its graph in place the code around it fails: {type(error).__name__}: {first_line(error)}"
    finally:
        for hook in hooks:
            hook.remove()
    if any(one.graph not in ran for one in parts):
        return "a copy of the model does not call it: a function inside the model holds on to the original"
    recorded, layers = finder.recording.output, tuple(layer for one in parts for layer in one.graph.report.layers)
    allowed = replace(parts[0].full, layers=layers).limit
    found = compare([None], lambda _: [_results(recorded)], lambda *_: [_results(output)], allowed)
    if (wrong := found.wrong) is not None:
        cause = _cause(finder, parts, args, kwargs, allowed)
        return f"with its graph in place {wrong.what} {wrong.off(allowed)} ({allowed}): {cause}"
    return found


def _cause(
    finder: RegionFinder, parts: list[_Lowered], args: tuple[Any, ...], kwargs: dict[str, Any], allowed: Limit
) -> str:
    """Why outputs are off: what remains of it where the same copy calls the model's own modules."""
    copied = assemble(finder.model, {one.region.name: one.graph for one in parts}, finder.recording.written)
    call_instead(copied, {one.region.name: one.region.module for one in parts})
    try:
        with restored(finder.model, copied=False):
            output = run_model(copied, args, kwargs)
        found = compare([None], lambda _: [_results(finder.recording.output)], lambda *_: [_results(output)], allowed)
        is_right = found.wrong is None
    except Exception:  # the model's own code
        is_right = False
    if is_right:
        return "the rest of the model makes that of how the graph rounds, as with the module itself they are right"
    return "the code around it reads its weights, or the outputs depend on more than the inputs"


def _require_dense(model: nn.Module, output: Any) -> None:
    """Require outputs that can be compared: of sparse tensors PyTorch compares none."""
    leaves, spec = pytree.tree_flatten(output)
    for path, leaf in zip(trees.leaf_paths(spec), leaves, strict=True):
        for tensor in _leaves(leaf, set()):
            if isinstance(tensor, Tensor) and tensor.layout is not torch.strided:
                which = f"the output {'.'.join(path)!r}" if path else "the output"
                raise LoweringError(
                    f"{which} of {type(model).__name__} is a sparse tensor ({tensor.layout}), which cannot be compared "
                    "with the lowered model's: return it as to_dense(), or lower the part of the model that comes "
                    "before it is made sparse"
                )


def _results(output: Any) -> Results:
    """What there is to compare of an output."""
    return Results(list(_leaves(output, set())))


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """The tensors and numbers of an output, also those in objects that are no containers of torch's."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor | bool | int | float | str | None):
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _leaves(list(getattr(leaf, "__dict__", {}).values()), seen)


def _report(finder: RegionFinder, parts: list[_Lowered], copied: nn.Module, whole: Comparison | None) -> LoweringReport:
    reports = [one.graph.report for one in parts]
    full = parts[0].full
    alive = {id(parameter) for parameter in copied.parameters()}
    known = {layer.fqn: layer for layer in full.layers}
    compared = [one for one in (whole, *(part.found for part in parts)) if one is not None]
    local = sum("module-local" in one.region.program.how for one in parts)
    return LoweringReport(
        layers=tuple(
            _layer(finder, weight, known[weight.fqn], parts, alive) for weight in sparse_weights(finder.model)
        ),
        others=full.others,
        capture=f"{len(parts)} regions ({len(parts) - local} by torch.export, {local} module-local), the rest eager",
        dynamic_batch=all(report.dynamic_batch for report in reports),
        max_error=max((one.worst for one in compared), default=None),
        min_snr=min((one.snr for one in compared if one.snr is not None), default=None),
        removals=tuple(removal for report in reports for removal in report.removals),
        notes=tuple(note for report in reports for note in report.notes),
        capture_failures=tuple(finder.failures),
        value_dtype=full.value_dtype,
    )


def _layer(
    finder: RegionFinder, weight: SparseWeight, known: LayerReport, parts: list[_Lowered], alive: set[int]
) -> LayerReport:
    """What became of one weight in all regions that read it."""
    found = [(one, layer) for one in parts for layer in one.graph.report.layers if layer.fqn == weight.fqn]
    if not found:
        owner = weight.fqn.rpartition(".")[0]
        return replace(known, decision="dense", reason=finder.why_not(owner), bytes_after=known.bytes_before)
    best = next((layer for _, layer in found if layer.decision != "dense"), found[0][1])
    dense = weight.weight.nbytes
    stored = sum(
        layer.bytes_after - dense * any(tensor is weight.weight for tensor in one.graph.parameters())
        for one, layer in found
    )
    kept = id(weight.weight) in alive
    reason = best.reason
    if kept and best.decision != "dense" and not reason:
        reason = "its dense form is kept: it is read outside that region too"
    names = ", ".join(one.region.name for one, _ in found)
    return replace(best, region=names, reason=reason, bytes_after=stored + dense * kept)
