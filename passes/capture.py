"""From a model and example inputs to a :class:`~srigl_fx.passes.program.Program`.

Owns the chain of attempts of ``torch.export`` and what is said when all fail. It must not know masks. Capture is
serialised by a lock (``torch.export`` is not thread-safe) and leaves the model as it was.
"""

import contextlib
import inspect
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError
from srigl_fx.passes.program import Program, resize

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# torch.export puts fake parameters into the model while it traces, and so must run alone.
EXPORT_LOCK = threading.RLock()


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


def run_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass that leaves no trace: no gradients, buffers and the random state as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.func.functional_call(model, buffers, args, kwargs)


def capture(model: nn.Module, example_inputs: Any) -> Program:
    """Capture the eval behaviour of ``model`` as one functional ATen graph.

    Tried in turn: ``torch.export`` non-strict with a dynamic leading dimension, static, then both strict. Export takes
    a size of 1 for a constant, so a leading dimension of 1 is repeated to 2 for the dynamic attempts.

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
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise CaptureError(
            f"{f'the module {training!r}' if training else 'the model'} is in training mode; what is captured is the "
            "eval behaviour: call model.eval() first"
        )
    try:
        run_model(model, args, kwargs)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} does not run on the example inputs {_describe(args, kwargs)}: "
            f"{_first_line(error)}; its forward is {inspect.signature(model.forward)}"
        ) from error

    failures: list[Exception] = []
    with EXPORT_LOCK, _plain_attention(), _quiet_torch():
        for strict in (False, True):
            for dynamic in (True, False):
                try:
                    exported = _export(model, args, kwargs, strict=strict, dynamic=dynamic)
                except Exception as error:  # export raises nearly every type; the next rung may still do
                    failures.append(error)
                    continue
                if exported is not None:
                    how = f"torch.export{' strict' if strict else ''}, {'dynamic' if dynamic else 'static'} batch"
                    return _program(model, exported, args, kwargs, how)
    raise CaptureError(
        f"torch.export cannot capture {type(model).__name__} whole: {_first_line(failures[0])}; a forward must not "
        "branch on the values of tensors (use torch.where or torch.cond), return caches or other objects that are not "
        "tensors (pass use_cache=False), or call libraries other than torch; mend that line, or lower the part of the "
        "model that can be captured"
    ) from failures[0]


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, strict: bool, dynamic: bool
) -> ExportedProgram | None:
    """The functional program; None where there is nothing dynamic about the inputs."""
    shapes: Any = None
    if dynamic:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        batched = _batched(leaves)
        if not any(batched):
            return None
        leaves = [
            resize(leaf, max(2, leaf.shape[0])) if is_batched else leaf
            for leaf, is_batched in zip(leaves, batched, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        shapes = ShapesCollection()  # type: ignore[no-untyped-call]
        for leaf, is_batched in zip(leaves, batched, strict=True):
            if is_batched:
                shapes[leaf] = {0: Dim.DYNAMIC}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals; nothing a user could act on
        exported: ExportedProgram = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


def _batched(leaves: list[Any]) -> list[bool]:
    """Which leaves share the leading size of the first tensor that has one: that is taken for the batch."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    size = tensors[0].shape[0] if tensors else 0
    return [isinstance(leaf, Tensor) and leaf.dim() > 0 and size > 0 and leaf.shape[0] == size for leaf in leaves]


def _program(
    model: nn.Module, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], how: str
) -> Program:
    module = exported.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    placeholders = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    batched = tuple(
        isinstance(value, Tensor) and value.dim() > 0 and isinstance(value.shape[0], torch.SymInt)
        for value in placeholders
    )
    if len(batched) != len(pytree.tree_leaves((args, kwargs))):
        raise CaptureError("the captured graph takes other inputs than the model; this is a defect, please report it")
    return Program(module=module, model=model, args=args, kwargs=kwargs, batched=batched, how=how)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention from its fused inference path, which is one opaque operator."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Keep torch from logging and printing graphs of attempts that fail here; the error that is raised says why."""
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logger for name, logger in logging.root.manager.loggerDict.items() if name.partition(".")[0] == "torch"]
    handlers = {id(h): h for logger in loggers if isinstance(logger, logging.Logger) for h in logger.handlers}
    for handler in handlers.values():
        handler.addFilter(of_others)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for handler in handlers.values():
            handler.removeFilter(of_others)


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return type(value).__name__

    return "(" + ", ".join([*map(one, args), *(f"{name}={one(value)}" for name, value in kwargs.items())]) + ")"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
