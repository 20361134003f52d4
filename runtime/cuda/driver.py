"""The CUDA driver, as far as launching kernels takes it.

Owns the calls of ``libcuda`` by ctypes, and the errors that they give. It must not know kernels or tensors. The library
is opened at the first use of a GPU, never at import. Modules are loaded by the driver's library interface (CUDA 12 and
newer), for all contexts of the process; torch owns these.
"""

import ctypes
import functools
from typing import Any, Final

from srigl_fx.errors import CudaError
from srigl_fx.runtime.cuda.model import Gpu

_NAMES: Final = ("libcuda.so.1", "nvcuda.dll")
_INVALID_CONTEXT: Final = 201
_DYNAMIC_SHARED: Final = 8  # the attribute of a kernel that allows it more than 48 KiB
_MULTIPROCESSORS, _CLOCK, _SHARED, _SHARED_OF_BLOCK = 16, 13, 81, 97  # attributes of a device; clocks in kHz
_MEMORY_CLOCK, _BUS_BITS, _MAJOR, _MINOR = 36, 37, 75, 76
# What some drivers report as zero, in virtual machines, say; predictions then rank by what is known.
_USUAL: Final = {_CLOCK: 1_500_000, _MEMORY_CLOCK: 1_500_000, _BUS_BITS: 2048}
_BUFFER, _BUFFER_SIZE, _END = 1, 2, 0  # how packed arguments are handed over


class Driver:
    """The driver of this process.

    Args:
        library: What has the driver's functions, as ctypes calls them.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._kept: list[bytes] = []
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise CudaError(f"{name} failed: {self._message(code)}")

    def _message(self, code: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        return f"error {code} of the CUDA driver ({(text.value or b'unknown').decode()})"

    def _attribute(self, device: int, attribute: int) -> int:
        found = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(found), attribute, device)
        return found.value or _USUAL.get(attribute, 0)

    def gpu(self, ordinal: int) -> tuple[Gpu, str]:
        """The limits of a device, and its target, such as ``sm_90``.

        Raises:
            CudaError: The driver has no such device.
        """
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDeviceGetName", name, len(name), device)
        asked = functools.partial(self._attribute, device.value)
        limits = Gpu(
            name=name.value.decode(),
            multiprocessors=asked(_MULTIPROCESSORS),
            clock=asked(_CLOCK) * 1e3,
            shared_of_block=asked(_SHARED_OF_BLOCK),
            shared=asked(_SHARED),
            memory=asked(_MEMORY_CLOCK) * 1e3 * 2 * asked(_BUS_BITS) / 8,
        )
        return limits, f"sm_{asked(_MAJOR)}{asked(_MINOR)}"

    def load(self, code: bytes, symbol: str) -> int:
        """A kernel of a cubin or PTX.

        Raises:
            CudaError: The driver does not take the code.
        """
        ended = code + b"\0"  # as PTX is text that ends so
        self._kept.append(ended)
        loaded, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        none = (None, None, 0)
        self._call("cuLibraryLoadData", ctypes.byref(loaded), ended, *none, *none)
        self._call("cuLibraryGetKernel", ctypes.byref(kernel), loaded, symbol.encode())
        return int(kernel.value or 0)

    def allow_shared(self, kernel: int, ordinal: int, shared_bytes: int) -> None:
        """Let a kernel of :meth:`load` take this much dynamic shared memory on a device.

        Raises:
            CudaError: The device has not as much.
        """
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuKernelSetAttribute", _DYNAMIC_SHARED, shared_bytes, ctypes.c_void_p(kernel), device)

    def launch(
        self, kernel: int, blocks: int, threads: int, shared_bytes: int, stream: int, ordinal: int, arguments: bytes
    ) -> None:
        """Launch a kernel of :meth:`load` on a stream, with packed arguments; waits for nothing.

        Raises:
            CudaError: The driver refuses it.
        """
        size = ctypes.c_size_t(len(arguments))
        extra = (ctypes.c_void_p * 5)(
            *(
                _BUFFER,
                ctypes.cast(ctypes.c_char_p(arguments), ctypes.c_void_p),
                _BUFFER_SIZE,
                ctypes.addressof(size),
                _END,
            )
        )
        call = (
            *(ctypes.c_void_p(kernel), blocks, 1, 1, threads, 1, 1, shared_bytes),
            *(ctypes.c_void_p(stream), None, extra),
        )
        code = self._library.cuLaunchKernel(*call)
        if code == _INVALID_CONTEXT:  # a thread in which torch has not done anything yet
            context, device = ctypes.c_void_p(), ctypes.c_int()
            self._call("cuDeviceGet", ctypes.byref(device), ordinal)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            self._call("cuCtxSetCurrent", context)
            code = self._library.cuLaunchKernel(*call)
        if code:
            raise CudaError(f"a kernel of {blocks} blocks of {threads} threads was refused: {self._message(code)}")


@functools.cache
def driver() -> Driver:
    """The driver of this machine.

    Raises:
        CudaError: There is none.
    """
    for name in _NAMES:
        try:
            return Driver(ctypes.CDLL(name))
        except OSError:
            continue
    raise CudaError(
        f"no CUDA driver was found ({' or '.join(_NAMES)}): condensed layers run on a GPU only where NVIDIA's driver "
        "is installed; move the module and its inputs to the CPU with .cpu()"
    )
