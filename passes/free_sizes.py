"""What the free sizes of a captured graph's inputs are called.

Owns the way from the symbols that ``torch.export`` has put into a graph's inputs to
:class:`~srigl_fx.passes.sizes.Sizes`. It must not know which sizes were asked for, nor what is done with them.

1. A size is free if the graph has a symbol for it; equal symbols are sizes that the graph ties.
2. A size that the graph computes from others is a sum of multiples of them; of one that is more, nothing is known.
3. The first leading size that is free is the batch, and so are the leading sizes that are as long in the example.
4. The batch is called "batch", another leading size by its input, and any other by its input and its axis.
5. What the trace took for true of sizes is a condition on them, until it is known whether the graph needs it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from srigl_fx.passes.capture_checks import free_sizes
from srigl_fx.passes.guards import conditions_of
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import BATCH, Condition, Size, Sizes

UNKNOWN = "?"  # what the name of a size begins with that is no sum of others

_UNBOUNDED = 2**31  # a larger limit is that of an index type
_SMALLEST = 2  # export takes smaller sizes for constants: it says nothing of them


def symbols_of(values: Sequence[Any], leaves: Sequence[Any], ranges: Mapping[Any, Any]) -> Sizes:
    """The free sizes of inputs, by the symbols that the graph has for them.

    Args:
        values: What the graph's inputs have as metadata.
        leaves: The leaves of the example inputs.
        ranges: The limits of symbols, as an exported program has them.
    """
    axes: list[dict[int, Size]] = []
    limits: dict[str, tuple[int, int | None]] = {}
    for value in values:
        own: dict[int, Size] = {}
        for axis in sorted(free_sizes(value)):  # rule 1
            expression = value.shape[axis].node.expr
            own[axis] = _sum_of(expression)
            for symbol in expression.free_symbols:
                if (found := ranges.get(symbol)) is not None:
                    least, most = int(found.lower) if found.lower > _SMALLEST else 1, None
                    if found.upper < _UNBOUNDED:
                        most = int(found.upper)
                    limits[str(symbol)] = (least, most)
        axes.append(own)
    return Sizes(axes=tuple(axes), batch=batch_names(axes, leaves), limits=limits, conditions=_conditions(values))


def _conditions(values: Sequence[Any]) -> tuple[Condition, ...]:
    """Rule 5."""
    example: dict[str, int] = {}
    shapes: Any = None
    for value in values:
        for axis in free_sizes(value):
            size = value.shape[axis].node
            shapes = size.shape_env
            if size.expr.is_Symbol and size.has_hint():
                example[str(size.expr)] = int(size.hint)
    guards = [shapes.replace(guard.expr) for guard in getattr(shapes, "guards", ())]
    return conditions_of(guards, example)


def batch_names(axes: Sequence[Mapping[int, Size]], leaves: Sequence[Any]) -> tuple[str, ...]:
    """Rule 3: the names of leading sizes that are as long as the first."""
    leading = [int(leaf.shape[0]) if 0 in own else None for own, leaf in zip(axes, leaves, strict=True)]
    batch = next((size for size in leading if size is not None), None)
    counted = [axes[i][0].name for i, size in enumerate(leading) if size is not None and size == batch]
    return tuple(dict.fromkeys(name for name in counted if name is not None))


def _sum_of(expression: Any) -> Size:
    """Rule 2."""
    terms: list[tuple[str, int]] = []
    constant = 0
    for part, factor in expression.as_coefficients_dict().items():
        if part.is_Symbol and factor.is_Integer:
            terms.append((str(part), int(factor)))
        elif part.is_number and (part * factor).is_Integer:
            constant = int(part * factor)
        else:
            return Size.named(f"{UNKNOWN}{expression}")
    return Size(tuple(terms), constant)


def named_sizes(sizes: Sizes, module: fx.GraphModule, given: Mapping[str, Size] | None = None) -> Sizes:
    """The same sizes with names in the place of symbols; those of ``given`` are called as that says."""
    names: dict[str, Size] = dict(given or {})
    taken = {name for size in names.values() for name, _ in size.terms}
    inputs = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    # Rule 4.
    for name, own in zip(inputs, sizes.axes, strict=True):
        for axis, size in own.items():
            if size.name is not None and size.name not in names:
                wanted = f"{name}_batch" if axis == 0 else f"{name}_{axis}"
                if axis == 0 and sizes.batch and size.name == sizes.batch[0] and BATCH not in taken:
                    wanted = BATCH
                names[size.name] = Size.named(_unused(wanted, taken))
    for symbol in [symbol for symbol in sizes.names if symbol not in names]:
        names[symbol] = Size.named(_unused("size", taken))
    limits: dict[str, tuple[int, int | None]] = {}
    for symbol, (least, most) in sizes.limits.items():
        if symbol in names and (called := names[symbol].name) is not None:
            others = limits.get(called, (1, None))
            limits[called] = (max(least, others[0]), min((n for n in (most, others[1]) if n is not None), default=None))
    counted = [names[symbol].name for symbol in sizes.batch]
    batch = dict.fromkeys(called for called in counted if called is not None)
    axes = tuple({axis: size.put(names) for axis, size in own.items()} for own in sizes.axes)
    known = [item.put(names) for item in sizes.conditions if names.keys() >= set(item.names)]
    conditions = tuple(item for item in known if item is not None)
    return replace(sizes, axes=axes, batch=tuple(batch), limits=limits, conditions=conditions)


def _unused(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate


def example_symbols(program: Program) -> dict[str, int]:
    """The symbols of free sizes that are not the batch, with the numbers that they had at the capture."""
    values = [node.meta.get("val") for node in program.module.graph.find_nodes(op="placeholder")]
    sizes = [(i, axis, value.shape[axis]) for i, value in enumerate(values) for axis in sorted(free_sizes(value))]
    counted = {
        str(symbol)
        for i, axis, size in sizes
        if axis == 0 and program.sizes.batched(i)
        for symbol in size.node.expr.free_symbols
    }
    found: dict[str, int] = {}
    for _, _, size in sizes:
        if size.node.expr.is_Symbol and str(size.node.expr) not in counted and size.node.has_hint():
            found[str(size.node.expr)] = int(size.node.hint)
    return found


def specialised_by(program: Program, axis: int) -> str:
    """The line of the model that has made one number of a size along this axis, as ": model.py, line 7, `...`".

    "" where no line outside torch is known to have done so.
    """
    for node in program.module.graph.find_nodes(op="placeholder"):
        shapes: Any = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        for symbol, where in getattr(shapes, "replacements_slocs", {}).items():
            frame: Any = getattr(where, "framework_loc", None)
            names = [str(one.name) for one in shapes.var_to_sources.get(symbol, ())]
            inside = (os.path.dirname(torch.__file__), os.path.dirname(__file__), "<")
            own = frame is not None and bool(frame.line) and not frame.filename.startswith(inside)
            if own and any(name.endswith(f".size()[{axis}]") for name in names):
                return f": {os.path.basename(frame.filename)}, line {frame.lineno}, `{frame.line}`"
    return ""
