"""The kernels as machine code for this process, compiled by Numba when first needed.

Owns just-in-time compilation, one function per operator and index dtype, and how it is called: through ctypes, which
takes plain addresses, costs about a microsecond and releases the GIL. It must not know torch, and validates nothing.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Literal

Entry = Callable[..., None]
Operator = Literal["linear", "linear_tiled", "conv"]
IndexName = Literal["uint16", "int32"]

# Reassociation lets sums vectorise; NaN and infinity keep their meaning.
FASTMATH = {"reassoc", "contract", "nsz"}

_entries: dict[tuple[str, str], Entry] = {}
_keep: list[Any] = []  # the compiled code lives as long as its cfunc object
_lock = threading.Lock()


def entry(operator: Operator, index_name: IndexName) -> Entry:
    """The compiled ``operator`` for indices of dtype ``index_name``; safe to call from any thread.

    Its arguments are addresses and integers: for "linear" ``(x, values, indices, active, bias, y, batch, in_features,
    out_features, n_active, k)``, for "linear_tiled" the same with the address of ``(in_features + 1) * TILE`` floats
    of scratch after ``y``, for "conv" ``(x, values, indices, active, bias, y,
    geometry, offsets, packed, accumulators, batch, n_active)`` with scratch as ``kernels/conv.py`` describes it.

    Example:
        >>> import numpy as np
        >>> x, w, y = np.array([[2, 3]], np.float32), np.array([[5]], np.float32), np.empty((1, 2), np.float32)
        >>> columns, rows, bias = np.array([[1]], np.uint16), np.array([0], np.int32), np.array([0.5, 7], np.float32)
        >>> entry("linear", "uint16")(*(a.ctypes.data for a in (x, w, columns, rows, bias, y)), 1, 2, 2, 1, 1)
        >>> y.tolist()
        [[15.5, 7.0]]
    """
    found = _entries.get((operator, index_name))
    if found is None:
        with _lock:
            found = _entries.get((operator, index_name))
            if found is None:
                found = _compile(operator, index_name)
                _entries[operator, index_name] = found
    return found


def _compile(operator: Operator, index_name: IndexName) -> Entry:
    import numba as typed_numba

    from srigl_fx.runtime.kernels import conv, linear

    numba: Any = typed_numba  # half of its functions are annotated
    types = numba.types

    def jit(function: Callable[..., None]) -> Any:
        return numba.njit(fastmath=FASTMATH, error_model="numpy")(function)

    tile = linear.TILE
    floats = types.CPointer(types.float32)
    rows, integer = types.CPointer(types.int32), types.int64
    columns = types.CPointer(getattr(types, index_name))
    tensors = (floats, floats, columns, rows, floats, floats)
    body: Callable[..., None]

    if operator == "linear":
        fill_bias, linear_rows = jit(linear.fill_bias), jit(linear.linear_rows)
        signature = types.void(*tensors, integer, integer, integer, integer, integer)

        def linear_entry(x, values, indices, active, bias, y, batch, fan_in, n, n_active, k):  # type: ignore[no-untyped-def]
            if n_active < n:
                fill_bias(bias, y, batch, n)
            linear_rows(x, values, indices, active, bias, y, batch, fan_in, n, k, 0, n_active)

        body = linear_entry
    elif operator == "linear_tiled":
        fill_bias, linear_tile = jit(linear.fill_bias), jit(linear.linear_tile)
        signature = types.void(*tensors, floats, integer, integer, integer, integer, integer)

        def tiled_entry(x, values, indices, active, bias, y, scratch, batch, fan_in, n, n_active, k):  # type: ignore[no-untyped-def]
            if n_active < n:
                fill_bias(bias, y, batch, n)
            for first in range(0, batch, tile):
                samples = min(tile, batch - first)
                linear_tile(x, values, indices, active, bias, y, scratch, first, samples, fan_in, n, n_active, k)

        body = tiled_entry
    else:
        fill_planes, tap_offsets = jit(conv.fill_bias_planes), jit(conv.conv_tap_offsets)
        pack, conv_rows = jit(conv.conv_pack), jit(conv.conv_rows)
        numbers = types.CPointer(integer)
        signature = types.void(*tensors, numbers, numbers, floats, floats, integer, integer)
        channels, out_channels, direct = conv.CHANNELS, conv.OUT_CHANNELS, conv.DIRECT
        out_d, out_h, out_w = conv.OUT_D, conv.OUT_H, conv.OUT_W

        def conv_entry(x, values, indices, active, bias, y, geometry, offsets, packed, accumulators, batch, n_active):  # type: ignore[no-untyped-def]
            n = geometry[out_channels]
            if n_active < n:
                fill_planes(bias, y, batch, n, geometry[out_d] * geometry[out_h] * geometry[out_w])
            tap_offsets(offsets, geometry)
            source = x if geometry[direct] else packed
            for sample in range(batch):
                if not geometry[direct]:
                    pack(x, packed, geometry, sample, 0, geometry[channels])
                conv_rows(
                    source, values, indices, active, bias, y, geometry, offsets, accumulators, sample, 0, n_active
                )

        body = conv_entry

    compiled = numba.cfunc(signature, fastmath=FASTMATH, error_model="numpy")(body)
    _keep.append(compiled)
    addresses = [argument for argument in signature.args if isinstance(argument, types.CPointer)]
    integers = len(signature.args) - len(addresses)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(addresses), *[ctypes.c_int64] * integers)
    return prototype(compiled.address)
