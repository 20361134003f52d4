"""The canonical condensed weight: what is stored, executed and exported.

Owns the format itself: building it from a dense weight and its mask, expanding it back, checking it. It must not know
torch, ONNX or any kernel; a kernel that wants another layout packs this one.
"""

from collections.abc import Sequence
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
            are no weights; every reader must skip them. Neighbours that keep the same columns may share a row of
            indices, of which there are fewer then.
        active: int32 (n_active,), the rows of the neurons that are not ablated, ascending. Where rows share their
            indices it is (2, n_active): below each row stands the row of ``indices`` that it reads, which is 0 first,
            and then that of its neighbour or the next.
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

        What is kept is decided by the mask alone: a live weight may be exactly zero. Neighbouring active rows whose
        masks are equal share their indices, if that makes the weight smaller.

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
            >>> shared = CondensedWeight.from_dense(np.ones((4, 3)), np.ones((4, 3), bool))
            >>> shared.indices.tolist(), shared.active.tolist()
            ([[0, 1, 2]], [[0, 1, 2, 3], [0, 0, 0, 0]])
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
        indices, operand = _shared(np.ascontiguousarray(columns, dtype=index_dtype(fan_in)), active.astype(np.int32))
        condensed = cls(
            values=rounded,
            indices=indices,
            active=operand,
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
    def rows(self) -> Array:
        """int32 (n_active,), the rows of the neurons that are not ablated, whether they share indices or not."""
        return self.active if self.active.ndim == 1 else self.active[0]

    @property
    def row_indices(self) -> Array:
        """The indices of each active row (n_active, k), whether it shares them or not.

        Example:
            >>> ones = np.ones((4, 3))
            >>> CondensedWeight.from_dense(ones, ones > 0).row_indices.tolist()
            [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
        """
        return row_indices(self.indices, self.active)

    @property
    def nbytes(self) -> int:
        """The bytes of the arrays: about six per kept weight, four with values of 16 bits, three with eight.

        Indices are two of them, or less where rows share theirs.
        """
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
        indices = self.row_indices
        kept = ~is_padding(indices)
        rows = np.broadcast_to(self.rows[:, None], kept.shape)[kept]
        columns = indices[kept]
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
            ("active", self.active, 2 if np.ndim(self.active) == 2 else 1, (np.int32,)),
            ("bias", self.bias, 1, (np.float32,)),
        ):
            if not isinstance(array, np.ndarray) or array.ndim != dimensions or array.dtype not in dtypes:
                wanted = " or ".join(np.dtype(dtype).name for dtype in dtypes)
                return f"{name} must be a {dimensions}-D {wanted} array, not {getattr(array, 'dtype', type(array))}"
        problem = shape_problem(self.values.shape, self.indices.shape, self.active.shape) or self._scales_problem()
        if problem:
            return problem
        if self.bias.shape != (self.out_features,):
            return f"bias has shape {self.bias.shape} for {self.out_features} rows"
        if self.k > self.in_features or (self.n_active and not self.k):
            return f"a fan-in of {self.k} is not in 1..{self.in_features}"
        problem = range_problem(self.indices, self.active, self.in_features, self.out_features)
        if not problem and self.values[is_padding(self.row_indices)].any():
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


def row_indices(indices: Array, active: Array) -> Array:
    """The indices of each active row (n_active, k), whether rows share them or not.

    Example:
        >>> row_indices(np.array([[0, 2], [1, 2]]), np.array([[3, 4, 8], [0, 0, 1]])).tolist()
        [[0, 2], [0, 2], [1, 2]]
    """
    return indices if active.ndim == 1 else indices[active[1]]


def _shared(indices: Array, active: Array) -> tuple[Array, Array]:
    """``indices`` and ``active`` with equal neighbours' indices stored once, or as they are where nothing is saved."""
    first = np.ones(len(indices), np.bool_)
    first[1:] = (indices[1:] != indices[:-1]).any(axis=1)
    if not _saves(len(first), int(first.sum()), indices[:1].nbytes):
        return indices, active
    return indices[first], np.stack([active, (np.cumsum(first) - 1).astype(np.int32)])


def _saves(n_active: int, different: int, row_bytes: int) -> bool:
    """Whether rows of indices that are stored once are more than what says which row each active row reads."""
    return (n_active - different) * row_bytes > n_active * np.dtype(np.int32).itemsize


def count_index_rows(mask: Array) -> int:
    """How many rows of indices :meth:`CondensedWeight.from_dense` stores for a mask (n, F).

    Example:
        >>> count_index_rows(np.ones((8, 5), bool)), count_index_rows(np.eye(8, dtype=bool))
        (1, 8)
    """
    kept = mask[mask.any(axis=1)]
    different = len(kept[:1]) + int((kept[1:] != kept[:-1]).any(axis=1).sum())
    row_bytes = int(kept.sum(axis=1).max(initial=0)) * index_dtype(mask.shape[1]).itemsize
    return different if _saves(len(kept), different, row_bytes) else len(kept)


def padding_problem(mask: Array, value_bytes: int = 4, parts: Sequence[Array] = ()) -> str:
    """Why a mask (n, F) whose rows keep unequal numbers of weights is better stored densely, or "" where it is not.

    Rows are padded to the longest, so that a few long ones can make of a sparse weight more bytes than its float32
    matrix has.

    Args:
        mask: bool (n, F); rows that keep nothing are not stored.
        value_bytes: The bytes of one stored value.
        parts: Masks of different rows of it, where each is padded to its own longest row.

    Example:
        >>> padding_problem(np.tri(4, 3, dtype=bool)).partition(":")[0]
        'its rows keep 1 to 3 of 3 weights'
        >>> padding_problem(np.eye(4, 8, dtype=bool)), padding_problem(np.ones((4, 8), bool))
        ('', '')
    """
    counts = mask.sum(axis=1)
    counts = counts[counts > 0]
    if not counts.size or counts.min() == counts.max():
        return ""
    lengths = [part.sum(axis=1) for part in parts] or [counts]
    entries = sum(int((part > 0).sum() * part.max(initial=0)) for part in lengths)
    stored = entries * (value_bytes + index_dtype(mask.shape[1]).itemsize)
    if stored < mask.size * np.dtype(np.float32).itemsize:
        return ""
    groups = f" of each of {len(parts)} groups" if len(parts) > 1 else ""
    return (
        f"its rows keep {counts.min()} to {counts.max()} of {mask.shape[1]} weights: padded to the longest{groups}, "
        "they take as many bytes as the dense weight"
    )


def shape_problem(values: Sequence[int], indices: Sequence[int], active: Sequence[int]) -> str:
    """What is wrong with the shapes of a condensed weight's operands, or "" where they fit each other.

    Example:
        >>> shape_problem((8, 3), (8, 3), (8,)), shape_problem((8, 3), (2, 3), (2, 8))
        ('', '')
        >>> shape_problem((8, 3), (2, 3), (8,))
        'indices (2, 3) and values (8, 3) differ in shape, and active (8,) does not say which rows share indices'
    """
    values, indices, active = tuple(values), tuple(indices), tuple(active)
    if len(values) != 2 or len(indices) != 2 or indices[1] != values[1]:
        return f"indices {indices} and values {values} differ in shape"
    if active[-1:] != values[:1] or len(active) > 2 or active[:-1] not in ((), (2,)):
        return f"active has shape {active} for {values[0]} active rows"
    if len(active) == 1 and indices != values:
        return (
            f"indices {indices} and values {values} differ in shape, and active {active} does not say which rows share "
            "indices"
        )
    if indices[0] > values[0]:
        return f"indices have {indices[0]} rows for {values[0]} active rows"
    return ""


def range_problem(indices: Array, active: Array, in_features: int, out_features: int) -> str:
    """What is wrong with the numbers in ``indices`` and ``active``, or "" where they are safe to execute.

    Their shapes fit.

    Example:
        >>> range_problem(np.array([[0, 4]], np.int32), np.array([0], np.int32), 4, 1)
        'an index of 4 is not in 0..3'
        >>> range_problem(np.array([[0, 1]], np.int32), np.array([[0, 1], [0, 1]], np.int32), 4, 2)
        'the rows of indices that active rows read are not 0, and then the one before or the next, up to 0'
    """
    if active.ndim == 2:
        active, read = active
        if len(read) and (read[0] != 0 or read[-1] != len(indices) - 1 or not np.isin(np.diff(read), (0, 1)).all()):
            return (
                "the rows of indices that active rows read are not 0, and then the one before or the next, up to "
                f"{len(indices) - 1}"
            )
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
