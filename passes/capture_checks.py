"""What a captured graph must be to stand for its model: sizes as free as they are said to be, and state that it keeps.

Owns these checks and the words of failures. It must not know how a graph is captured, nor what is tried next.
"""

import os
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from srigl_fx.errors import CaptureError
from srigl_fx.passes.model_runs import Run, run_model
from srigl_fx.passes.program import Program
from srigl_fx.passes.state import kept_in, writes

FreeSizes = Mapping[int, frozenset[int]]

_UNBOUNDED = 2**31  # a larger limit is that of an index type


def free_sizes(value: Any) -> set[int]:
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


def check_free(program: Program, exported: ExportedProgram, free: FreeSizes, required: FreeSizes) -> None:
    """Refuse a program that has kept the size of a repeated batch, or one that varies, or all that were to be free.

    Raises:
        CaptureError: The message says which size; or that the forward decides by a size, and which sizes it was
            captured for.
    """
    values = [node.meta.get("val") for node in program.module.graph.nodes if node.op == "placeholder"]
    if free and not any(free_sizes(value) for value in values):
        raise CaptureError("all sizes are specialized to constants")
    leaves = pytree.tree_leaves((program.args, program.kwargs))
    for position, (value, leaf) in enumerate(zip(values, leaves, strict=True)):
        fixed = set(range(leaf.dim())) - free_sizes(value) if isinstance(leaf, Tensor) else set()
        if vary := fixed & required.get(position, frozenset()):
            raise CaptureError(f"dimension {min(vary)} of input {position} varies from call to call, but is built in")
        if 0 in fixed & free.get(position, frozenset()) and int(value.shape[0]) != leaf.shape[0]:
            raise CaptureError(f"dimension 0 of input {position} is specialized to a constant")
        for dim in free_sizes(value):
            limits = exported.range_constraints.get(value.shape[dim].node.expr)
            if limits is not None and (limits.lower > 2 or limits.upper < _UNBOUNDED):
                raise CaptureError(
                    f"the forward decides by the size of dimension {dim} of input {position} (a constraint: the graph "
                    f"is right from {limits.lower} to {limits.upper})"
                )


def check_pure(exported: ExportedProgram) -> None:
    """A part of a model must not write where the rest of it may read."""
    written = {**exported.graph_signature.buffers_to_mutate, **exported.graph_signature.user_inputs_to_mutate}
    if written:
        raise CaptureError(f"it writes into {', '.join(sorted(set(written.values())))}")


def replaced_buffer(model: nn.Module, run: Run) -> str:
    """How a forward replaced a buffer by one of another type or size, which no graph does; "" if it did not."""
    for name, change in run.written.items():
        if change:
            return (
                f"it changes {kept_in(model, name)} from {change}: register it with the type and sizes that it is to "
                "have, and write it with copy_"
            )
    return ""


def check_state(program: Program, run: Run) -> None:
    """Refuse a program that does not write the buffers which the model writes.

    Raises:
        CaptureError: The message names the buffer.
    """
    for name in sorted(run.written.keys() - writes(program.module.graph).keys()):
        buffers = dict(program.model.named_buffers(remove_duplicate=False))
        names = [other for other, buffer in buffers.items() if buffer is buffers.get(name)]
        if len(names) > 1:
            raise CaptureError(
                f"it writes a buffer that is registered in {len(names)} places ({', '.join(names)}), of which "
                "torch.export follows one: register it in one module, and have the others read it from there"
            )
        raise CaptureError(
            f"it writes {kept_in(program.model, name)} in a way that torch.export does not see (through its "
            ".data, say): write it with copy_"
        )


def fit_batches(program: Program) -> Program:
    """Find out whether the model runs at another batch size, and whether its inputs may then have different ones.

    Returns:
        The program, its inputs' batches tied where the model runs with equal ones only, which its graph may not say.

    Raises:
        CaptureError: The model runs at no other batch size; the message has its own error.
    """
    if not program.dynamic:
        return program
    tied = replace(program, sizes=program.sizes.tied())
    try:
        if len(program.sizes.batch) > 1:  # else the batches of all inputs are one, and this would be the run below
            with suppress(Exception):  # the model's own code: any type
                run_model(program.model, *program.inputs(program.other_batch, apart=True))
                return program
        run_model(program.model, *tied.inputs(program.other_batch))
        return tied
    except Exception as error:
        raise CaptureError(
            f"the model does not run at batch {program.other_batch}, the samples of the example inputs repeated: "
            f"{raised_by(error)}{type(error).__name__}: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    r"""The first line of an error that says something.

    Example:
        >>> first_line(ValueError("\n  too small\nsee above"))
        'too small'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def raised_by(error: BaseException) -> str:
    """The last line outside torch that led to the error, as "model.py, line 7, `if x > 0:`: "; "" if there is none."""
    inside = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(inside) and f.line]
    return f"{os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}, `{frames[-1].line}`: " if frames else ""


def about_places(error: BaseException, model: nn.Module) -> str:
    """What to do where export wants to know a position that a tensor holds; "" after other errors."""
    if "specialized integer" not in str(error):
        return ""
    inside, _ = raised_in(error, model)
    return (
        f"; a position{f' in {inside}' if inside else ''} is known only when the graph runs: index with the tensor "
        "itself, as in buffer[position] = x, without int() or .item(), and write ranges with "
        "buffer.index_copy_(dim, positions, x)"
    )


def raised_in(error: BaseException, model: nn.Module) -> tuple[str, nn.Module]:
    """The innermost sub-module whose code led to the error, with its name; "" and the model where there is none."""
    running = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = {id(module): name for name, module in model.named_modules()}
    inside = next((one for one in reversed(running) if isinstance(one, nn.Module) and names.get(id(one))), model)
    return names[id(inside)] if inside is not model else "", inside


def class_name(module: nn.Module) -> str:
    """The name of a module's own class, without what a mask-managed layer adds to it.

    Example:
        >>> class_name(nn.Linear(2, 2))
        'Linear'
    """
    return getattr(type(module), "_srigl_fx_dense_class", type(module)).__name__
