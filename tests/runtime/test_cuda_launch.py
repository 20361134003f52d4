"""The CUDA plan, packing, driver and dispatch, where no GPU is: what they decide, pass on and refuse."""

import ctypes
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import condensed, operands

from srigl_fx.errors import CudaError, FormatError
from srigl_fx.runtime import gradients, reference
from srigl_fx.runtime.cuda import build, driver, execute
from srigl_fx.runtime.cuda.model import GPUS, Layer, predict, resident_blocks
from srigl_fx.runtime.cuda.packed import LANES, pack_rows, pack_windows, place_of
from srigl_fx.runtime.cuda.plan import WINDOW, candidates, plan, shared_bytes
from srigl_fx.runtime.cuda.table import BY_NAME, KERNELS, VALUES

SIZES = [(1, 1, 1), (5, 7, 3), (9, 192, 20), (9, 193, 64), (4, 400, 1)]


@pytest.mark.parametrize(("n", "in_features", "k"), SIZES)
@pytest.mark.parametrize("pattern", ["random", "uneven"])
def test_packed_weights_hold_each_weight_once(n: int, in_features: int, k: int, pattern: str) -> None:
    weight = condensed(n, in_features, k, n_active=max(1, n - 1), pattern=pattern)
    dense, mask = weight.to_dense()
    arrays = weight.values, weight.row_indices, weight.rows, in_features, n

    packed, found = pack_rows(*arrays), np.zeros((n, in_features + 1), np.float32)
    entries = packed.offsets.reshape(weight.n_active, packed.k)
    np.add.at(found, (packed.rows[: weight.n_active, None], entries), packed.values.reshape(entries.shape))
    assert np.array_equal(found[:, :-1], dense)
    assert not found[:, -1].any()
    assert packed.k % 4 == 0
    assert sorted(packed.rows) == list(range(n))

    packed = pack_windows(*arrays, WINDOW)
    windows, found = -(-in_features // WINDOW), np.zeros_like(dense)
    starts, seen = packed.starts, 0
    assert len(starts) == windows * weight.n_active + 1
    for segment in range(windows * weight.n_active):
        window, row = divmod(segment, weight.n_active)
        places = packed.offsets[4 * starts[segment] : 4 * starts[segment + 1]].astype(np.int64)
        inputs = places // LANES
        assert np.array_equal(place_of(inputs, WINDOW + 1), places)
        values = packed.values[4 * starts[segment] : 4 * starts[segment + 1]]
        kept = inputs < WINDOW
        assert not values[~kept].any()
        found[packed.rows[row], window * WINDOW + inputs[kept]] = values[kept]
        seen += int(kept.sum())
    assert np.array_equal(found, dense)
    assert seen == mask.sum()
    assert len(packed.values) == 4 * (starts[-1] + 1), "one four more is loaded than computed"


@pytest.mark.parametrize("gpu", GPUS, ids=[gpu.name for gpu in GPUS])
def test_every_plan_fits_the_gpu(gpu: Any) -> None:
    chosen = set()
    for n, in_features in ((1, 1), (768, 3072), (4096, 4096), (50_000, 768), (16, 60_000), (100, 70_000)):
        layer = Layer(in_features=in_features, n=n, n_active=n, k=max(1, in_features // 10))
        for batch in (1, 2, 16, 17, 64, 256, 2048, 100_000):
            for packed, columns in ((True, False), (True, True), (False, False)):
                launch = plan(gpu, layer, batch, "uint16" if in_features < 65536 else "int32", packed, columns)
                chosen.add(launch.kernel.name)
                assert 1 <= launch.blocks < 1 << 31
                assert launch.shared_bytes <= gpu.shared_of_block
                assert launch.kernel.samples[0] <= batch or columns or launch.kernel.family == "tile"
                assert 0 < launch.prediction.seconds < 1e4
                assert packed == (launch.kernel.family != "rows")
                assert not (columns and launch.kernel.family == "vector")
    assert chosen == {kernel.name for kernel in KERNELS}, "a kernel is never chosen"


def test_the_design_is_resident_as_often_as_it_says() -> None:
    """The registers and the shared memory of each kernel let as many blocks onto an H200 as its row promises."""
    for kernel in KERNELS:
        needed = shared_bytes(kernel, 4096)
        assert resident_blocks(GPUS[0], kernel.threads, kernel.registers, needed) >= kernel.blocks, kernel.name


def test_more_work_takes_longer() -> None:
    layer = Layer(in_features=4096, n=4096, n_active=4096, k=410)
    for launch in candidates(GPUS[0], layer, 2048, "uint16", True, False):
        denser = Layer(in_features=4096, n=4096, n_active=4096, k=820)
        more = predict(GPUS[0], launch.kernel, denser, 2048, launch.blocks, launch.shared_bytes, WINDOW)
        assert more.seconds > launch.prediction.seconds


class RecordedDriver:
    """The functions of the driver's library, which note what they are asked, and fail where they are told to."""

    def __init__(self, **codes: int) -> None:
        self.codes, self.asked, self.packed = codes, list[str](), b""

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.asked.append(name)
            if name == "cuLaunchKernel":
                extra = arguments[10]
                size = ctypes.c_size_t.from_address(extra[3]).value
                assert (extra[0], extra[2], extra[4]) == (1, 2, None)
                self.packed = ctypes.string_at(extra[1], size)
                self.grid = arguments[1:8]
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"out of luck"
            code = self.codes.get(name, 0)
            self.codes[name] = 0  # the next call is fine
            return code

        return function


@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name for kernel in KERNELS])
def test_arguments_are_packed_as_the_kernel_reads_them(kernel: Any) -> None:
    """In the order of the signature, each at a multiple of its size, as the parameters of a kernel lie."""
    form, names = execute._form(kernel)
    assert list(names) == [*(one.partition(":")[0] for one in kernel.pointers), *kernel.numbers, "low", "high"]
    sizes = [8 if kind.endswith("*") else 4 for kind in kernel.signature("float32")]
    offsets = np.cumsum([0, *sizes])
    assert all(offset % size == 0 for offset, size in zip(offsets, sizes, strict=False))
    assert form.size == offsets[-1]
    library = RecordedDriver()
    made = driver.Driver(library)
    packed = form.pack(*range(len(names)))
    made.launch(7, 3, 256, 99, 0, 0, packed)
    assert library.packed == packed
    assert library.grid == (3, 1, 1, 256, 1, 1, 99)


def test_errors_of_the_driver_are_told() -> None:
    with pytest.raises(CudaError, match=r"cuInit failed: error 100 of the CUDA driver \(out of luck\)"):
        driver.Driver(RecordedDriver(cuInit=100))
    made = driver.Driver(RecordedDriver(cuLaunchKernel=1, cuLibraryLoadData=200))
    with pytest.raises(CudaError, match="3 blocks of 64 threads was refused: error 1 "):
        made.launch(7, 3, 64, 0, 0, 0, struct.pack("Q", 1))
    with pytest.raises(CudaError, match="cuLibraryLoadData failed: error 200"):
        made.load(b"code", "name")


def test_a_kernel_is_loaded_once_and_allowed_the_memory_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedDriver()
    monkeypatch.setattr(build, "code_of", lambda symbol, target: f"{symbol} {target}".encode())
    monkeypatch.setattr(execute.Machine, "stream", lambda self: 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine = execute.Machine(driver.Driver(library), 0)
    small, large = (Layer(in_features=size, n=8, n_active=8, k=4) for size in (1000, 30_000))
    library.asked.clear()
    for layer in (small, large, small, large):
        (launch,) = candidates(GPUS[0], layer, 1, "uint16", True, False)[:1]
        assert launch.kernel.name == "vector1"
        machine.launch(launch, "float32", b"arguments")
    first, allow = ["cuLibraryLoadData", "cuLibraryGetKernel"], ["cuDeviceGet", "cuKernelSetAttribute"]
    run = ["cuLaunchKernel"]
    assert library.asked == [*first, *run, *allow, *run, *run, *run]


def test_a_thread_without_a_context_gets_one() -> None:
    library = RecordedDriver(cuLaunchKernel=201)
    driver.Driver(library).launch(7, 3, 64, 0, 0, 0, b"")
    again = ["cuLaunchKernel", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuLaunchKernel"]
    assert library.asked == ["cuInit", *again]


def test_no_driver_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_NAMES", ("libcuda_that_is_nowhere.so",))
    driver.driver.cache_clear()
    with pytest.raises(CudaError, match=r"no CUDA driver was found .* with \.cpu\(\)"):
        driver.driver()


def test_no_compiler_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba.cuda.types", None)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CudaError, match=r'vector1_float32: the CUDA kernels are not built yet.*"srigl-fx\[cuda\]"'):
        build.compile_ptx("vector1_float32")
    with pytest.raises(CudaError, match="what builds them is missing"):
        build.make_cubin("", "sm_90")


def test_code_that_is_there_is_taken_without_a_compiler(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRIGL_FX_CACHE", str(tmp_path / "cache"))
    for name, target in (("sm_90", "sm_90"), ("ptx", "sm_120")):
        (build.folder() / f"tile1x4_float32.{name}").write_bytes(name.encode())
        assert build.code_of("tile1x4_float32", target) == name.encode()


def test_operators_are_registered_for_gpus() -> None:
    for name in ("condensed_linear", "condensed_conv", "condensed_linear_gradients"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"srigl_fx::{name}", "CUDA")


def test_operands_elsewhere_and_eight_bits_are_refused() -> None:
    weight = operands(condensed(3, 5, 2))
    x = torch.empty(1, 5, device="meta")
    with pytest.raises(FormatError, match="condensed_linear: x is on meta, but other operands are on cpu"):
        execute.check("condensed_linear", x, weight, None, None)
    with pytest.raises(FormatError, match="int8 have no CUDA kernel yet"):
        execute.check("condensed_linear", x, weight, None, torch.ones(3))
    execute.check("condensed_linear", torch.ones(1, 5), weight, torch.ones(1, 3), None)


@pytest.mark.parametrize("pattern", ["random", "uneven"])
def test_dense_gradients_are_those_of_the_cpu(pattern: str) -> None:
    weight = condensed(6, 9, 4, n_active=5, pattern=pattern)
    values, indices, active, _ = operands(weight)
    x, gradient = torch.randn(7, 9), torch.randn(7, 6)
    expected = torch.ops.srigl_fx.condensed_linear_gradients(gradient, x, values, indices, active, True, True)
    found = gradients._dense_linear_gradients(gradient, x, values, indices, active, True, True, x.shape)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_by_torch_are_the_oracles(transposed: bool) -> None:
    weight, shape = condensed(6, 18, 5, n_active=5), [6, 2, 3, 3]
    x, residual = torch.randn(2, 4, 7, 6), None
    settings = shape, [1, 1], [1, 1], [1, 1], 2
    y = execute.convolution(x, operands(weight), *settings, residual, "relu", transposed, None)
    expected = reference.condensed_conv(
        x.numpy(),
        *(weight.values, weight.indices, weight.active, weight.bias),
        weight_shape=shape,
        pads=[1] * 4,
        group=2,
        transposed=transposed,
        activation="relu",
    )
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_importing_touches_neither_compiler_nor_driver() -> None:
    code = (
        "import sys, srigl_fx, srigl_fx.runtime.ops, srigl_fx.runtime.cuda.build, torch\n"
        "names = [name for name in sys.modules if name.split('.')[0] in ('cuda', 'numba_cuda', 'numba_cuda_mlir')]\n"
        "names += [name for name in sys.modules if name.startswith(('numba.cuda', 'srigl_fx.runtime.cuda.kernels.'))]\n"
        "print(names, torch.cuda.is_initialized(), 'libcuda.so' in open('/proc/self/maps').read())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False False"


def test_each_kernel_exists_for_all_floats() -> None:
    symbols = [kernel.symbol(dtype) for kernel in KERNELS for dtype in VALUES]
    assert len(set(symbols)) == len(symbols) == 3 * len(KERNELS)
    assert set(BY_NAME) == {kernel.name for kernel in KERNELS}
