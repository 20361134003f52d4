"""From a model and example inputs to a :class:`~srigl_fx.passes.program.Program`.

Owns the chain of attempts of ``torch.export``, which of them can cure which error, and what is said when all fail. It
must not know masks. Capture is serialised by a lock (``torch.export`` is not thread-safe) and leaves the model as it
was.

1. The model is run once before. What its inputs, outputs or buffers hold that no graph can is said at once.
2. The leading size that the first tensor has is taken for the batch; all inputs that share it may vary in it.
3. Export takes sizes of 0 and 1 for constants, so a batch of 1 is repeated to 2 for the attempts with a free size.
4. The attempts are a ladder: sizes dynamic (a size that must be fixed is an error), automatic (it is fixed), static;
   first non-strict (the Python of the forward runs), then strict (its bytecode is analysed), which follows other code.
5. An attempt is made only if it can cure what failed: fixed sizes cure errors about symbols; nothing cures a branch on
   the values of tensors, or a forward that kept a tensor of the tracer. For a whole model, static sizes are tried after
   any other error too.
6. What one attempt yields is checked like any other error: sizes that must be free are, what the model writes to its
   buffers is what the graph writes, and a part of a model writes nothing.
7. Objects in inputs and outputs (caches) are taken apart outside the graph, which takes and returns their tensors.
"""

import inspect
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError
from srigl_fx.nn.model_state import restored
from srigl_fx.passes.capture_checks import (
    FreeSizes,
    about_places,
    check_free,
    check_pure,
    check_state,
    class_name,
    first_line,
    fit_batches,
    raised_by,
    raised_in,
    replaced_buffer,
)
from srigl_fx.passes.example_inputs import describe, foreign_types, normalise_inputs
from srigl_fx.passes.free_sizes import named_sizes, symbols_of
from srigl_fx.passes.hugging_face import knows_caches, register_caches, untold
from srigl_fx.passes.model_runs import Run, run_model, run_steps
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import resize
from srigl_fx.passes.state import own_state
from srigl_fx.passes.tracing import export, fit_for_capture, flattened, writing_in_place
from srigl_fx.passes.trees import is_plain
from srigl_fx.passes.wrappers import unwrapped

aten = torch.ops.aten

_GRAPH_ATTRIBUTES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))

# torch.export puts fake parameters into the model while it traces, and so must run alone.
EXPORT_LOCK = threading.RLock()

Dims = Mapping[int, Mapping[int, Any]]  # by flat input and axis, what torch.export is to make of a size

NOT_TRIED = "not tried"

_HINT = (
    "a forward must not branch on the values of tensors (use torch.where or torch.cond), return caches or other "
    "objects that are not tensors (model.config.use_cache = False), or call libraries other than torch"
)
_LEAKED = "fake tensor"  # the forward kept what tracing gave it where export does not look: no trace can be right
_DATA_DEPENDENT = re.compile(r"data-dependent|unbacked|GuardOnDataDependent", re.IGNORECASE)
_SYMBOLIC = re.compile(r"SymInt|SymBool|SymFloat|\bs\d+\b|constraint|speciali[sz]|dynamic shape", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One attempt to capture a module, and why it failed.

    Attributes:
        name: The module's fully-qualified name ("" for the model itself).
        type: Its class.
        attempt: What was tried, as in "torch.export, dynamic batch".
        error: The line of the model that raised it, where that is known, and the first line of the error.
    """

    name: str
    type: str
    attempt: str
    error: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({self.type}): {self.error}"


@dataclass(frozen=True)
class Capture:
    """What came of the attempts on one module: its program, if one succeeded, and those that failed before."""

    program: Program | None
    failures: tuple[Failure, ...]
    cause: Exception | None = None


def capture(model: nn.Module, example_inputs: Any) -> Program:
    """Capture the eval behaviour of ``model`` as one functional ATen graph.

    Tried in turn, each only where it can cure what the one before failed with: ``torch.export`` non-strict with a
    dynamic leading dimension, with whatever can be dynamic, static; then strict. Export takes a size of 1 for a
    constant, so a leading dimension of 1 is repeated to 2 for the dynamic attempts.

    Args:
        model: In eval mode; what ``torch.compile`` or a data-parallel wrapper put around it is taken off.
        example_inputs: A tuple of arguments, or (args, kwargs).

    Raises:
        CaptureError: The model is in training mode, does not run on the inputs, or cannot be exported whole.

    Example:
        >>> program = capture(nn.Linear(3, 2).eval(), (torch.ones(1, 3),))
        >>> program.dynamic, program.batch_size, program.how
        (True, 1, 'torch.export, dynamic batch')
    """
    args, kwargs = normalise_inputs(example_inputs)
    model = unwrapped(model)
    done = capture_whole(model, args, kwargs)
    if done.program is None:
        raise uncapturable(model, done)
    return done.program


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """What ``model`` does; a CaptureError unless it is in eval mode and runs on the inputs."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a model compiled by TorchScript cannot be captured: capture the module it was made from")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise CaptureError(
            f"{f'the module {training!r}' if training else 'the model'} is in training mode; what is captured is the "
            "eval behaviour: call model.eval() first"
        )
    try:
        return run_steps(model, args, kwargs, 1)[0]
    except Exception as error:
        name, module = raised_in(error, model)
        inside = f"in {name} ({class_name(module)}): " if name else ""
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs {describe(args, kwargs)}: "
            f"{inside}{first_line(error)}; its forward is {inspect.signature(model.forward)}"
        ) from error


def uncapturable(model: nn.Module, done: Capture) -> CaptureError:
    """The error to raise where a model cannot be captured whole."""
    first = done.failures[0]
    hint = "" if first.attempt == NOT_TRIED else f"; {_HINT}; mend that line"  # what is seen beforehand says what to do
    error = CaptureError(
        f"torch.export cannot capture {type(model).__name__} whole: {first.error}{hint}, or lower the part of the "
        "model that can be captured"
    )
    error.__cause__ = done.cause
    return error


def capture_whole(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Try to capture ``model`` as one graph, the leading dimension that its inputs share free if that can be.

    Raises:
        CaptureError: The model is in training mode, or does not run on the inputs.
    """
    run, refused = _begin(model, args, kwargs)
    if refused is not None:
        return refused
    batched = batched_leaves(pytree.tree_leaves((args, kwargs)))  # rule 2
    free = {position: frozenset({0}) for position, is_batched in enumerate(batched) if is_batched}
    # Rule 4.
    rungs = [_Rung(Dim.DYNAMIC, False), _Rung(Dim.AUTO, False), _Rung(None, False)]
    found = _climb(model, args, kwargs, free, [*rungs, _Rung(Dim.AUTO, True), _Rung(None, True)], run=run)
    if found.program is None:
        return found
    # What guards say of the batch is not tried here, and most of it no graph needs: two images of each sample that are
    # stacked and taken apart leave one that the doubled batch is even.
    program = replace(found.program, sizes=replace(found.program.sizes, conditions=()))
    return replace(found, program=program)


def capture_asked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dims: Dims) -> Capture:
    """Try to capture ``model`` as one graph in which these sizes may be free; which are is for the caller to see.

    Args:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        dims: What torch.export is told of an axis, by flat input; sizes of 1 among them are made 2 for the attempts.

    Raises:
        CaptureError: The model is in training mode, or does not run on the inputs.
    """
    run, refused = _begin(model, args, kwargs)
    if refused is not None:
        return refused
    free = {leaf: frozenset(axes) for leaf, axes in dims.items()}
    dim = Dim.AUTO if free else None
    return _climb(model, args, kwargs, free, [_Rung(dim, False), _Rung(dim, True)], run=run, dims=dims)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Run, Capture | None]:
    """Rule 1: what the model does, and the end of all attempts where no graph can do that."""
    run = _run_once(model, args, kwargs)
    register_caches(model, pytree.tree_leaves((args, kwargs, run.output)))
    problem = foreign_types((args, kwargs), run.output) or _untold((args, kwargs), run.output)
    problem = problem or replaced_buffer(model, run)
    if problem:
        return run, Capture(None, (Failure(name="", type=class_name(model), attempt=NOT_TRIED, error=problem),))
    return run, None


def _untold(inputs: Any, output: Any) -> str:
    """What a model takes or returns that counts in numbers which no graph has, and what to do; "" if there is none."""
    for verb, values in (("takes", inputs), ("returns", output)):
        if found := untold(values, given=verb == "takes"):
            leave_out = "" if verb == "takes" else ", or give use_cache=False"
            return (
                f"it {verb} {found}: give it a DynamicCache() that is made without a config, which keeps all positions "
                f"(the window is in the mask all the same){leave_out}"
            )
    return ""


def capture_region(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: FreeSizes, varying: FreeSizes, name: str
) -> Capture:
    """Try to capture a sub-module as a graph of its own.

    Args:
        model: The sub-module.
        args: Its arguments.
        kwargs: Its keyword arguments.
        free: For each flat input the sizes to leave free where that can be.
        varying: Those that must be free.
        name: The sub-module's fully-qualified name, for the failures.
    """
    if knows_caches():
        try:
            problem = _untold((args, kwargs), run_model(model, args, kwargs))
        except Exception as error:  # the model's own code: any type
            problem = raised_by(error) + first_line(error)
        if problem:
            return Capture(None, (Failure(name=name, type=class_name(model), attempt=NOT_TRIED, error=problem),))
    rungs = [_Rung(Dim.AUTO, False), _Rung(None, False), _Rung(Dim.AUTO, True)]
    return _climb(model, args, kwargs, free, rungs[:: 2 if varying else 1], name=name, required=varying)


@dataclass(frozen=True)
class _Rung:
    """One way to call ``torch.export``: ``dim`` is what to make of free sizes, None to fix them all."""

    dim: Any
    strict: bool

    @property
    def attempt(self) -> str:
        sizes = "static" if self.dim is None else "automatic" if self.dim is Dim.AUTO else "dynamic"
        return f"torch.export{' strict' if self.strict else ''}, {sizes} batch"

    def worth(self, before: "_Rung | None", error: str, region: bool) -> bool:
        """Whether this attempt may succeed where the one ``before`` failed with ``error``."""
        # Rule 5.
        if before is None:
            return True
        if _DATA_DEPENDENT.search(error) or _LEAKED in error:
            return False
        sizes = before.dim is not None and bool(_SYMBOLIC.search(error))
        if self.strict == before.strict:  # it differs from the one before in sizes alone
            return sizes or (self.dim is None and not region)
        return not (sizes and region)


def _climb(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    free: FreeSizes,
    rungs: list[_Rung],
    *,
    name: str = "",
    required: FreeSizes | None = None,
    run: Run | None = None,
    dims: Dims | None = None,
) -> Capture:
    """Make the attempts that are worth it: on a region where some sizes are ``required``, else on a whole model.

    ``run`` is what the whole model did on the inputs. ``dims`` is what torch.export is told of each axis that is to be
    free, where somebody asked for them; which became so is then for the caller to find out.
    """
    failures: list[Failure] = []
    cause: Exception | None = None
    before: _Rung | None = None
    if clash := _clashing_name(model):
        return Capture(None, (Failure(name=name, type=class_name(model), attempt=NOT_TRIED, error=clash),))
    with EXPORT_LOCK, fit_for_capture(model):
        for rung in rungs:
            if (rung.dim is not None and not free) or not rung.worth(before, _whole_text(cause), required is not None):
                continue
            before = rung
            try:
                with restored(model, copied=False):
                    told = {
                        i: dict.fromkeys(sorted(axes), rung.dim) for i, axes in free.items() if rung.dim is not None
                    }
                    given, asked = (told, False) if dims is None else (dims, True)
                    exported, tree = _export(model, args, kwargs, given, rung, run, asked=asked)
                program = _program(model, exported, args, kwargs, rung.strict, tree)
                # Rule 6.
                if dims is None:
                    check_free(program, exported, free if rung.dim is not None else {}, required or {})
                if run is not None:
                    check_state(program, run)
                if run is not None and dims is None:
                    program = fit_batches(program)
                elif run is None:
                    check_pure(exported)
            except Exception as error:  # export raises nearly every type; the next rung may still do
                cause = cause or error
                text = raised_by(error) + first_line(error) + about_places(error, model)
                if all(failure.error != text for failure in failures):
                    failures.append(Failure(name=name, type=class_name(model), attempt=rung.attempt, error=text))
                continue
            return Capture(program, tuple(failures), cause)
    return Capture(None, tuple(failures), cause)


def _clashing_name(model: nn.Module) -> str:
    """Why ``model`` cannot become a graph with the names that it has, or ""."""
    for names in (model._parameters, model._buffers, model._modules):
        for name in names:
            if name in _GRAPH_ATTRIBUTES:
                return (
                    f"its attribute {name!r} is called like one of torch.fx.GraphModule, which a captured graph is: "
                    "rename it"
                )
    return ""


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dims: Dims,
    rung: _Rung,
    run: Run | None,
    *,
    asked: bool,
) -> tuple[ExportedProgram, _PyTreeInfo | None]:
    """Export ``model``; the tree is that of its arguments and results where the program takes and returns leaves."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shared = batched_leaves(leaves)
    for position, axes in dims.items():
        for axis in axes:
            is_asked = asked or (axis == 0 and shared[position])
            if leaves[position].shape[axis] == 1 and is_asked:  # rule 3
                leaves[position] = resize(leaves[position], 2, axis)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    sizes = [dict(dims[i]) if i in dims else None for i in range(len(leaves))]
    if run is not None and run.written and not rung.strict:
        model = writing_in_place(model)
    # Rule 7.
    if is_plain(spec) and (run is None or is_plain(pytree.tree_structure(run.output))):
        return export(model, args, kwargs, sizes, strict=rung.strict), None
    flat = flattened(model, args, kwargs)
    return export(flat.module, flat.leaves, {}, sizes, strict=rung.strict), flat.tree


def batched_leaves(leaves: list[Any]) -> list[bool]:
    """Which leaves share the leading size of the first tensor that has one: that is taken for the batch.

    Example:
        >>> batched_leaves([torch.ones(2, 3), 5, torch.ones(2), torch.ones(3)])
        [True, False, True, False]
    """
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    size = tensors[0].shape[0] if tensors else 0
    return [isinstance(leaf, Tensor) and leaf.dim() > 0 and size > 0 and leaf.shape[0] == size for leaf in leaves]


def _program(
    model: nn.Module,
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    strict: bool,
    tree: _PyTreeInfo | None,
) -> Program:
    module = exported.module(check_guards=False)  # sizes that do not fit are for the lowered module to refuse
    assert isinstance(module, torch.fx.GraphModule)
    if tree is not None:
        module.graph.set_codegen(_PyTreeCodeGen(tree))
        module = fx.GraphModule(module, module.graph)
    for node in module.graph.find_nodes(op="call_function", target=aten.copy_.default):
        written, value, *_ = node.args  # of an input or a buffer, added by export without a value
        node.meta.setdefault("val", written.meta.get("val", value.meta.get("val")))
    leaves = pytree.tree_leaves((args, kwargs))
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    if len(values) != len(leaves):
        raise CaptureError("the captured graph takes other inputs than the model; this is a defect, please report it")
    sizes = named_sizes(symbols_of(values, leaves, exported.range_constraints), module)
    how = f"torch.export{' strict' if strict else ''}, {'dynamic' if sizes.batch else 'static'} batch"
    own_state(module)
    return Program(module=module, model=model, args=args, kwargs=kwargs, sizes=sizes, how=how)


def _whole_text(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__} {error}"
