"""The CUDA plan, packing, driver and dispatch, where no GPU is: what they decide, pass on and refuse."""

import contextlib
import ctypes
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from kernel_support import condensed, operands

from srigl_fx.errors import CudaError, FormatError
from srigl_fx.runtime import gradients, reference, validation
from srigl_fx.runtime.cuda import build, driver, execute
from srigl_fx.runtime.cuda.model import GPUS, Layer, predict, resident_blocks
from srigl_fx.runtime.cuda.packed import LANES, pack_rows, pack_windows, place_of
from srigl_fx.runtime.cuda.plan import WINDOW, candidates, plan, shared_bytes
from srigl_fx.runtime.cuda.table import BY_NAME, KERNELS, VALUES

LARGE = Layer(in_features=30_000, n=8, n_active=8, k=4)  # its samples take more shared memory than is usual
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
                least, most = launch.kernel.samples
                assert least <= batch <= (most or batch)
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

    def __init__(self, attributes: dict[int, int] | None = None, **codes: int) -> None:
        self.codes, self.asked, self.packed = codes, list[str](), b""
        self.attributes = attributes or {}

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.asked.append(name)
            if name == "cuLaunchKernel":
                extra = arguments[10]
                size = ctypes.c_size_t.from_address(extra[3]).value
                assert (extra[0], extra[2], extra[4]) == (1, 2, None)
                self.packed = ctypes.string_at(extra[1], size)
                self.grid = arguments[1:8]
            if name == "cuDeviceGetAttribute":
                arguments[0]._obj.value = self.attributes.get(arguments[1], 0)
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


def test_another_device_is_made_current_for_all_that_a_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    library = RecordedDriver()
    made = driver.Driver(library)

    @contextlib.contextmanager
    def device(ordinal: int) -> Iterator[None]:
        library.asked.append(f"enter {ordinal}")
        yield
        library.asked.append("leave")

    monkeypatch.setattr(build, "code_of", lambda symbol, target: b"code")
    monkeypatch.setattr(execute.Machine, "stream", lambda self: 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    machine = execute.Machine(made, 1)
    library.asked.clear()
    (launch,) = candidates(GPUS[0], LARGE, 1, "uint16", True, False)[:1]
    machine.launch(launch, "float32", b"arguments")
    assert (library.asked[0], library.asked[-1]) == ("enter 1", "leave")
    assert {"cuLibraryLoadData", "cuKernelSetAttribute", "cuLaunchKernel"} < set(library.asked[1:-1])


def test_threads_that_launch_first_at_once_load_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    library, together = RecordedDriver(), threading.Barrier(4)

    def code_of(symbol: str, target: str) -> bytes:
        time.sleep(0.05)  # as long as the others need to come
        return b"code"

    monkeypatch.setattr(build, "code_of", code_of)
    monkeypatch.setattr(execute.Machine, "stream", lambda self: 5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine = execute.Machine(driver.Driver(library), 0)
    (launch,) = candidates(GPUS[0], LARGE, 1, "uint16", True, False)[:1]

    def run() -> None:
        together.wait()
        machine.launch(launch, "float32", b"arguments")

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run) for _ in range(4)]:
            done.result()
    counted = [library.asked.count(name) for name in ("cuLibraryLoadData", "cuKernelSetAttribute", "cuLaunchKernel")]
    assert counted == [1, 1, 4]


def test_limits_that_a_driver_does_not_tell_are_no_division_by_zero() -> None:
    known = {16: 4, 81: 100 << 10, 97: 99 << 10, 75: 8, 76: 6}  # multiprocessors, shared memory, the target
    gpu, target = driver.Driver(RecordedDriver(attributes=known)).gpu(0)
    assert (target, gpu.multiprocessors) == ("sm_86", 4)
    for packed in (True, False):
        assert 0 < plan(gpu, LARGE, 3, "uint16", packed, False).prediction.seconds < 1


def test_more_blocks_than_a_launch_may_have_are_an_error() -> None:
    layer = Layer(in_features=8, n=131_072, n_active=131_072, k=4)
    with pytest.raises(CudaError, match=r"140000 samples of a layer of 131072 outputs .* cut the batch"):
        plan(GPUS[0], layer, 140_000, "uint16", False, False)
    assert plan(GPUS[0], layer, 131_000, "uint16", False, False).kernel.name == "rows_uint16"


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


def test_code_of_other_compilers_is_built_anew_and_taken_where_there_is_none(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRIGL_FX_CACHE", str(tmp_path / "cache"))
    folders = []
    for versions in ("0.30.4-1.2.2", "0.30.5-1.2.2"):
        monkeypatch.setattr(build, "compilers", lambda versions=versions: versions)
        folders.append(build.folder())
    assert [folder.name for folder in folders] == [f"cuda-{build.digest()}-0.30.{last}-1.2.2" for last in (4, 5)]
    monkeypatch.setattr(build, "compilers", lambda: "")
    assert build.folder() == folders[1]
    monkeypatch.setenv("SRIGL_FX_CACHE", str(tmp_path / "empty"))
    assert build.folder().name == f"cuda-{build.digest()}"


def test_a_builder_that_fails_is_an_error_with_its_words_or_its_status(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRIGL_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    given: dict[str, Any] = {}

    def ended(error: str) -> Any:
        def run(command: list[str], **settings: Any) -> Any:
            given.update(settings)
            return subprocess.CompletedProcess(command, -9, "", error)

        return run

    for error, message in (("", "ended with status -9"), ("Traceback\nCudaError: no linker\n", "CudaError: no linker")):
        monkeypatch.setattr(subprocess, "run", ended(error))
        with pytest.raises(CudaError, match=f"tile1x4_float32 could not be built: .*{message}"):
            build.code_of("tile1x4_float32", "sm_90")
    assert "NUMBA_ENABLE_CUDASIM" not in given["env"]
    assert given["env"]["SRIGL_FX_CACHE"] == str(tmp_path / "cache")
    assert given["env"]["PYTHONPATH"].split(":")[-1] == sys.path[-1]

    def too_long(command: list[str], **settings: Any) -> Any:
        raise subprocess.TimeoutExpired(command, settings["timeout"])

    monkeypatch.setattr(subprocess, "run", too_long)
    with pytest.raises(CudaError, match=r"could not be built: .* timed out after 1800 seconds"):
        build.code_of("tile1x4_float32", "sm_90")


def test_operators_are_registered_for_gpus() -> None:
    for name in ("condensed_linear", "condensed_conv", "condensed_linear_gradients"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"srigl_fx::{name}", "CUDA")


def test_eight_bits_are_refused() -> None:
    with pytest.raises(FormatError, match="int8 have no CUDA kernel yet"):
        execute.refuse_eight_bits("condensed_linear", torch.ones(3))
    execute.refuse_eight_bits("condensed_linear", None)


def test_what_torch_calls_for_gpus_refuses_operands_elsewhere() -> None:
    """Torch calls it where any operand is on a GPU: without the check the samples' device alone would decide."""
    ran = list[Any]()
    function = validation.on_one_device("condensed_linear", lambda *operands, **given: ran.append(operands))
    here, elsewhere = torch.ones(1, 5), torch.empty(3, device="meta")
    wrong = [partial(function, here, elsewhere), partial(function, elsewhere, here)]
    for call in (*wrong, partial(function, here, scales=elsewhere)):
        with pytest.raises(FormatError, match="condensed_linear: operands are on different devices, cpu and meta"):
            call()
    assert not ran
    function(here, None, 5, "none", scales=here)
    assert len(ran) == 1


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


def test_convolutions_lie_as_the_operator_promises() -> None:
    x = torch.randn(2, 4, 7, 6).contiguous(memory_format=torch.channels_last)
    settings = [6, 2, 3, 3], [1, 1], [1, 1], [1, 1], 2
    parts = operands(condensed(6, 18, 5))
    y = execute.convolution(x, parts, *settings, None, "none", False, None)
    fake = torch.ops.srigl_fx.condensed_conv(x.to("meta"), *(part.to("meta") for part in parts), *settings)
    assert y.stride() == fake.stride()


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
