"""The three products of sparse training: a sparse matrix of any pattern times activations, its transpose, its values.

Owns the matrix's pattern in the form that the kernels read, the packed activations, and the calls. It must not know
autograd, layers or how a pattern was chosen. Importing it compiles nothing.
"""

import ctypes
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.cpu import threads
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import training_job
from srigl_fx.runtime.cpu.kernels.training_job import CHUNK

_BLOCK: Final = 1024  # columns whose activations the kernels keep in the cache


@dataclass(frozen=True, eq=False)
class Rows:
    """A pattern in compressed rows, cut into blocks of columns.

    Attributes:
        rows: The number of rows.
        columns: The number of columns.
        starts: int32 (rows * blocks + 1,), the first entry of each row in each block.
        indices: uint16 (entries,), columns relative to their block.
    """

    rows: int
    columns: int
    starts: Tensor
    indices: Tensor

    @property
    def blocks(self) -> int:
        """The number of blocks of columns."""
        return max(1, -(-self.columns // _BLOCK))


class Pattern:
    """Where the entries of a matrix (rows, columns) are, by rows and by columns.

    Args:
        row: int64 (entries,), the rows of the entries, ascending.
        column: int64 (entries,), their columns, ascending within a row.
        rows: The number of rows.
        columns: The number of columns.

    Example:
        >>> pattern = Pattern.of_mask(torch.tensor([[True, False, True], [False, False, False]]))
        >>> x = pack(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        >>> pattern.multiply(torch.tensor([10.0, 1.0]), x).tolist()
        [[13.0, 0.0], [46.0, 0.0]]
    """

    def __init__(self, row: Tensor, column: Tensor, rows: int, columns: int) -> None:
        self.shape = rows, columns
        self.positions = row * columns + column
        self._forward = _rows(row, column, rows, columns)
        self._order = torch.argsort(column, stable=True)
        self._transposed = _rows(column[self._order], row[self._order], columns, rows)

    @classmethod
    def of_mask(cls, mask: Tensor) -> "Pattern":
        """The pattern of a bool mask (rows, columns); entries are in its order."""
        row, column = mask.nonzero(as_tuple=True)
        return cls(row, column, *mask.shape)

    def pays(self, batch: int) -> bool:
        """Whether these products are faster than dense ones at a batch size.

        Measured: dense products do 2.5 times as many multiply-adds a second, but are bound by the memory below some 16
        samples; whole chunks are computed in any case.
        """
        rows, columns = self.shape
        padded = -(-batch // CHUNK) * CHUNK
        return self.positions.numel() * padded <= 0.4 * rows * columns * max(batch, 16)

    def multiply(self, values: Tensor, x: "Packed", bias: Tensor | None = None) -> Tensor:
        """``x W^T + bias``: float32 (batch, rows).

        Args:
            values: float32, the entries of W in the order of the pattern.
            x: Packed (batch, columns).
            bias: float32 (rows,), or None.
        """
        return _multiply(self._forward, values.reshape(-1), x, bias)

    def multiply_transposed(self, values: Tensor, gradient: "Packed") -> Tensor:
        """``g W``: float32 (batch, columns).

        Args:
            values: float32, the entries of W in the order of the pattern.
            gradient: g, packed (batch, rows).
        """
        return _multiply(self._transposed, values.reshape(-1).index_select(0, self._order), gradient, None)

    def value_gradient(self, x: "Packed", gradient: "Packed") -> Tensor:
        """The entries of ``g^T x`` at the pattern's positions, in its order: float32 (entries,)."""
        found = torch.empty(self.positions.numel())
        side = self._forward
        fields = {"PACKED": x.data, "FEATURES": side.columns, "GRADIENT": gradient.data, "OUT": found}
        if found.numel():
            _call("value_gradient_task", _parts(1), BATCH=x.batch, **_matrix(side), **fields)
        return found


@dataclass(frozen=True, eq=False)
class Packed:
    """Activations (batch, features) as the kernels read them: float32 (chunks, features, 64)."""

    data: Tensor
    batch: int


def pack(x: Tensor) -> Packed:
    """Pack float32 activations (batch, features) of any layout.

    Raises:
        FormatError: Not a float32 matrix on the CPU.

    Example:
        >>> pack(torch.ones(70, 3)).data.shape
        torch.Size([2, 3, 64])
    """
    if x.dim() != 2 or x.dtype is not torch.float32 or x.device.type != "cpu":
        raise FormatError(f"activations must be a float32 matrix on the CPU, not {x.dtype} {tuple(x.shape)} {x.device}")
    if 1 not in x.stride() or min(x.stride()) < 1:
        x = x.contiguous()
    batch, features = x.shape
    chunks = -(-batch // CHUNK)
    packed = torch.empty(chunks, features, CHUNK)
    if packed.numel():
        parts = _parts(chunks)
        _call("pack_task", chunks * parts, PARTS=parts, PACKED=packed, FEATURES=features, **_dense(x))
    return Packed(packed, batch)


def _multiply(side: Rows, values: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    chunks = packed.data.shape[0]
    y = torch.empty(packed.batch, side.rows)
    if y.numel():
        parts = _parts(chunks)
        fields = {"PACKED": packed.data, "FEATURES": side.columns, "VALUES": values.contiguous()}
        if bias is not None:
            fields["BIAS"] = bias.contiguous()
        _call("product_task", chunks * parts, PARTS=parts, **_matrix(side), **_dense(y), **fields)
    return y


def _rows(row: Tensor, column: Tensor, rows: int, columns: int) -> Rows:
    blocks = max(1, -(-columns // _BLOCK))
    counts = torch.bincount(row * blocks + column // _BLOCK, minlength=rows * blocks)
    starts = torch.zeros(rows * blocks + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    return Rows(rows, columns, starts, (column % _BLOCK).to(torch.uint16))


def _dense(tensor: Tensor) -> dict[str, Any]:
    sample, feature = tensor.stride()
    return {"DENSE": tensor, "SAMPLE_STRIDE": sample, "FEATURE_STRIDE": feature, "BATCH": tensor.shape[0]}


def _matrix(side: Rows) -> dict[str, Any]:
    return {"STARTS": side.starts, "INDICES": side.indices, "ROWS": side.rows, "BLOCKS": side.blocks}


def _parts(tasks: int) -> int:
    """Into how many parts to cut each of so many tasks, for the threads to share."""
    return -(-torch.get_num_threads() // tasks)


def _call(name: str, tasks: int, **fields: Any) -> None:
    """Run all tasks of a job, of which tensors are given by their addresses."""
    fields.setdefault("PARTS", tasks)
    job = (ctypes.c_int64 * training_job.SIZE)()
    for field, value in fields.items():
        job[getattr(training_job, field)] = value.data_ptr() if isinstance(value, Tensor) else value
    threads.run(entry(name), ctypes.addressof(job), tasks, torch.get_num_threads())
    if job[training_job.FAILED]:
        raise MemoryError(f"{name}: no memory for {tasks} tasks")
