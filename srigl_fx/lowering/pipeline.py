"""``lower``: from masks to condensed operators, as one pipeline of passes.

Owns the verb, the checks before and the verification after. It must not know how any single step works.
"""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from srigl_fx.comparison import Comparison
from srigl_fx.compatibility import noted
from srigl_fx.errors import LoweringError, PassError, SriglError
from srigl_fx.lowering.by_regions import lower_regions
from srigl_fx.lowering.calibration_inputs import Calibration, calibration_inputs, check_calibration
from srigl_fx.lowering.dump import Dump, clear, folder_of_part
from srigl_fx.lowering.inputs import describe_inputs
from srigl_fx.lowering.layer_costs import estimated_costs, layer_costs
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.program_report import report_on
from srigl_fx.lowering.regions import LoweredRegions
from srigl_fx.lowering.tables import check_table_dtype, with_rounded_tables
from srigl_fx.lowering.value_dtypes import ValueDtypes, value_dtypes
from srigl_fx.lowering.verification import CapturedGraphError, checked, second_check, verify_lowered
from srigl_fx.masks import input_orders, invariants
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.asked_sizes import DynamicShapes, wishes
from srigl_fx.passes.base import Pass, run
from srigl_fx.passes.calibrate import Calibrate
from srigl_fx.passes.capture import EXPORT_LOCK, Capture, Failure, capture_whole, uncapturable
from srigl_fx.passes.capture_sizes import capture_with
from srigl_fx.passes.example_inputs import Inputs, normalise_inputs
from srigl_fx.passes.feature_major import FeatureMajor
from srigl_fx.passes.hugging_face import register_caches
from srigl_fx.passes.pipelines import LOWERING, whole
from srigl_fx.passes.program import Costs, Program, enter_masks
from srigl_fx.passes.select import Select
from srigl_fx.passes.usual_sizes import capture_usual
from srigl_fx.passes.wrappers import unwrapped
from srigl_fx.recipes import recipes_of
from srigl_fx.runtime.costs.cost_model import ONNXRUNTIME

EXPECTED_BATCHES = (1, 16)  # what a model is served with, where nobody says


@noted
def lower(
    model: nn.Module,
    example_inputs: Any,
    *,
    target: Literal["cpu"] = "cpu",
    min_speedup: float | Literal["auto"] = 1.0,
    batch_sizes: Sequence[int] | None = None,
    dynamic_shapes: DynamicShapes | None = None,
    value_dtype: ValueDtypes = torch.float32,
    calibration: Calibration | None = None,
    embedding_dtype: torch.dtype = torch.float32,
    verify: bool | Literal["each pass"] = True,
    passes: Sequence[Pass[Program]] = LOWERING,
    dump: str | os.PathLike[str] | None = None,
) -> LoweredModule | LoweredRegions:
    """Lower a sparse-trained model: its masks become condensed custom operators.

    The model itself is unchanged. Condensed weights are copies, and so are buffers that the forward pass writes: the
    result keeps its own state. Every other parameter and buffer of the result is the model's own, so training the model
    on afterwards changes those: lower a ``copy.deepcopy`` to have nothing in common.

    Args:
        model: A model with masks, in eval mode, float32 on the CPU; in ``torch.compile``'s module or a data-parallel
            wrapper, the model inside is lowered.
        example_inputs: A tuple of arguments, or (args, kwargs). A leading dimension that the inputs share becomes a
            dynamic batch where the model allows it, unless ``dynamic_shapes`` says which sizes are free.
        target: The hardware; "cpu" is the only one so far.
        min_speedup: A layer is condensed only if measured at least this much faster than dense on this machine; else it
            is computed densely on its active rows if that is, else left dense. 0 condenses all, without measuring;
            "auto", the default of :func:`srigl_fx.export_onnx`, measures nothing either, and condenses what the cost
            model does not expect to lose in ONNX Runtime at one sample and at 16.
            Times are kept in the folder that SRIGL_FX_CACHE names (``~/.cache/srigl_fx``) and used again. If
            ``min_speedup <= 1``, a linear layer is not timed when the cost model already says that one form is 3 times
            as fast as the other.
        batch_sizes: The batch sizes to measure at; by default the one of the example inputs.
        dynamic_shapes: Which sizes of the inputs are free, as ``torch.export`` takes it: by input (a dict by the names
            of the forward's arguments, or a tuple by position) and axis, a name, a ``torch.export.Dim``, ``Dim.AUTO``
            or ``Dim.DYNAMIC``; all others are those of the example. A name may be a sum, as "past + 1", and a dict by
            axis in the place of a cache is for all its tensors. "auto" frees every size that the model does not tie. By
            default, the batch, and the number of tokens where the model allows it: the second axis of integer inputs
            of two axes, and of masks, positions and types as long. The report says which sizes are free, and which of
            these or of "auto" are not, and why.
        value_dtype: What condensed weights are stored in: ``torch.float32``, or ``torch.bfloat16`` or ``torch.float16``
            for two bytes less for each, or ``torch.int8`` for three. Everything else is float32: activations, biases,
            sums, dense weights; but layers of int8 round their activations to eight bits, too, with one scale for each
            sample. One that this would change too much on the example inputs (a signal-to-noise ratio below 25 dB)
            is stored in float32, and its reason says so. For single layers: rules
            ``{key: dtype}``, read as those of :func:`srigl_fx.sparsify`, or a function of a module's name and the
            module; what no rule matches is float32.
        calibration: For layers of int8, an iterable of inputs of the model: tensors, tuples or lists of arguments, or
            (args, kwargs), all of which are held in memory. Each layer then rounds its activations with one scale for
            all samples, that of the largest magnitude which these inputs make of them; larger ones are clipped later.
            Where that changes a layer too much on the example inputs, its scales are found at each call after all, and
            a note of the report says so.
        embedding_dtype: What embedding tables are stored in: ``torch.float32``, ``torch.float16``, ``torch.bfloat16``
            or ``torch.int8``, with a scale for each row. Rows become float32 where they are looked up; tables that
            something else reads too stay as they are, and notes of the report name both. With ``verify``, the outputs
            on the example inputs must keep a signal-to-noise ratio of 20 dB.
        verify: Compare with the model on the example inputs, and at another batch size where that is free (with
            ``dynamic_shapes``, at a smaller and a larger number of each free size); with "each pass", after every pass.
            Where the outputs differ in the end, this is done all the same, in a second attempt: a pass after which they
            differ is undone, or named where it does more than improve.
            Errors up to 1e-4 of the largest output pass; with values of 16 bits up to 7.8e-3 (bfloat16) or 9.8e-4
            (float16) times the square root of the number of condensed layers, which is what rounding their weights may
            cause. With any layer of int8, the signal-to-noise ratio of each output must be at least 20 dB.
        passes: The graph passes. A pass of your own goes anywhere in ``(*LOWERING, *CONDENSING)`` of
            ``srigl_fx.passes.pipelines``; where no pass condenses, those of ``CONDENSING`` follow.
        dump: A folder in which the graph is written before and after each pass, as text, with times and the operators
            that came and went; each part of a model that is not one graph has a folder of its own in it. Files of an
            earlier dump there are removed, and no others.

    Returns:
        A ``torch.fx.GraphModule`` with ``.report`` and ``.save(path)``. Where the model cannot be captured as one
        graph, a copy of the model whose largest parts that can be captured run as such graphs, with ``.report`` and
        ``.regions``; ``report.capture_failures`` says what broke where.

    Raises:
        LoweringError: Nothing to lower, permutations of inputs that are still learned, an unsupported device or dtype,
            a weight that ``value_dtype`` or a table that ``embedding_dtype`` cannot hold, outputs beyond the tolerance,
            or a ``dump`` that cannot be written. Or no ``calibration`` inputs, such as the model does not take, some
            that are not finite. Or any, or an ``embedding_dtype``, for a model that is not one graph. Or
            ``dynamic_shapes`` that do not fit the inputs, or a size among them that the model ties.
        PassError: A pass of ``passes`` failed, or is why the outputs differ, and does more than improve.
        CaptureError: The model is in training mode, does not run on the inputs, or no part of it can be captured.
        InvariantError: The model is not what its masks say, as :func:`srigl_fx.verify` finds: values off the mask, say.
        RuleError: A rule of ``value_dtype`` is malformed, or matches no weight.

    Example:
        >>> import srigl_fx as sx
        >>> model = sx.sparsify(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), sparsity=0.75)
        >>> lowered = sx.lower(model.eval(), (torch.ones(1, 16),), min_speedup=0)
        >>> [layer.decision for layer in lowered.report.layers], lowered(torch.ones(5, 16)).shape
        (['condensed', 'condensed'], torch.Size([5, 4]))
        >>> shapes = {"input": {0: "batch", 1: "tokens"}}
        >>> lowered = sx.lower(model, (torch.ones(2, 5, 16),), min_speedup=0, dynamic_shapes=shapes)
        >>> [free.name for free in lowered.report.free_sizes], lowered(torch.ones(1, 9, 16)).shape
        (['batch', 'tokens'], torch.Size([1, 9, 4]))
    """
    _check_arguments(model, target, min_speedup, batch_sizes)
    model = unwrapped(model)
    if torch.is_inference_mode_enabled():
        raise LoweringError(
            "lower cannot run under torch.inference_mode(), as its result could be used nowhere else; call it "
            "outside, or under torch.no_grad()"
        )
    check_table_dtype(embedding_dtype)
    if verify not in (True, False, "each pass"):
        raise LoweringError(f'verify must be True, False or "each pass", not {verify!r}')
    if not isinstance(passes, Sequence) or not all(isinstance(step, Pass) for step in passes):
        raise LoweringError(f"passes must be a tuple or list of graph passes, as (*LOWERING, MyPass()), not {passes!r}")
    if not isinstance(dump, str | os.PathLike | None) or dump == "":
        raise LoweringError(f"dump must be the path of a folder, not {dump!r}")
    with EXPORT_LOCK:
        _check_parameters(model)
        invariants.check_sound(model)
        if soft := input_orders.soft_layers(model):
            raise LoweringError(
                f"permutations of inputs are still being learned, in {', '.join(map(repr, list(soft)[:5]))}: call "
                ".harden() on the LearnedPermutations first, and evaluate the model again"
            )
        folder = None if dump is None else Path(dump)
        dtypes = value_dtypes(model, value_dtype)
        batches = calibration_inputs(calibration)
        if batches and torch.int8 not in dtypes.values():
            raise LoweringError(
                "calibration is for layers whose activations are rounded, and none is to be stored in int8: pass "
                "value_dtype=torch.int8, or leave calibration out"
            )
        options = _Options(min_speedup, batch_sizes, dtypes, batches, verify, tuple(passes), folder)
        args, kwargs = normalise_inputs(example_inputs)
        if folder is not None:
            clear(folder)
        attempts = _captured(model, args, kwargs, dynamic_shapes)
        if attempts.program is not None:
            check_calibration(attempts.program, batches)
            lowered = _lower_program(attempts.program, options, attempts.failures)
            return with_rounded_tables(lowered, embedding_dtype, args, kwargs, verify=bool(verify))
        if embedding_dtype is not torch.float32:
            raise LoweringError(
                "a model that is not one graph cannot have its embedding tables rounded: lower it without "
                f"embedding_dtype, or its parts with it; what broke: {'; '.join(map(str, attempts.failures[:1]))}"
            )
        if batches:
            raise LoweringError(
                "a model that is not one graph cannot be calibrated as one: lower it without calibration, or its parts "
                f"with it; what broke: {'; '.join(map(str, attempts.failures[:1]))}"
            )
        return _lower_parts(model, args, kwargs, attempts, options)


def _captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: DynamicShapes | None
) -> Capture:
    """The model as one graph with these sizes free; with "auto", with the batch alone if there is no other way."""
    if dynamic_shapes is None:
        return capture_usual(model, args, kwargs)
    register_caches(model, pytree.tree_leaves((args, kwargs)))
    found = capture_with(model, args, kwargs, wishes(model, args, kwargs, dynamic_shapes))
    if found.program is not None:
        return found
    usual = capture_whole(model, args, kwargs)
    return replace(usual, failures=(*found.failures, *usual.failures))


@dataclass(frozen=True)
class _Options:
    """What a call of ``lower`` asks for."""

    min_speedup: float | Literal["auto"]
    batch_sizes: Sequence[int] | None
    value_dtypes: dict[str, torch.dtype]
    calibration: tuple[Inputs, ...]
    verify: bool | Literal["each pass"]
    passes: tuple[Pass[Program], ...]
    dump: Path | None


def _lower_parts(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], attempts: Capture, options: _Options
) -> LoweredRegions:
    """Lower what can be captured of a model that cannot be captured whole."""
    if not sparse_weights(model):
        raise uncapturable(model, attempts)
    leading = [leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]

    def lower_one(program: Program, part: nn.Module, each_pass: bool) -> LoweredModule:
        batch = program.batch_size if program.dynamic else None
        sizes = options.batch_sizes if leading and batch == leading[0] else None
        own, always = replace(program, model=part), options.verify == "each pass"
        check = second_check(own) if each_pass else checked(own) if always else None
        name = next(name for name, module in model.named_modules() if module is part)
        folder = folder_of_part(options.dump, name) if options.dump is not None else None
        return _run_passes(program, replace(options, batch_sizes=sizes, dump=folder), check)[0]

    return lower_regions(model, args, kwargs, attempts, lower_one, verify=bool(options.verify))


def _lower_program(captured: Program, options: _Options, failures: tuple[Failure, ...]) -> LoweredModule:
    """Lower a model captured whole; ``failures`` are the attempts to capture it that came before."""
    check = checked(captured) if options.verify == "each pass" else None
    lowered, program = _run_passes(captured, options, check)
    report = replace(lowered.report, capture_failures=failures)
    if options.verify:
        try:
            found = verify_lowered(program, lowered)
        except LoweringError as wrong:
            if check is not None:
                raise
            lowered, found = _without_what_is_wrong(captured, options, wrong)
        report = replace(lowered.report, capture_failures=failures, max_error=found.worst, min_snr=found.snr)
    return LoweredModule.build(lowered, report, lowered.inputs)


def _without_what_is_wrong(
    captured: Program, options: _Options, wrong: LoweringError
) -> tuple[LoweredModule, Comparison]:
    """Lower once more, without the passes after which the outputs differ.

    Raises:
        PassError: Such a pass does more than improve; it is named.
        CapturedGraphError: The outputs differ before any pass.
        LoweringError: ``wrong``, where it is no pass that makes the outputs differ.
    """
    try:
        lowered, program = _run_passes(captured, options, second_check(captured))
        return lowered, verify_lowered(program, lowered)
    except (PassError, CapturedGraphError):
        raise
    except SriglError:
        raise wrong from None


def _run_passes(
    captured: Program, options: _Options, check: Callable[[str, Program], None] | None
) -> tuple[LoweredModule, Program]:
    """Lower one captured graph, which stays as it is; the program is what its passes made of it."""
    _check_batch_sizes(captured, options)
    inputs = describe_inputs(captured)
    program = replace(captured, value_dtypes=options.value_dtypes, masked=dict(captured.masked))
    enter_masks(program)
    observe = None if options.dump is None else Dump(options.dump, program)
    finished = run([_settled(step, options) for step in whole(options.passes)], program, check=check, observe=observe)
    report = report_on(finished.subject, finished.notes)
    recipes = recipes_of(captured.model)
    return LoweredModule.build(finished.subject.module, report, inputs, recipes), finished.subject


def _settled(step: Pass[Program], options: _Options) -> Pass[Program]:
    """A pass with what the call of ``lower`` has for it: a copy of its own class, which keeps what it was made with."""
    if not isinstance(step, Select | Calibrate | FeatureMajor):
        return step
    settled = copy.copy(step)
    if isinstance(settled, Select):
        asked = options.min_speedup if settled.min_speedup is None else settled.min_speedup
        settled.min_speedup = 1.0 if asked == "auto" else asked
        if settled.costs is None:
            settled.costs = lambda program: _costs(program, replace(options, min_speedup=asked))
    elif isinstance(settled, Calibrate) and not settled.batches:
        settled.batches = options.calibration
    elif isinstance(settled, FeatureMajor) and settled.batch is None and options.batch_sizes:
        settled.batch = min(options.batch_sizes)
    return settled


@noted
def _check_arguments(
    model: nn.Module, target: str, min_speedup: float | str, batch_sizes: Sequence[int] | None
) -> None:
    if target != "cpu":
        raise LoweringError(f"target {target!r} is not supported; use target='cpu'")
    if not isinstance(model, nn.Module):
        raise LoweringError(f"a torch.nn.Module can be lowered, not {type(model).__name__}")
    if min_speedup != "auto" and (not isinstance(min_speedup, int | float) or not min_speedup >= 0):
        raise LoweringError(f'min_speedup must be "auto" or a number of at least 0, not {min_speedup!r}')
    sizes = [] if batch_sizes is None else batch_sizes
    if not isinstance(sizes, Sequence) or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise LoweringError(f"batch_sizes must be whole numbers of at least 1, not {batch_sizes!r}")
    if batch_sizes is not None and not sizes:
        raise LoweringError("batch_sizes is empty; leave it out to measure at the example inputs' batch size")


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype in (torch.float16, torch.bfloat16, torch.float64):
            raise LoweringError(
                f"{name} is {parameter.dtype} on {parameter.device}; only float32 on the CPU can be lowered: lower a "
                "copy, lower(copy.deepcopy(model).float().cpu(), ...)"
            )


def _costs(program: Program, options: _Options) -> Costs:
    """What every layer costs in each form, at every batch size asked for."""
    own = [program.batch_size]
    if options.min_speedup == "auto":
        usual = EXPECTED_BATCHES if program.dynamic else own
        return estimated_costs(program, options.batch_sizes or usual, ONNXRUNTIME)
    sizes = list(options.batch_sizes or own) if program.dynamic else own
    return layer_costs(program, sizes, options.min_speedup)


def _check_batch_sizes(program: Program, options: _Options) -> None:
    """Refuse batch sizes that cannot be measured, before any pass has run."""
    if options.min_speedup in ("auto", 0) or program.dynamic or not options.batch_sizes:
        return
    if list(options.batch_sizes) != [program.batch_size]:
        raise LoweringError(
            f"batch_sizes {list(options.batch_sizes)} cannot be measured: the model was captured for batch "
            f"{program.batch_size} only; leave batch_sizes out"
        )
