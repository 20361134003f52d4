"""From a model and example inputs to a :class:`~srigl_fx.passes.program.Program`.

Owns the chain of attempts of ``torch.export``, which of them can cure which error, and what is said when all fail. It
must not know masks. Capture is serialised by a lock (``torch.export`` is not thread-safe) and leaves the model as it
was.
"""

import inspect
import os
import re
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError
from srigl_fx.passes.program import Program, resize
from srigl_fx.passes.tracing import export, fit_for_capture, plain_execution

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
FreeSizes = Mapping[int, frozenset[int]]

aten = torch.ops.aten

_GRAPH_ATTRIBUTES = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) - frozenset(dir(nn.Module()))

# torch.export puts fake parameters into the model while it traces, and so must run alone.
EXPORT_LOCK = threading.RLock()

_HINT = (
    "a forward must not branch on the values of tensors (use torch.where or torch.cond), return caches or other "
    "objects that are not tensors (model.config.use_cache = False), or call libraries other than torch"
)
_NO_CACHE = ": set model.config.use_cache = False, or give use_cache=False in the example inputs"
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


def normalise_inputs(example_inputs: Any) -> Inputs:
    """Example inputs as (args, kwargs).

    Raises:
        CaptureError: They are neither a tuple nor (args, kwargs).

    Example:
        >>> normalise_inputs((1, 2)), normalise_inputs(((1,), {"mask": 2}))
        (((1, 2), {}), ((1,), {'mask': 2}))
    """
    if not isinstance(example_inputs, tuple):
        raise CaptureError(
            f"example inputs must be a tuple of arguments, or (args, kwargs), not {type(example_inputs).__name__}: "
            "pass (x,) for one tensor, ((), inputs) for keyword arguments only"
        )
    if len(example_inputs) == 2 and isinstance(example_inputs[0], tuple) and isinstance(example_inputs[1], dict):
        return example_inputs
    return example_inputs, {}


def copies(inputs: Inputs) -> Inputs:
    """The inputs with a copy of each tensor, for a run that may write into them.

    Example:
        >>> x = torch.zeros(2)
        >>> (copied,), _ = copies(((x,), {}))
        >>> copied.add_(1), x
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    copied: Inputs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
    return copied


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass that leaves no trace: no gradients, buffers and the random state as they were."""
    return run_and_watch(model, args, kwargs)[0]


def run_and_watch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    """As :func:`run_model`, and the names of the buffers that the forward pass wrote into."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.dtype != torch.bool}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), plain_execution():
        torch.manual_seed(0)
        args, kwargs = copies((args, kwargs))  # a forward may write into its inputs
        output = torch.func.functional_call(model, buffers, args, kwargs)
    return output, frozenset(name for name, buffer in buffers.items() if buffer._version)


def capture(model: nn.Module, example_inputs: Any) -> Program:
    """Capture the eval behaviour of ``model`` as one functional ATen graph.

    Tried in turn, each only where it can cure what the one before failed with: ``torch.export`` non-strict with a
    dynamic leading dimension, with whatever can be dynamic, static; then strict. Export takes a size of 1 for a
    constant, so a leading dimension of 1 is repeated to 2 for the dynamic attempts.

    Args:
        model: In eval mode.
        example_inputs: A tuple of arguments, or (args, kwargs).

    Raises:
        CaptureError: The model is in training mode, does not run on the inputs, or cannot be exported whole.

    Example:
        >>> program = capture(nn.Linear(3, 2).eval(), (torch.ones(1, 3),))
        >>> program.dynamic, program.batch_size, program.how
        (True, 1, 'torch.export, dynamic batch')
    """
    args, kwargs = normalise_inputs(example_inputs)
    done = capture_whole(model, args, kwargs)
    if done.program is None:
        raise uncapturable(model, done)
    return done.program


def _run_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``model`` returns; a CaptureError unless it is in eval mode and runs on the inputs."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("a model compiled by TorchScript cannot be captured: capture the module it was made from")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise CaptureError(
            f"{f'the module {training!r}' if training else 'the model'} is in training mode; what is captured is the "
            "eval behaviour: call model.eval() first"
        )
    try:
        return run_model(model, args, kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs {_describe(args, kwargs)}: "
            f"{first_line(error)}; its forward is {inspect.signature(model.forward)}"
        ) from error


def uncapturable(model: nn.Module, done: Capture) -> CaptureError:
    """The error to raise where a model cannot be captured whole."""
    error = CaptureError(
        f"torch.export cannot capture {type(model).__name__} whole: {done.failures[0].error}; {_HINT}; mend that line, "
        "or lower the part of the model that can be captured"
    )
    error.__cause__ = done.cause
    return error


def capture_whole(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Capture:
    """Try to capture ``model`` as one graph, the leading dimension that its inputs share free if that can be.

    Raises:
        CaptureError: The model is in training mode, or does not run on the inputs.
    """
    problem = foreign_types((args, kwargs), _run_once(model, args, kwargs))
    if problem:
        return Capture(None, (Failure(name="", type=class_name(model), attempt="not tried", error=problem),))
    batched = _batched(pytree.tree_leaves((args, kwargs)))
    free = {position: frozenset({0}) for position, is_batched in enumerate(batched) if is_batched}
    rungs = [_Rung(Dim.DYNAMIC, False), _Rung(Dim.AUTO, False), _Rung(None, False)]
    return _climb(model, args, kwargs, free, [*rungs, _Rung(Dim.AUTO, True), _Rung(None, True)])


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
        if before is None:
            return True
        if _DATA_DEPENDENT.search(error):
            return False
        sizes = before.dim is not None and bool(_SYMBOLIC.search(error))
        if self.strict == before.strict:
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
) -> Capture:
    failures: list[Failure] = []
    cause: Exception | None = None
    before: _Rung | None = None
    if clash := _clashing_name(model):
        return Capture(None, (Failure(name=name, type=class_name(model), attempt="not tried", error=clash),))
    with EXPORT_LOCK, fit_for_capture(model):
        for rung in rungs:
            if (rung.dim is not None and not free) or not rung.worth(before, _whole_text(cause), required is not None):
                continue
            before = rung
            try:
                exported = _export(model, args, kwargs, free if rung.dim is not None else {}, rung)
                program = _program(model, exported, args, kwargs, rung.strict)
                _check_free(program, free if rung.dim is not None else {}, args, kwargs, required or {})
                if required is not None:
                    _check_pure(exported)
            except Exception as error:  # export raises nearly every type; the next rung may still do
                cause = cause or error
                text = _raised_by(error) + first_line(error)
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
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: FreeSizes, rung: _Rung
) -> ExportedProgram:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    shared = _batched(leaves)
    for position in free:
        if shared[position] and leaves[position].shape[0] < 2:
            leaves[position] = resize(leaves[position], 2)
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    sizes = [dict.fromkeys(sorted(free[i]), rung.dim) if i in free else None for i in range(len(leaves))]
    return export(model, args, kwargs, sizes, strict=rung.strict)


def _batched(leaves: list[Any]) -> list[bool]:
    """Which leaves share the leading size of the first tensor that has one: that is taken for the batch."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    size = tensors[0].shape[0] if tensors else 0
    return [isinstance(leaf, Tensor) and leaf.dim() > 0 and size > 0 and leaf.shape[0] == size for leaf in leaves]


def _program(
    model: nn.Module, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], strict: bool
) -> Program:
    module = exported.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    for node in module.graph.find_nodes(op="call_function", target=aten.copy_.default):
        written, value, *_ = node.args  # of an input or a buffer, added by export without a value
        node.meta.setdefault("val", written.meta.get("val", value.meta.get("val")))
    leaves = pytree.tree_leaves((args, kwargs))
    values = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    if len(values) != len(leaves):
        raise CaptureError("the captured graph takes other inputs than the model; this is a defect, please report it")
    leading = [leaf.shape[0] if 0 in _free_sizes(value) else None for value, leaf in zip(values, leaves, strict=True)]
    batch = next((size for size in leading if size is not None), None)
    how = f"torch.export{' strict' if strict else ''}, {'static' if batch is None else 'dynamic'} batch"
    batched = tuple(size is not None and size == batch for size in leading)
    return Program(module=module, model=model, args=args, kwargs=kwargs, batched=batched, how=how)


def _free_sizes(value: Any) -> set[int]:
    """The dimensions of a placeholder's value whose sizes are free."""
    shape = value.shape if isinstance(value, Tensor) else ()
    return {dim for dim, size in enumerate(shape) if is_free(size)}


def is_free(size: int | torch.SymInt) -> bool:
    """Whether a size of a captured graph may vary: a symbol that tracing has not found to be one number.

    Example:
        >>> is_free(3)
        False
    """
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _check_free(
    program: Program, free: FreeSizes, args: tuple[Any, ...], kwargs: dict[str, Any], required: FreeSizes
) -> None:
    """Refuse a program that has kept the size of a repeated batch, or one that varies, or all that were to be free."""
    values = [node.meta.get("val") for node in program.module.graph.nodes if node.op == "placeholder"]
    if free and not any(_free_sizes(value) for value in values):
        raise CaptureError("all sizes are specialized to constants")
    for position, (value, leaf) in enumerate(zip(values, pytree.tree_leaves((args, kwargs)), strict=True)):
        fixed = set(range(leaf.dim())) - _free_sizes(value) if isinstance(leaf, Tensor) else set()
        if vary := fixed & required.get(position, frozenset()):
            raise CaptureError(f"dimension {min(vary)} of input {position} varies from call to call, but is built in")
        if 0 in fixed & free.get(position, frozenset()) and int(value.shape[0]) != leaf.shape[0]:
            raise CaptureError(f"dimension 0 of input {position} is specialized to a constant")


def _check_pure(exported: ExportedProgram) -> None:
    """A part of a model must not write where the rest of it may read."""
    written = {**exported.graph_signature.buffers_to_mutate, **exported.graph_signature.user_inputs_to_mutate}
    if written:
        raise CaptureError(f"it writes into {', '.join(sorted(set(written.values())))}")


def class_name(module: nn.Module) -> str:
    """The name of a module's own class, without what a mask-managed layer adds to it.

    Example:
        >>> class_name(nn.Linear(2, 2))
        'Linear'
    """
    return getattr(type(module), "_srigl_fx_dense_class", type(module)).__name__


def first_line(error: BaseException) -> str:
    r"""The first line of an error that says something.

    Example:
        >>> first_line(ValueError("\n  too small\nsee above"))
        'too small'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _raised_by(error: BaseException) -> str:
    """The last line outside torch that led to the error, as "model.py, line 7, `if x > 0:`: "; "" if there is none."""
    inside = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(inside) and f.line]
    return f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}, `{frames[-1].line}`: " if frames else ""


def _whole_text(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__} {error}"


def foreign_types(inputs: Any, output: Any) -> str:
    """What a module takes or returns that a captured graph cannot, in words; "" where there is no such thing.

    Example:
        >>> foreign_types({"x": torch.ones(1), "n": 3}, [None]), foreign_types((), [object()])
        ('', 'it returns a value of type object')
    """
    for verb, value in (("takes", inputs), ("returns", output)):
        leaves = pytree.tree_leaves(value)
        names = sorted({type(leaf).__name__ for leaf in leaves if not _in_graphs(leaf)})
        if names:
            hint = _NO_CACHE if any("Cache" in name for name in names) else ""
            return f"it {verb} a value of type {', '.join(names)}{hint}"
    return ""


def _in_graphs(leaf: Any) -> bool:
    """Whether a captured graph can take or return a value: constants and ordinary, strided tensors."""
    if isinstance(leaf, Tensor):
        return leaf.layout is torch.strided and not leaf.is_nested
    return isinstance(leaf, bool | int | float | str | None)


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return type(value).__name__

    return "(" + ", ".join([*map(one, args), *(f"{name}={one(value)}" for name, value in kwargs.items())]) + ")"
