"""How far the results of two models may lie apart, and how far they do.

Owns the one measure, and the one loop over batch sizes and calls, that lowering, its regions, the check between passes
and export verify with. It must not know what is compared: its callers run the two models and word the error.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of the largest output, for float32


@dataclass(frozen=True)
class Results:
    """What one call of a model gave.

    Attributes:
        outputs: The leaves of what it returned.
        buffers: The buffers that it wrote, by name, as they were afterwards.
    """

    outputs: Sequence[Any]
    buffers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One result in which two models differ.

    Attributes:
        what: Which one: "output 0", "the buffer total", or "the number of outputs".
        error: The relative error; infinite where there is no other number for it.
        size: The batch size, None where there was one only.
        call: Which of several calls in a row, from 0.
        counts: The number of outputs expected, and that which came.
    """

    what: str
    error: float
    size: int | None
    call: int
    counts: tuple[int, int]

    @property
    def place(self) -> str:
        """Where it was found, for an error message: " at batch 3 in call 2", or less."""
        return (f" at batch {self.size}" if self.size is not None else "") + (
            f" in call {self.call + 1}" if self.call else ""
        )


@dataclass(frozen=True)
class Comparison:
    """How two models compared.

    Attributes:
        worst: The largest relative error of all results.
        wrong: The first of those that are off by more than is allowed.
    """

    worst: float
    wrong: Difference | None


def compare(
    sizes: Iterable[int | None],
    expected: Callable[[int | None], Sequence[Results]],
    got: Callable[[int | None, int], Sequence[Results]],
    allowed: float = TOLERANCE,
) -> Comparison:
    """Compare two models at each batch size, call by call: the number of outputs, the outputs, the written buffers.

    Args:
        sizes: The batch sizes, or one None where the inputs are what they are.
        expected: Runs the model on inputs of that size, several times in a row where it keeps state.
        got: Runs the other one alike, as many times as it is told.
        allowed: The largest relative error that is not wrong.

    Example:
        >>> half_off = lambda n, calls: [Results([n, 2.0 if n == 1 else 2.5])]
        >>> found = compare([1, 3], lambda n: [Results([n, 2.0])], half_off)
        >>> found.worst, found.wrong.what, found.wrong.place
        (0.25, 'output 1', ' at batch 3')
    """
    worst, wrong = 0.0, None
    for size in sizes:
        wanted = expected(size)
        for call, (one, other) in enumerate(zip(wanted, got(size, len(wanted)), strict=True)):
            counts = (len(one.outputs), len(other.outputs))
            for what, error in _errors(one, other):
                worst = max(worst, error)
                if wrong is None and not error <= allowed:
                    wrong = Difference(what=what, error=error, size=size, call=call, counts=counts)
    return Comparison(worst, wrong)


def _errors(expected: Results, got: Results) -> Iterator[tuple[str, float]]:
    if len(expected.outputs) != len(got.outputs):
        yield "the number of outputs", math.inf
        return
    for position, (one, other) in enumerate(zip(expected.outputs, got.outputs, strict=True)):
        yield f"output {position}", relative_error(one, other)
    for name, value in expected.buffers.items():
        yield f"the buffer {name}", relative_error(value, got.buffers[name]) if name in got.buffers else math.inf


def tolerance(value_dtype: torch.dtype, layers: int) -> float:
    """The largest error allowed of a model, ``layers`` of whose weights are rounded to ``value_dtype``.

    A weight is off by at most 3.9e-3 of itself in bfloat16, 4.9e-4 in float16. The layers' errors are independent, so
    they add up as their squares do: whole networks are off by a third of that bound times the root of the number of
    layers, small ones with few outputs by up to all of it. Twice as much is allowed.

    Example:
        >>> tolerance(torch.float32, 50), tolerance(torch.bfloat16, 1), tolerance(torch.bfloat16, 16)
        (0.0001, 0.0078125, 0.03125)
    """
    if value_dtype is torch.float32:
        return TOLERANCE
    return max(TOLERANCE, torch.finfo(value_dtype).eps * math.sqrt(layers))


def relative_error(expected: Any, got: Any) -> float:
    """The largest difference over the largest expected value; infinite where type, shape or NaNs differ.

    Numbers that are not whole are compared as tensors are, complex ones by their absolute values; all else is equal or
    not.

    Example:
        >>> relative_error(torch.tensor([1.0, -4.0]), torch.tensor([2.0, -4.0]))
        0.25
        >>> relative_error(2.0, 2.5), relative_error(2, 3)
        (0.25, inf)
    """
    if isinstance(expected, float | complex) and isinstance(got, float | complex):
        expected, got = (torch.tensor(number, dtype=torch.complex128) for number in (expected, got))
    if not isinstance(expected, Tensor):
        return 0.0 if not isinstance(got, Tensor) and expected == got else float("inf")
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf")
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if torch.equal(expected, got) else float("inf")
    finite = expected.isfinite()
    same = (expected == got) | (expected.isnan() & got.isnan())
    if not bool(same[~finite].all()) or not bool(got[finite].isfinite().all()):
        return float("inf")
    if not finite.any():
        return 0.0
    difference, scale = float((expected[finite] - got[finite]).abs().max()), float(expected[finite].abs().max())
    return difference / scale if scale else (float("inf") if difference else 0.0)
