"""One call of ``torch.export``, and the state of a model and of torch in which it can succeed.

Owns what has to be so while a model is traced, and that it is as before afterwards: the attention and expert
implementations, signatures with a variable number of arguments, assigned buffers, silence. It must not know which
attempt comes next.
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
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError

aten = torch.ops.aten
_LOG = logging.getLogger(__name__)
_SETTINGS = threading.RLock()  # of PyTorch, which are of the process: who changes them for a while holds it


def export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: list[dict[int, Any] | None],
    *,
    strict: bool,
    writes: bool = False,
) -> ExportedProgram:
    """Export ``model`` and bring the program into functional form.

    Args:
        model: In eval mode.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sizes: For each flat input, what its free dimensions are to be; None where all its sizes are fixed.
        strict: Trace with torch's bytecode analysis instead of plain Python.
        writes: The forward writes buffers: what it assigns is to be written into the buffers that were there.

    Raises:
        CaptureError: A buffer that two modules have is assigned in one of them, which parts them.
    """
    if writes and not strict:
        model = _writing_in_place(model)
    model = _with_plain_signature(model, args, kwargs)
    names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    values = [*args, *kwargs.values()]
    by_name = dict(zip([*names[: len(args)], *kwargs], values, strict=True))
    leaves = iter(sizes)
    shapes = pytree.tree_map(lambda _: next(leaves), by_name) if any(sizes) else None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own internals; nothing a user could act on
        exported: ExportedProgram = torch.export.export(
            model, args, kwargs, dynamic_shapes=shapes and {name: shapes[name] for name in names}, strict=strict
        )
        _reshape_views(exported.graph_module)
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


def _with_plain_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """``model`` with one parameter for each argument where its forward takes a variable number of them.

    Export cannot give such arguments free sizes. The module returned has the very attributes of ``model``.
    """
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if not any(signature.parameters[name].kind in variable for name in given):
        return model
    cls = type(model)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    one_each = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(len(args))]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs]
    forward.__signature__ = inspect.Signature([own, *one_each, *named])  # type: ignore[attr-defined]
    plain: nn.Module = cls.__new__(type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__}))
    plain.__dict__ = model.__dict__
    return plain


def _writing_in_place(model: nn.Module) -> nn.Module:
    """``model`` with a forward that, when all is done, writes into the buffers what its modules have assigned to them.

    Export sees writes into a buffer, but an assignment only where the exported module itself makes it: one in a
    sub-module, or to an entry of ``_buffers``, is lost without an error. The values are written at the end, since until
    then the forward may read what it held before. The module returned has the very attributes of ``model``.
    """
    cls, own = type(model), vars(model).get("forward")

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = {module: dict(module._buffers) for module in self.modules()}
        output = cls.forward(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        held: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for module, buffers in before.items():
            for name, was in buffers.items():
                now = module._buffers.get(name)
                if was is not None and now is not None:
                    held.setdefault(id(was), (was, []))[1].append(now)
                    module._buffers[name] = was
        assigned = [(was, now) for was, now in held.values() if any(one is not was for one in now)]
        if not assigned:
            return output
        if any(one is not now[0] for _, now in assigned for one in now):
            raise CaptureError("a buffer that two modules share is assigned in one of them: write it with copy_")
        # Outputs, and what is assigned, may be a buffer that is about to be written.
        output = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        for (was, _), value in zip(assigned, [now[0].clone() for _, now in assigned], strict=True):
            was.copy_(value)
        return output

    given = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    named = [one for one in inspect.signature(model.forward).parameters.values() if one.name != "self"]
    forward.__signature__ = inspect.Signature([given, *named])  # type: ignore[attr-defined]
    writing: nn.Module = cls.__new__(type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__}))
    writing.__dict__ = model.__dict__ if own is None else {k: v for k, v in vars(model).items() if k != "forward"}
    return writing


def _reshape_views(module: fx.GraphModule) -> None:
    """Make views reshapes: a view is recorded for the strides that one particular attention kernel gives its output."""
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


@contextmanager
def fit_for_capture(model: nn.Module) -> Iterator[None]:
    """The state in which ``model`` can be captured: plain attention and experts, and torch silent."""
    with plain_attention(), plain_experts(model), _quiet_torch():
        yield


@contextmanager
def plain_execution() -> Iterator[None]:
    """Run models as they are captured: plain attention, and as Python what ``torch.compile`` has wrapped."""
    with plain_attention(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention from its fused inference path, which is one opaque operator; one thread at a time."""
    with _SETTINGS:
        enabled = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Let mixtures of experts multiply batches of matrices: grouped products have no ONNX form."""
    before: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            get, put = (getattr(module, f"{verb}_experts_implementation", None) for verb in ("get", "set"))
            if callable(get) and callable(put):
                before.append((put, get()))
                try:
                    put("batched_mm")
                except (RuntimeError, ValueError) as error:  # one that cannot be changed: captured as it is
                    _LOG.debug("%s keeps its experts implementation: %s", type(module).__name__, error)
        yield
    finally:
        for put, implementation in reversed(before):
            put(implementation)


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
