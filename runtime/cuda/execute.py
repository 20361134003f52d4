"""One call of a condensed operator on a GPU: its layout, its packed weight, its launch on torch's stream.

Owns these steps; operands are valid. It must not know how operators are registered, checked or differentiated. A call
whose weight is packed and whose kernel is loaded waits for nothing, so that it can be captured in a CUDA graph; the
first call for a weight copies it to the host and back.
"""

import contextlib
import functools
import math
import struct
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.activations import ACTIVATIONS, NUMBERS
from srigl_fx.runtime.cpu.prepared_weights import can_train, index_rows_of
from srigl_fx.runtime.cuda import build
from srigl_fx.runtime.cuda.driver import Driver, driver
from srigl_fx.runtime.cuda.model import Gpu, Layer
from srigl_fx.runtime.cuda.packed import pack_rows, pack_windows
from srigl_fx.runtime.cuda.plan import WINDOW, Launch, plan
from srigl_fx.runtime.cuda.table import CudaKernel
from srigl_fx.runtime.dense import FUNCTIONS, dense_conv, expand
from srigl_fx.runtime.format import row_indices
from srigl_fx.runtime.validation import Checked

_LIMITS = {row.name: row.limits or (-math.inf, math.inf) for row in ACTIVATIONS}
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_ALLOWED_SHARED = 48 << 10  # bytes, of any kernel
_INDICES = {torch.uint16: "uint16", torch.int32: "int32"}


class Machine:
    """A GPU with the kernels that are loaded on it.

    Args:
        driver: What loads and launches.
        ordinal: Its number, to the driver and to torch.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._driver, self._ordinal = driver, ordinal
        self.gpu: Gpu
        self.gpu, self._target = driver.gpu(ordinal)
        self._loaded: dict[str, int] = {}
        self._allowed: dict[int, int] = {}  # by loaded kernels, bytes of shared memory, where more than usual
        self._lock = threading.Lock()

    def stream(self) -> int:
        """Torch's current stream on it."""
        return int(torch.cuda.current_stream(self._ordinal).cuda_stream)

    def launch(self, planned: Launch, dtype: str, arguments: bytes) -> None:
        """Launch on torch's current stream; the kernel is loaded, and built if need be, the first time."""
        grid = planned.blocks, planned.threads, planned.shared_bytes
        here = torch.cuda.current_device() == self._ordinal
        # In the context of this device, whichever is the thread's own: kernels are loaded and launched in it.
        with contextlib.nullcontext() if here else torch.cuda.device(self._ordinal):
            kernel = self._kernel(planned.kernel.symbol(dtype), planned.shared_bytes)
            self._driver.launch(kernel, *grid, self.stream(), self._ordinal, arguments)

    def _kernel(self, symbol: str, shared_bytes: int) -> int:
        """The loaded kernel, which may take this much shared memory; what is ready needs no lock."""
        kernel = self._loaded.get(symbol)
        if kernel is not None and shared_bytes <= self._allowed.get(kernel, _ALLOWED_SHARED):
            return kernel
        with self._lock:
            if symbol not in self._loaded:
                self._loaded[symbol] = self._driver.load(build.code_of(symbol, self._target), symbol)
            kernel = self._loaded[symbol]
            if shared_bytes > self._allowed.get(kernel, _ALLOWED_SHARED):
                self._driver.allow_shared(kernel, self._ordinal, shared_bytes)
                self._allowed[kernel] = shared_bytes
        return kernel


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The GPU that a tensor is on.

    Raises:
        CudaError: There is no driver.
    """
    return Machine(driver(), torch.cuda.current_device() if device.index is None else device.index)


@dataclass(frozen=True, eq=False)
class _OnDevice:
    """A packed weight on a GPU."""

    values: Tensor
    offsets: Tensor
    rows: Tensor
    starts: Tensor
    k: int
    source: "weakref.ref[Tensor]"
    facts: tuple[object, ...]


@functools.lru_cache(maxsize=64)
def _form(kernel: CudaKernel) -> tuple[struct.Struct, tuple[str, ...]]:
    """How the kernel's arguments lie, and their names in order: pointers first, so that there are no gaps."""
    pointers = tuple(pointer.partition(":")[0] for pointer in kernel.pointers)
    return struct.Struct(f"<{len(pointers)}Q{len(kernel.numbers)}i2f"), (*pointers, *kernel.numbers, "low", "high")


def _array(tensor: Tensor) -> Any:
    """As NumPy has it; the bits of bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _packed(checked: Checked, family: str, weight: Sequence[Tensor], in_features: int) -> _OnDevice:
    """The weight packed for a family of kernels, from memory or anew."""
    values, indices, active, bias = weight
    facts = values._version, values.data_ptr(), values.dtype, values.device

    def kept() -> _OnDevice | None:
        found: _OnDevice | None = checked.packed.get(("cuda", family))
        return None if found is None or found.facts != facts or found.source() is not values else found

    if (found := kept()) is not None:
        return found
    with checked.lock:
        found = kept()
        if found is None:
            listed = _array(active)
            sizes = row_indices(_array(indices), listed), listed if listed.ndim == 1 else listed[0]
            settings = (in_features, bias.shape[0])
            arrays = _array(values), *sizes, *settings
            made = pack_rows(*arrays) if family == "vector" else pack_windows(*arrays, WINDOW)
            values_there, offsets, rows, starts = (
                torch.from_numpy(array).to(values.device)
                for array in (made.values, made.offsets, made.rows, made.starts)
            )
            found = _OnDevice(values_there, offsets, rows, starts, made.k, weakref.ref(values), facts)
            checked.packed["cuda", family] = found
    return found


def refuse_eight_bits(op: str, scales: Tensor | None) -> None:
    """Raise a FormatError for values of int8, which have scales."""
    if scales is not None:
        raise FormatError(
            f"{op}: values of int8 have no CUDA kernel yet; lower the model with another value_dtype, or run it on "
            "the CPU"
        )


def linear(
    checked: Checked | None,
    x: Tensor,
    weight: Sequence[Tensor],
    in_features: int,
    residual: Tensor | None,
    activation: str,
    y_feature_major: bool,
) -> Tensor:
    """The outputs (..., n) of samples (..., in_features), with the memory of (n, ...) if so asked.

    ``x`` is read as it lies if it is contiguous, or if its (in_features, ...) transposed is. Values that may train are
    read from the canonical format, as optimizers write to them without a word to torch.

    Args:
        checked: What is known about the weight.
        x: The samples.
        weight: Contiguous values, indices, active and bias, as :mod:`srigl_fx.runtime.format` has them; no int8.
        in_features: The inputs of the layer.
        residual: Of the output's shape, or None.
        activation: The activation's name.
        y_feature_major: Whether the output's transposed is to be contiguous.

    Raises:
        CudaError: There is no driver, or the kernels cannot be built.
    """
    values, indices, active, bias = weight
    batch, n, (n_active, k) = math.prod(x.shape[:-1]), bias.shape[0], values.shape
    keep = checked is not None and not values.is_inference() and not can_train(values)
    x_columns = not x.is_contiguous() and x.dim() > 1 and x.movedim(-1, 0).is_contiguous() and keep
    x = x if x_columns else x.contiguous()
    lead, y_columns = x.shape[:-1], y_feature_major and keep
    y = x.new_empty((n, *lead)).movedim(0, -1) if y_columns else x.new_empty((*lead, n))
    if y.numel():
        if residual is not None:
            residual = residual.movedim(-1, 0).contiguous() if y_columns else residual.contiguous()
        machine = machine_of(x.device)
        layer = Layer(in_features=in_features, n=n, n_active=n_active, k=k, value_bytes=values.itemsize)
        planned = plan(machine.gpu, layer, batch, _INDICES[indices.dtype], keep, x_columns or y_columns)
        low, high = _LIMITS[activation]
        given: dict[str, float] = {
            **{"x": x.data_ptr(), "y": y.data_ptr(), "bias": bias.data_ptr(), "activation": NUMBERS[activation]},
            **{"residual": 0 if residual is None else residual.data_ptr(), "has_residual": residual is not None},
            **{"batch": batch, "in_features": in_features, "n": n, "n_active": n_active, "low": low, "high": high},
        }
        if planned.kernel.family == "rows":
            reads = index_rows_of(active)
            given |= {"values": values.data_ptr(), "indices": indices.data_ptr(), "active": active.data_ptr(), "k": k}
            given |= {"reads": reads, "shared": reads != 0}
        else:
            assert checked is not None
            ready = _packed(checked, planned.kernel.family, weight, in_features)
            given |= {"values": ready.values.data_ptr(), "offsets": ready.offsets.data_ptr(), "k": ready.k}
            given |= {"rows": ready.rows.data_ptr(), "starts": ready.starts.data_ptr(), "window": WINDOW}
            given |= {"shift": planned.shift, "by_four": in_features % 4 == 0 and x.data_ptr() % 16 == 0}
            given |= {"x_columns": x_columns, "y_columns": y_columns}
        form, names = _form(planned.kernel)
        machine.launch(planned, _DTYPES[values.dtype], form.pack(*[given[name] for name in names]))
    return y.movedim(-1, 0).contiguous().movedim(0, -1) if y_feature_major and not y_columns else y


def convolution(
    x: Tensor,
    weight: Sequence[Tensor],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
    transposed: bool,
    output_padding: Sequence[int] | None,
) -> Tensor:
    """The convolution by torch's own, with the dense weight made anew at each call: a sparse kernel is to come.

    The outputs are contiguous, as the operator promises, where torch's own would lie as the samples do.
    """
    values, indices, active, bias = weight
    dense, _ = expand(values.float(), indices, active, bias.shape[0], math.prod(weight_shape[1:]))
    y = dense_conv(x, dense, bias, weight_shape, stride, padding, dilation, groups, transposed, output_padding)
    return FUNCTIONS[activation](y if residual is None else y + residual).contiguous()
