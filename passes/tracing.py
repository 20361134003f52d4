"""One call of ``torch.export``, and the state of a model and of torch in which it can succeed.

Owns what has to be so while a model is traced, and that it is as before afterwards: the attention and expert
implementations, signatures with a variable number of arguments, assigned buffers, silence. It must not know which
attempt comes next.

1. Attention and experts run as plain operators: fused ones are opaque, or have no ONNX form. Recurrent layers are one
   operator each, whatever the length.
2. Arguments behind ``*args`` and ``**kwargs`` get a parameter each: export names free sizes by parameter.
3. An assignment to a place that a tensor names is a selection and a write.
4. An assigned buffer is written to when all is done: export sees writes, but no assignment in a sub-module.
5. Objects are made of leaves, and taken apart, inside the forward that is traced.
6. Views become reshapes before the graph is made functional, since that traces it again, perhaps with other strides.
7. What torch logs, prints or warns of meanwhile is kept back.
"""

import contextlib
import functools
import inspect
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph import _PyTreeInfo
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError
from srigl_fx.passes.recurrences import whole_recurrences
from srigl_fx.passes.trees import identifiers, leaf_paths

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
) -> ExportedProgram:
    """Export ``model`` and bring the program into functional form.

    Args:
        model: In eval mode.
        args: Its arguments.
        kwargs: Its keyword arguments.
        sizes: For each flat input, what its free dimensions are to be; None where all its sizes are fixed.
        strict: Trace with torch's bytecode analysis instead of plain Python.
    """
    model = _with_plain_signature(model, args, kwargs)  # rule 2
    names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    values = [*args, *kwargs.values()]
    by_name = dict(zip([*names[: len(args)], *kwargs], values, strict=True))
    leaves = iter(sizes)
    shapes = pytree.tree_map(lambda _: next(leaves), by_name) if any(sizes) else None
    with torch.no_grad(), warnings.catch_warnings(), contextlib.nullcontext() if strict else _PlacesOfTensors():
        warnings.simplefilter("ignore")  # about torch's own internals; nothing a user could act on
        # Rule 3 acts on Python that runs, which it does not where tracing is strict.
        exported: ExportedProgram = torch.export.export(
            model, args, kwargs, dynamic_shapes=shapes and {name: shapes[name] for name in names}, strict=strict
        )
        _reshape_views(exported.graph_module)  # rule 6
        functional: ExportedProgram = exported.run_decompositions({})
        return functional


class _PlacesOfTensors(TorchFunctionMode):
    """Let a forward assign to a place that a tensor names, as ring buffers do: ``buffer[position % size] = x``.

    In an assignment, torch.export turns such a position into a number, which it cannot know; in a selection it does
    not. So the place is selected, which gives a view, and the view is written to.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Rule 3.
        if func is torch.Tensor.__setitem__ and _is_place_of_tensors(args[1]):
            written, value = _selected(args[0], args[1]), args[2]
            if not isinstance(value, Tensor):
                return written.fill_(value)
            while value.dim() > written.dim() and value.shape[0] == 1:  # as an assignment takes it
                value = value[0]
            return written.copy_(value)
        return func(*args, **(kwargs or {}))


def _is_place_of_tensors(index: Any) -> bool:
    """Whether an index has whole numbers in tensors, or made of tensors, and nothing that selects but numbers."""
    parts = index if isinstance(index, tuple) else (index,)
    numbers = [
        part
        for part in parts
        if not (part is None or part is Ellipsis or (isinstance(part, slice) and part == slice(None)))
    ]
    tensors = [part for part in numbers if isinstance(part, Tensor)]
    if any(one.dim() or one.dtype is torch.bool or one.is_floating_point() for one in tensors):
        return False
    alone = all(isinstance(one, int | torch.SymInt | Tensor) and not isinstance(one, bool) for one in numbers)
    return alone and any(isinstance(one, torch.SymInt | Tensor) for one in numbers)


def _selected(tensor: Tensor, index: Any) -> Tensor:
    """The view that such an index names, by one selection for each number."""
    parts = list(index) if isinstance(index, tuple) else [index]
    left = tensor.dim() - sum(part is not None and part is not Ellipsis for part in parts)
    rest = next((place for place, part in enumerate(parts) if part is Ellipsis), len(parts))
    parts[rest : rest + 1] = [slice(None)] * left
    dim = 0
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif not isinstance(part, slice):
            tensor = tensor.select(dim, part.item() if isinstance(part, Tensor) else part)  # type: ignore[arg-type]
            continue
        dim += 1
    return tensor


def _with_plain_signature(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """``model`` with one parameter for each argument where its forward takes a variable number of them.

    Export cannot give such arguments free sizes. The module returned has the very attributes of ``model``.
    """
    signature = inspect.signature(model.forward)
    given = signature.bind(*args, **kwargs).arguments
    variable = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if not any(signature.parameters[name].kind in variable for name in given):
        return model
    one_each = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(len(args))]
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs]
    return _around(model, lambda forward, _, args, kwargs: forward(*args, **kwargs), [*one_each, *named])


def _around(
    model: nn.Module,
    around: Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any],
    parameters: Iterable[inspect.Parameter],
) -> nn.Module:
    """A module with the very attributes of ``model`` and another forward.

    Args:
        model: The model.
        around: What the new forward does; it is given the old one, the new module, arguments and keyword arguments.
        parameters: What the new forward takes.
    """
    cls, own = type(model), vars(model).get("forward")  # a method of the very object goes before that of its class

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(cls.forward, self) if own is None else own, self, args, kwargs)

    given = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = inspect.Signature([given, *parameters])  # type: ignore[attr-defined]
    made: nn.Module = cls.__new__(type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__}))
    made.__dict__ = model.__dict__ if own is None else {k: v for k, v in vars(model).items() if k != "forward"}
    return made


def writing_in_place(model: nn.Module) -> nn.Module:
    """``model`` with a forward that, when all is done, writes into the buffers what its modules have assigned to them.

    Export sees writes into a buffer, but an assignment only where the exported module itself makes it: one in a
    sub-module, or to an entry of ``_buffers``, is lost without an error. The values are written at the end, since until
    then the forward may read what it held before. The module returned has the very attributes of ``model``.

    Its forward raises CaptureError where a buffer that two modules share is assigned in one of them, which parts them.
    """

    def around(forward: Callable[..., Any], self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Rule 4. By identity: a buffer under several names must be assigned under all of them, or under none.
        before = {module: dict(module._buffers) for module in self.modules()}
        output = forward(*args, **kwargs)
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
            raise CaptureError(
                "a buffer that two modules share is assigned in one of them, which parts them: register it in one"
            )
        # Outputs, and what is assigned, may be a buffer that is about to be written.
        output = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)
        for (was, _), value in zip(assigned, [now[0].clone() for _, now in assigned], strict=True):
            was.copy_(value)
        return output

    return _around(model, around, inspect.signature(model.forward).parameters.values())


@dataclass
class Flattened:
    """A module that takes and returns lists of leaves, in the place of one that takes and returns objects.

    Attributes:
        module: It has the very attributes of the module that it is made of.
        leaves: Its arguments.
        names: What the other module's arguments are called.
        takes: How its arguments and keyword arguments are made of leaves.
        returned: How what it returned is made of leaves, by run.
    """

    module: nn.Module
    leaves: tuple[Any, ...]
    names: list[str]
    takes: pytree.TreeSpec
    returned: list[pytree.TreeSpec]

    @property
    def tree(self) -> _PyTreeInfo:
        """What makes a graph of leaves take and return objects again."""
        return _PyTreeInfo(self.names, self.takes, self.returned[-1])


def flattened(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Flattened:
    """``model`` as a function of leaves; objects that hold them are made, and taken apart, in its forward.

    Export would make such objects anew at the border of every graph that it makes, and what they do meanwhile (a cache
    makes empty tensors) is in no graph.
    """
    # Rule 5.
    leaves, spec = pytree.tree_flatten((args, kwargs))
    names = [*list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)[: len(args)], *kwargs]
    specs: list[pytree.TreeSpec] = []

    def around(forward: Callable[..., Any], self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = pytree.tree_unflatten(list(args), spec)
        returned, out_spec = pytree.tree_flatten(forward(*given, **named))
        specs.append(out_spec)
        return returned

    positional = inspect.Parameter.POSITIONAL_ONLY
    # The steps from arguments and keyword arguments: the name in the place of the number, and a keyword's own.
    steps = [(names[int(rest[0])], *rest[1:]) if kind == "0" else rest for kind, *rest in leaf_paths(spec)]
    module = _around(model, around, [inspect.Parameter(name, positional) for name in identifiers(steps)])
    return Flattened(module, tuple(leaves), names, spec, specs)


def _reshape_views(module: fx.GraphModule) -> None:
    """Make views reshapes: a view is recorded for the strides that one particular attention kernel gives its output."""
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


@contextmanager
def fit_for_capture(model: nn.Module) -> Iterator[None]:
    """The state in which ``model`` can be captured: plain attention and experts, and torch silent."""
    with plain_attention(), whole_recurrences(), plain_experts(model), _quiet_torch():  # rules 1 and 7
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
