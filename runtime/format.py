"""The canonical condensed weight: what is stored, executed and exported.

Owns the format itself: building it from a dense weight and its mask, expanding it back, checking it. It must not know
torch, ONNX or any kernel; a kernel that wants another layout packs this one.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from srigl_fx.errors import FormatError
from srigl_fx.runtime.quantisation import LARGEST_FAN_IN, LARGEST_VALUE, quantise_weights
from srigl_fx.runtime.value_types import VALUE_TYPES
from srigl_fx.runtime.value_types import ValueDtype as ValueDtype

Array = NDArray[Any]
UINT16_LIMIT = 65536  # the largest fan-in whose indices all fit into uint16
VALUE_DTYPES: dict[ValueDtype, np.dtype[Any]] = {row.name: row.numpy for row in VALUE_TYPES}


def index_dtype(in_features: int) -> np.dtype[Any]:
    """The dtype of the indices into ``in_features`` inputs: uint16 where they fit, else int32.

    Example:
        >>> index_dtype(65536), index_dtype(65537)
        (dtype('uint16'), dtype('int32'))
    """
    return np.dtype(np.uint16 if in_features <= UINT16_LIMIT else np.int32)


@dataclass(frozen=True, eq=False, kw_only=True)
class CondensedWeight:
    """A constant fan-in weight without its zeros ("condensed" in SRigL, Lasby et al., ICLR 2024).

    Attributes:
        values: float32, bfloat16, float16 or int8 (n_active, k), the kept weights of each active neuron.
        indices: uint16 or int32 (n_active, k), their columns in the (n, F) matrix view, ascending in a row. A row that
            keeps fewer than k is filled up at its end: with the value 0 and the last column once more. Such entries
            are no weights; every reader must skip them.
        active: int32 (n_active,), the rows of the neurons that are not ablated, ascending.
        bias: float32 (out_features,), zeros where the layer has none. An ablated neuron yields its bias.
        out_features: n, the rows of the matrix view.
        in_features: F, its columns: for a convolution, channels / groups * prod(kernel).
        scales: float32 (n_active,) with values of eight bits: what one of them is worth in its row; else None.
    """

    values: Array
    indices: Array
    active: Array
    bias: Array
    out_features: int
    in_features: int
    scales: Array | None = None

    @classmethod
    def from_dense(
        cls,
        weight: Array,
        mask: Array,
        bias: Array | None = None,
        *,
        dtype: ValueDtype = "float32",
        pad: bool = False,
    ) -> "CondensedWeight":
        """Condense a dense weight.

        What is kept is decided by the mask alone: a live weight may be exactly zero.

        Args:
            weight: (n, F) matrix view of the weight; anything NumPy can cast to float32.
            mask: bool (n, F).
            bias: (n,), or None for zeros.
            dtype: What the values are stored in, each rounded to the nearest; in int8, as
                :func:`srigl_fx.runtime.quantisation.quantise_weights` has it.
            pad: Whether active rows may keep unequal numbers of weights; the shorter ones are padded.

        Raises:
            FormatError: Shapes that do not fit, active rows that keep unequal numbers of weights without ``pad``, or a
                weight that is too large for ``dtype``.

        Example:
            >>> weight = np.array([[0.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
            >>> condensed = CondensedWeight.from_dense(weight, np.array([[True, False, True], [False] * 3]))
            >>> condensed.values.tolist(), condensed.indices.tolist(), condensed.active.tolist()
            ([[0.0, 3.0]], [[0, 2]], [0])
        """
        weight, mask = np.asarray(weight), np.asarray(mask)
        if weight.ndim != 2 or weight.shape != mask.shape or mask.dtype != np.bool_:
            raise FormatError(
                f"cannot condense a weight of shape {weight.shape} with a {mask.dtype} mask of shape {mask.shape}: "
                "both must be the (n, F) matrix view, the mask bool"
            )
        n, fan_in = weight.shape
        counts = mask.sum(axis=1)
        active = np.flatnonzero(counts)
        k = int(counts[active[0]]) if active.size else 0
        uneven = active[counts[active] != k]
        if uneven.size and not pad:
            raise FormatError(
                f"cannot condense a weight of shape {weight.shape}: row {active[0]} keeps {k} weights but row "
                f"{uneven[0]} keeps {counts[uneven[0]]}; every active row must keep the same number (constant fan-in)"
            )
        counts, k = counts[active], int(counts.max(initial=0))
        starts, steps = (np.cumsum(counts) - counts)[:, None], np.arange(k)
        last = counts[:, None] - 1
        columns = np.nonzero(mask)[1][starts + np.minimum(steps, last)]
        values = np.where(steps <= last, weight[active[:, None], columns], 0)
        rounded, scales = _rounded(np.ascontiguousarray(values, dtype=np.float32), dtype)
        condensed = cls(
            values=rounded,
            indices=np.ascontiguousarray(columns, dtype=index_dtype(fan_in)),
            active=active.astype(np.int32),
            bias=np.zeros(n, np.float32) if bias is None else np.array(bias, dtype=np.float32),
            out_features=n,
            in_features=fan_in,
            scales=scales,
        )
        condensed.check()
        return condensed

    @property
    def n_active(self) -> int:
        """The number of neurons that are not ablated."""
        return int(self.values.shape[0])

    @property
    def k(self) -> int:
        """The fan-in every active neuron keeps, or the largest where rows are padded."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays: about six per kept weight, four with values of 16 bits, three with eight."""
        scales = 0 if self.scales is None else self.scales.nbytes
        return int(self.values.nbytes + self.indices.nbytes + self.active.nbytes + self.bias.nbytes + scales)

    def to_dense(self) -> tuple[Array, Array]:
        """Expand to (weight float32, mask bool), both (n, F).

        Example:
            >>> weight, mask = np.eye(2, 3, dtype=np.float32), np.eye(2, 3, dtype=bool)
            >>> again = CondensedWeight.from_dense(weight, mask).to_dense()
            >>> bool((again[0] == weight).all() and (again[1] == mask).all())
            True
        """
        weight = np.zeros((self.out_features, self.in_features), np.float32)
        mask = np.zeros(weight.shape, np.bool_)
        kept = ~is_padding(self.indices)
        rows = np.broadcast_to(self.active[:, None], kept.shape)[kept]
        columns = self.indices[kept]
        values = self.values if self.scales is None else self.values * self.scales[:, None]
        weight[rows, columns] = values[kept]
        mask[rows, columns] = True
        return weight, mask

    def check(self) -> None:
        """Check every promise of the format.

        Raises:
            FormatError: A wrong dtype or shape, an index out of range, rows or columns that are not ascending, or
                padding that is not zero.
        """
        problem = self.problem()
        if problem:
            raise FormatError(
                f"malformed condensed weight ({self.out_features} x {self.in_features}): {problem}; "
                "rebuild it from the dense weight and its mask"
            )

    def _scales_problem(self) -> str:
        is_scaled = self.values.dtype == np.int8
        if self.scales is None or not is_scaled:
            return "" if is_scaled == (self.scales is not None) else "values of int8, and no others, have scales"
        if not isinstance(self.scales, np.ndarray) or self.scales.dtype != np.float32:
            return f"scales must be a float32 array, not {getattr(self.scales, 'dtype', type(self.scales))}"
        if self.scales.shape != (self.n_active,):
            return f"scales have shape {self.scales.shape} for {self.n_active} active rows"
        if not (np.isfinite(self.scales).all() and (self.scales >= 0).all()):
            return "scales must be finite, and none negative"
        if self.values.size and self.values.min() < -LARGEST_VALUE:
            return f"values of int8 are -{LARGEST_VALUE} to {LARGEST_VALUE}, not {self.values.min()}"
        if self.k > LARGEST_FAN_IN:
            return f"a fan-in of {self.k} is too large for sums of int32 (largest with int8: {LARGEST_FAN_IN})"
        return ""

    def problem(self) -> str:
        """What is wrong with it, or "" where it keeps every promise of the format."""
        for name, array, dimensions, dtypes in (
            ("values", self.values, 2, tuple(VALUE_DTYPES.values())),
            ("indices", self.indices, 2, (np.uint16, np.int32)),
            ("active", self.active, 1, (np.int32,)),
            ("bias", self.bias, 1, (np.float32,)),
        ):
            if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype not in dtypes:
                wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
                return f"{name} must be a {dimensions}-D {wanted} array, not {getattr(array, 'dtype', type(array))}"
        if self.indices.shape != self.values.shape:
            return f"indices {self.indices.shape} and values {self.values.shape} differ in shape"
        if self.active.shape != (self.n_active,):
            return f"active has shape {self.active.shape} for {self.n_active} active rows"
        problem = self._scales_problem()
        if problem:
            return problem
        if self.bias.shape != (self.out_features,):
            return f"bias has shape {self.bias.shape} for {self.out_features} rows"
        if self.k > self.in_features or (self.n_active and not self.k):
            return f"a fan-in of {self.k} is not in 1..{self.in_features}"
        problem = range_problem(self.indices, self.active, self.in_features, self.out_features)
        if not problem and self.values[is_padding(self.indices)].any():
            return "the indices of a row are not ascending: only zeros at its end may repeat its last index"
        return problem


def _rounded(values: Array, dtype: ValueDtype) -> tuple[Array, Array | None]:
    """float32 values in another dtype, and the scales of their rows; none that is finite may become infinite."""
    if dtype not in VALUE_DTYPES:
        raise FormatError(f"values are stored in one of {', '.join(VALUE_DTYPES)}, not in {dtype}")
    if dtype == "int8":
        if not np.isfinite(values).all():
            raise FormatError("a weight that is not finite has no value of eight bits; store the values in float32")
        return quantise_weights(values)
    with np.errstate(over="ignore"):
        rounded = values.astype(VALUE_DTYPES[dtype])
    lost = values[np.isfinite(values) & ~np.isfinite(rounded)]
    if lost.size:
        finfo: Any = ml_dtypes.finfo
        raise FormatError(
            f"a weight of {lost[np.abs(lost).argmax()]:.5g} is too large for {dtype} "
            f"(largest: {float(finfo(VALUE_DTYPES[dtype]).max):.5g}); store the values in bfloat16 or float32"
        )
    return rounded, None


def range_problem(indices: Array, active: Array, in_features: int, out_features: int) -> str:
    """What is wrong with the numbers in ``indices`` and ``active``, or "" where they are safe to execute.

    Example:
        >>> range_problem(np.array([[0, 4]], np.int32), np.array([0], np.int32), 4, 1)
        'an index of 4 is not in 0..3'
    """
    for name, array, limit in (("an index", indices, in_features), ("an active row", active, out_features)):
        if array.size:
            low, high = int(array.min()), int(array.max())
            if low < 0 or high >= limit:
                return f"{name} of {low if low < 0 else high} is not in 0..{limit - 1}"
    if (active[1:] <= active[:-1]).any():
        return "active rows are not ascending"
    repeated = is_padding(indices)
    if (indices[:, 1:] < indices[:, :-1]).any() or (repeated[:, :-1] & ~repeated[:, 1:]).any():
        return "the indices of a row are not ascending"
    return ""


def is_padding(indices: Array) -> Array:
    """Which entries pad their row, as they repeat the index before them: bool (n_active, k).

    Example:
        >>> is_padding(np.array([[1, 4, 4], [0, 1, 2]])).tolist()
        [[False, False, True], [False, False, False]]
    """
    repeated = np.zeros(indices.shape, np.bool_)
    repeated[:, 1:] = indices[:, 1:] == indices[:, :-1]
    return repeated
