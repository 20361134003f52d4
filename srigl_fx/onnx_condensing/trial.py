"""Whether a condensed file gives in ONNX Runtime what its source does.

Owns the inputs that both are given and how far results may lie apart; it must not know how files are made.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from srigl_fx.errors import ExportError, LibraryError
from srigl_fx.onnx_export.tensor_types import DTYPES

if TYPE_CHECKING:
    import onnxruntime

Array = NDArray[Any]
TOLERANCE = 1e-4  # of the largest output: sums are taken in another order
# The same where numbers are rounded to eight bits behind a condensed node: one that is next to the border between two
# steps may fall to the other side, a step of 1/255 of what the next layer reads.
ROUNDED_TOLERANCE = 2e-2
_FREE = (2, 16)  # the first size and further ones, where they are free


def check(
    source: Path,
    condensed: Path,
    example_inputs: Mapping[str, Array] | None,
    *,
    fallback: bool,
    allowed: float,
    has_bytes: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """The largest relative error of a condensed file, with the library and without.

    Args:
        source: The source.
        condensed: The condensed file.
        example_inputs: Arrays by the names of inputs, or None for random ones.
        fallback: Whether it has one.
        allowed: The error that passes.
        has_bytes: Whether operators of the source multiply bytes. With uint8 by int8, ONNX Runtime's sums of two
            products stop at the limits of 16 bits on processors without VNNI, unless it is asked for exact ones.
        sizes: Of random inputs, what sizes that are free are, by their names.

    Raises:
        ExportError: A size is asked for that is not free, one of the two does not run, or outputs differ by more than
            what is allowed, of the largest.
    """
    reference = _reference(source, has_bytes)
    feeds = _feeds(reference, example_inputs, sizes or {})
    expected = _run(reference, feeds, "the source")
    del reference  # large weights are in memory once
    errors = {}
    for host in ("library", "fallback") if fallback else ("library",):
        try:
            session = _session(condensed, f"the condensed file ({host})", library=host == "library")
        except LibraryError:
            continue
        got = _run(session, feeds, f"the condensed file ({host})")
        errors[host] = max((relative_error(*pair) for pair in zip(expected, got, strict=True)), default=0.0)
        if not errors[host] <= allowed:
            raise ExportError(
                f"the condensed file ({host}) is off by {errors[host]:.1e} of the largest output (allowed: "
                f"{allowed:.0e}). Give example_inputs that are like the model's own, or verify=False"
            )
    return errors


def _reference(source: Path, has_bytes: bool) -> "onnxruntime.InferenceSession":
    if has_bytes:
        with contextlib.suppress(ExportError):  # with samples of int8 ONNX Runtime finds no operator for exact sums
            return _session(source, "the source", library=False, exact_sums=True)
    return _session(source, "the source", library=False)


def _session(path: Path, what: str, *, library: bool, exact_sums: bool = False) -> "onnxruntime.InferenceSession":
    import onnxruntime

    from srigl_fx.runtime.ort.session import register

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    # What the file says is computed: further optimizations round the samples of weights that are dequantised.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if exact_sums:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if library:
        register(options)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise ExportError(f"ONNX Runtime cannot open {what}: {error}") from error


def _run(session: "onnxruntime.InferenceSession", feeds: Mapping[str, Array], what: str) -> list[Array]:
    try:
        outputs: list[Array] = session.run(None, dict(feeds))
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run {what} on {', '.join(f'{name} {array.shape}' for name, array in feeds.items())}: "
            f"{error}; where the file needs other sizes than it says, give sizes (--size NAME=NUMBER) or "
            "example_inputs, by the names of the model's inputs, or verify=False"
        ) from error
    return outputs


def _feeds(
    session: "onnxruntime.InferenceSession", given: Mapping[str, Array] | None, asked: Mapping[str, int]
) -> dict[str, Array]:
    """Arrays for every input: those that are given, else random ones."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    shapes = [entry.shape for entry in session.get_inputs()]
    free = sorted({size for shape in shapes for size in shape if isinstance(size, str)})
    if unknown := sorted(asked.keys() - {*free}):
        raise ExportError(f"the source has no free size {unknown[0]!r}; those that it has: {', '.join(free) or 'none'}")
    sizes = _sizes(shapes, asked)
    for entry in session.get_inputs():
        if given is not None and entry.name in given:
            feeds[entry.name] = np.asarray(given[entry.name])
            continue
        if given is not None or entry.type not in DTYPES:
            raise ExportError(
                f"there is no example of the input {entry.name!r}, {entry.type} {entry.shape}: give example_inputs"
            )
        shape = [sizes.get(size, _FREE[min(axis, 1)]) for axis, size in enumerate(entry.shape)]
        dtype = np.dtype(DTYPES[entry.type])
        random = rng.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)
        feeds[entry.name] = random.astype(dtype)
    return feeds


def _sizes(shapes: Sequence[Sequence[int | str | None]], asked: Mapping[str, int]) -> dict[int | str | None, int]:
    """What each size of the inputs is: those of one name are equal, and a sum of names is the sum."""
    known: dict[str, int] = {**asked}
    sizes: dict[int | str | None, int] = {}
    for shape in shapes:
        for axis, size in enumerate(shape):
            if isinstance(size, int):
                sizes[size] = size
            elif size is not None and size in asked:
                sizes[size] = asked[size]
            elif size is not None and {"+", "*"}.isdisjoint(size):
                known.setdefault(size, _FREE[min(axis, 1)])
    for size in {size for shape in shapes for size in shape if isinstance(size, str)}:
        if size not in asked and (total := sum_of(size, known)) is not None:
            sizes[size] = total
    return sizes


def sum_of(size: str, known: Mapping[str, int]) -> int | None:
    """A size that is named by others, as the length of a mask over what a cache holds and what is new.

    Args:
        size: Such a name.
        known: The sizes of the others.

    Returns:
        None where one of them is not known.

    Example:
        >>> sum_of("past + 2*tokens + 1", {"past": 5, "tokens": 3}), sum_of("past + tokens", {"past": 5})
        (12, None)
    """
    total = 0
    for term in size.split("+"):
        factors = [
            int(factor) if factor.isdecimal() else known.get(factor) for factor in map(str.strip, term.split("*"))
        ]
        numbers = [factor for factor in factors if factor is not None]
        if len(numbers) < len(factors):
            return None
        total += math.prod(numbers)
    return total


def relative_error(expected: Array, got: Array) -> float:
    """The largest difference of an output, over its largest value; infinite where it is another kind of result.

    Example:
        >>> relative_error(np.array([4.0, np.inf]), np.array([3.0, np.inf])), relative_error(np.ones(2), np.ones(3))
        (0.25, inf)
    """
    if expected.shape != got.shape:
        return float("inf")
    if expected.dtype in (np.uint8, np.int8) and expected.dtype == got.dtype:  # steps of a scale
        return float(np.abs(got.astype(int) - expected.astype(int)).max(initial=0)) / np.iinfo(np.uint8).max
    if not np.issubdtype(expected.dtype, np.floating) or not expected.size:
        return 0.0 if np.array_equal(expected, got) else float("inf")
    finite = np.isfinite(expected)
    if not np.array_equal(expected[~finite], got[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    largest = float(np.abs(expected[finite]).max(initial=0.0))
    return float(np.abs(got[finite] - expected[finite]).max(initial=0.0)) / (largest or 1.0)
