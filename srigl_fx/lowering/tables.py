"""Embedding tables of a lowered model in 8 or 16 bits, made float32 again where their rows are looked up.

Owns the rounding of a table's rows and the operators that undo it in a graph. It must not know masks or files.

With eight bits each row has a scale of its own: ``q = round(w / s)``, ``s = max |w| / 127``, and a lookup gives
``q s``: every number is off by at most ``s / 2``. With 16 bits the numbers are those of the type.
"""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from srigl_fx.comparison import LEAST_OUTPUT_SNR, signal_to_noise
from srigl_fx.errors import LoweringError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.base import Note
from srigl_fx.passes.model_runs import run_model
from srigl_fx.passes.program import arguments, new_buffer, tensor_at
from srigl_fx.reports.text_tables import format_bytes

TABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
_LARGEST = 127

aten = torch.ops.aten


def rounded(table: Tensor) -> tuple[Tensor, Tensor]:
    """A table (R, D) as int8, and the scale of each row, float32 (R, 1).

    Example:
        >>> values, scales = rounded(torch.tensor([[127.0, -63.6], [0.0, 0.0]]))
        >>> values.tolist(), scales.tolist()
        ([[127, -64], [0, 0]], [[1.0], [1.0]])
    """
    scales = table.abs().amax(dim=1, keepdim=True).float() / _LARGEST
    # A row of zeros, or of numbers so small that their scale is none.
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    return (table / scales).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def rounded_reference(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """What :func:`rounded` computes, number by number.

    Example:
        >>> rounded_reference(np.array([[254.0, -3.0]], np.float32))[0].tolist()
        [[127, -2]]
    """
    values, scales = np.zeros(table.shape, np.int8), np.ones((len(table), 1), np.float32)
    for row, numbers in enumerate(table):
        scale = np.float32(max(abs(numbers))) / np.float32(_LARGEST)
        if scale >= np.finfo(np.float32).tiny:
            scales[row] = scale
            values[row] = [np.int8(np.rint(number / scale)) for number in numbers]
    return values, scales


def check_table_dtype(dtype: object) -> torch.dtype:
    """``dtype``, if tables can have it.

    Raises:
        LoweringError: They cannot.

    Example:
        >>> check_table_dtype(torch.int8)
        torch.int8
    """
    if not isinstance(dtype, torch.dtype) or dtype not in TABLE_DTYPES:
        raise LoweringError(f"embedding_dtype must be one of {', '.join(map(str, TABLE_DTYPES))}, not {dtype!r:.80}")
    return dtype


def with_rounded_tables(
    lowered: LoweredModule, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any], *, verify: bool = True
) -> LoweredModule:
    """A lowered model whose embedding tables are stored in ``dtype``; the one that is given stays as it is.

    Tables that something else reads too (the weight of a tied head) stay as they are. The report has a note on each
    table.

    Args:
        lowered: The model.
        dtype: One of :data:`TABLE_DTYPES`.
        args: Example arguments.
        kwargs: Example keyword arguments.
        verify: Require a signal-to-noise ratio of 20 dB at least of each output on the examples.

    Raises:
        LoweringError: A table holds numbers that are not finite, or that the type cannot hold; or the outputs differ by
            more.
    """
    found = [] if dtype is torch.float32 else [node for node in lowered.graph.nodes if _is_table(lowered, node)]
    if not found:
        return lowered
    tables = [node for node in found if all(_looks_up(user, node) for user in node.users)]
    notes = [_note(lowered, node, dtype if node in tables else None) for node in found]
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    graph.output(graph.graph_copy(lowered.graph, copies))
    graph.set_codegen(copy.copy(lowered.graph._codegen))
    module = fx.GraphModule(lowered, graph)
    for table in tables:
        _store(module, copies[table], dtype)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    report = replace(lowered.report, notes=(*lowered.report.notes, *notes))
    result = LoweredModule.build(module, report, lowered.inputs, lowered.recipes)
    if verify:
        _verify(lowered, result, args, kwargs)
    return result


def _is_table(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether rows of a float32 tensor of the module are looked up."""
    looked_up = node.op == "get_attr" and any(_looks_up(user, node) for user in node.users)
    return looked_up and tensor_at(module, str(node.target)).dtype is torch.float32


def _looks_up(user: fx.Node, table: fx.Node) -> bool:
    return user.target is aten.embedding.default and user.args[0] is table and arguments(user)["indices"] is not table


def _note(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype | None) -> Note:
    """What becomes of a table; ``dtype`` is None where it stays."""
    rows, width = tensor_at(module, str(node.target)).shape
    if dtype is None:
        reason = "the embedding table stays in float32: something else than a lookup reads it too"
    else:
        stored = rows * width * dtype.itemsize + (rows * 4 if dtype is torch.int8 else 0)
        before, after = format_bytes(rows * width * 4), format_bytes(stored)
        reason = f"the embedding table is stored in {str(dtype).removeprefix('torch.')}, {after} in place of {before}"
    return Note(where=str(node.target), reason=reason, by="embedding_dtype")


def _store(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    """Put a smaller table in the place of the one that a node reads."""
    name = str(node.target)
    table = tensor_at(module, name).detach()
    if not bool(table.isfinite().all()):
        raise LoweringError(f"the table {name} holds numbers that are not finite, and cannot be rounded")
    values, scales = rounded(table) if dtype is torch.int8 else (table.to(dtype), None)
    if not bool(values.isfinite().all()):
        raise LoweringError(f"the table {name} holds numbers that are too large for {dtype}: take bfloat16, or int8")
    for lookup in list(node.users):
        rows = arguments(lookup)["indices"]
        with module.graph.inserting_before(lookup):
            stored = new_buffer(module, f"{name}_rounded", values, same=torch.equal)
            found = module.graph.call_function(aten.embedding.default, (stored, rows))
            result = module.graph.call_function(aten._to_copy.default, (found,), {"dtype": torch.float32})
            if scales is not None:
                kept = new_buffer(module, f"{name}_scales", scales, same=torch.equal)
                scale = module.graph.call_function(aten.embedding.default, (kept, rows))
                result = module.graph.call_function(aten.mul.Tensor, (result, scale))
        result.meta = dict(lookup.meta)
        lookup.replace_all_uses_with(result)
        module.graph.erase_node(lookup)


def _verify(before: LoweredModule, after: LoweredModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outputs = [pytree.tree_leaves(run_model(module, args, kwargs)) for module in (before, after)]
    for number, (one, other) in enumerate(zip(*outputs, strict=True)):
        if isinstance(one, Tensor) and one.is_floating_point():
            found = signal_to_noise(one, other)
            if found < LEAST_OUTPUT_SNR:
                raise LoweringError(
                    f"with rounded embeddings, output {number} has a signal-to-noise ratio of {found:.1f} dB, and at "
                    f"least {LEAST_OUTPUT_SNR:g} dB are asked for: take torch.float16, or leave embedding_dtype out"
                )
