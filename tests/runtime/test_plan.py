"""One plan of what runs where: torch, ONNX Runtime and the cost model ask it, and its table lists every kernel."""

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import DTYPES, Convolution, assert_close, check_conv, check_linear, condensed, operands
from kernel_support.onnx_models import LinearOperator
from kernel_support.tables import with_tables
from torch import fx

from srigl_fx.passes import feature_major
from srigl_fx.runtime import value_types
from srigl_fx.runtime.costs.cost_model import Machine, Work, kernel_for
from srigl_fx.runtime.cpu import execute, execute_conv, training_products
from srigl_fx.runtime.cpu.entries import entry
from srigl_fx.runtime.cpu.kernels import job, plan
from srigl_fx.runtime.cpu.kernels.isa import (
    AVX2,
    AVX512,
    AVX512_VBMI,
    BASELINE,
    EVERY_ISA,
    NEON,
    TARGETS,
    host_isa,
    level_of,
    looks_up_bytes,
)
from srigl_fx.runtime.cpu.kernels.table import KERNELS, Kernel
from srigl_fx.runtime.cpu.training_products import Pattern, pack
from srigl_fx.runtime.format import CondensedWeight, ValueDtype
from srigl_fx.runtime.ort import library

LEVEL, BYTE_LOOKUP = level_of(host_isa()), looks_up_bytes()
sizes = {
    "in_features": st.one_of(st.integers(1, 300), st.integers(1, 1 << 17)),
    "n_active": st.integers(0, 5000),
    "k": st.one_of(st.integers(0, 40), st.integers(0, 1 << 17)),
}


@settings(deadline=None)  # the first call compiles
@given(**sizes, batch=st.integers(0, 200), x_columns=st.booleans(), y_columns=st.booleans(), packed=st.booleans())
def test_the_library_asks_the_same_plan(
    in_features: int, n_active: int, k: int, batch: int, x_columns: bool, y_columns: bool, packed: bool
) -> None:
    """What is compiled for the operators of ONNX Runtime, called with a job as they call it."""
    j = (ctypes.c_int64 * job.SIZE)()
    j[job.IN_FEATURES], j[job.N_ACTIVE], j[job.K], j[job.BATCH] = in_features, n_active, k, batch
    j[job.X_FEATURE_MAJOR], j[job.Y_FEATURE_MAJOR] = x_columns, y_columns
    entry("plan_linear")[0](ctypes.addressof(j), packed)
    expected = plan.linear_kernel(LEVEL, in_features, n_active, k, batch, x_columns or y_columns, packed)
    assert j[job.KERNEL] == expected
    if n_active > 1:  # the last row says how many there are
        index_rows = (ctypes.c_int32 * n_active)()
        j[job.INDEX_ROWS] = ctypes.addressof(index_rows)
        entry("plan_linear")[0](ctypes.addressof(j), packed)
        assert j[job.KERNEL] == plan.linear_for_shared(expected, LEVEL, in_features, n_active, k, 1)
    for kernel in (plan.DOT, plan.TILE, plan.SHARED_TILE):
        entry("plan_panel")[0](ctypes.addressof(j), kernel)
        window = plan.window_of(kernel, LEVEL, in_features, n_active, k)
        assert (j[job.KERNEL], j[job.PANEL_WINDOW]) == (kernel, window)
    j[job.VALUE_TYPE] = value_types.NUMBERS["int8"]
    entry("plan_linear")[0](ctypes.addressof(j), packed)
    expected = plan.int8_linear_kernel(BYTE_LOOKUP, in_features, n_active, k, batch, x_columns or y_columns)
    assert j[job.KERNEL] == expected
    assert j[job.SAMPLES] == plan.int8_linear_samples(BYTE_LOOKUP, expected, batch, x_columns or y_columns)
    for kernel in (plan.INT8_DOT, plan.INT8_TILE):
        entry("plan_panel")[0](ctypes.addressof(j), kernel)
        window = plan.int8_window(BYTE_LOOKUP, kernel, in_features, k)
        assert (j[job.KERNEL], j[job.PANEL_WINDOW]) == (kernel, window)


@given(**sizes, batch=st.integers(1, 40), target=st.integers(0, len(TARGETS) - 1))
def test_the_cost_model_asks_it_too(in_features: int, n_active: int, k: int, batch: int, target: int) -> None:
    kept, level = n_active * k, level_of(TARGETS[target])
    work = Work(rows=n_active + 1, fan_in=in_features, active=n_active, kept=kept, columns=batch)
    machine = Machine(level=level, target=target)
    tile = plan.linear_kernel(level, in_features, n_active, k, batch, False, True) == plan.TILE
    assert kernel_for(work, machine) == ("tile" if tile else "dot")
    lookup = TARGETS[target] == AVX512_VBMI
    tile = plan.int8_linear_kernel(lookup, in_features, n_active, k, batch, False) == plan.INT8_TILE
    assert kernel_for(replace(work, eight_bits=True), machine) == ("tile" if tile else "dot")


def _as_a_node(weight: CondensedWeight) -> fx.Node:
    """A call of the operator in a graph, as the layout pass sees it."""
    graph = fx.Graph()
    shown: dict[str, fx.Node] = {}
    for name, part in zip(("values", "indices", "active", "bias"), operands(weight), strict=True):
        shown[name] = graph.placeholder(name)
        shown[name].meta["val"] = part.to("meta")
    more: dict[str, Any] = {} if weight.scales is None else {"scales": graph.placeholder("scales")}
    linear = torch.ops.srigl_fx.condensed_linear.default
    return graph.call_function(linear, (graph.placeholder("x"), *shown.values(), weight.in_features), more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [1, 20, 300, 65535, 65536, 70_000])
@pytest.mark.parametrize("n_active", [0, 3])
def test_the_layout_pass_asks_it_too(n_active: int, in_features: int, dtype: ValueDtype) -> None:
    """Feature-major tensors are for layers whose kernel reads them as they lie, in torch and in ONNX Runtime.

    One of eight bits reads them too, but measures rows faster.
    """
    node = _as_a_node(condensed(4, in_features, 1, n_active=n_active, dtype=dtype))
    for samples in (16, 300):
        (expected,) = {
            plan.linear_kernel(level_of(isa), in_features, n_active, 1, samples, True, True) for isa in EVERY_ISA
        }
        assert feature_major._has_kernel(node, samples) == (expected == plan.TILE and dtype != "int8")


def test_a_tile_of_bytes_is_as_wide_as_its_samples_need() -> None:
    """By sixteens on some targets, and full from 17 samples on elsewhere; rounded samples have room for either."""
    for samples in range(1, 65):
        narrow, other = plan.int8_tile_columns(True, samples), plan.int8_tile_columns(False, samples)
        assert samples <= narrow < samples + 16
        assert narrow % 16 == 0
        assert other == (16 if samples <= 16 else 64)
    for batch in range(1, 200):
        whole, rest = batch // 64 * 64, batch % 64
        last = plan.int8_tile_columns(True, rest) if rest else 0
        assert plan.int8_rounded_bytes(plan.INT8_TILE, 7, 7, batch) >= 7 * (whole + last)


@pytest.mark.parametrize("lookup", [False, True])
def test_few_samples_behind_the_last_whole_tile_are_a_call_of_their_own(lookup: bool) -> None:
    """All samples are computed, each once, and no kernel but the tile leaves any to another."""
    most = plan.MOST_INT8_DOT_SAMPLES if lookup else 2
    for batch, columns in itertools.product(range(1, 300), (False, True)):
        kernel = plan.int8_linear_kernel(lookup, 768, 768, 77, batch, columns)
        first = plan.int8_linear_samples(lookup, kernel, batch, columns)
        rest = batch % plan.INT8_COLUMNS
        if columns or batch < plan.INT8_COLUMNS or not 0 < rest <= most:
            assert first == batch
        else:
            assert (kernel, first) == (plan.INT8_TILE, batch - rest)
            assert plan.int8_linear_kernel(lookup, 768, 768, 77, rest, columns) == plan.INT8_DOT
            assert plan.int8_linear_samples(lookup, plan.INT8_DOT, rest, columns) == rest


@pytest.mark.parametrize("isa", EVERY_ISA)
def test_every_kernel_has_its_calls(isa: str) -> None:
    """A kernel of the table is the plan's for some call on each of its instruction sets, and on no other."""
    level = level_of(isa)
    found = {
        plan.linear_for_shared(
            plan.linear_kernel(level, in_features, 64, k, batch, feature_major, packed),
            *(level, in_features, 64, k, index_rows),
        )
        for index_rows in (16, 64)
        for in_features, k in ((16, 4), (63, 7), (64, 7), (128, 100), (70_000, 1000))
        for batch in (1, 2, 5, 6, 40)
        for feature_major in (False, True)
        for packed in (False, True)
    }
    assert found == {
        kernel.number
        for kernel in KERNELS
        if kernel.layer == "linear" and isa in kernel.isas and kernel.values == value_types.FLOATS
    }
    for kernel in KERNELS:
        if kernel.reads in ("dot panel", "tile panel", "shared tile panel"):
            assert bool(plan.window_of(kernel.number, level, 128, 64, 100)) == (isa in kernel.isas)


@pytest.mark.parametrize("lookup", [False, True])
def test_every_kernel_of_bytes_has_its_calls(lookup: bool) -> None:
    """On every target, and none of them runs weight by weight but where there are no weights."""
    calls = [(f, b, columns) for f in (1, 70_000) for b in (1, 16, 17, 48, 49) for columns in (False, True)]
    found = {plan.int8_linear_kernel(lookup, f, 64, 1, batch, columns) for f, batch, columns in calls}
    assert found == {kernel.number for kernel in KERNELS if kernel.layer == "linear" and kernel.values == ("int8",)}
    assert {plan.int8_linear_kernel(lookup, f, 64, 0, batch, columns) for f, batch, columns in calls} == {
        plan.ROWS,
        plan.STRIDED,
    }
    assert [plan.int8_conv_kernel(*sizes) for sizes in ((1, 1), (0, 1), (1, 0))] == [
        plan.INT8_TILE,
        plan.ROWS,
        plan.ROWS,
    ]
    for kernel in (row for row in KERNELS if row.values == ("int8",)):
        assert plan.int8_window(lookup, kernel.number, 128, 100) > 0
        assert kernel.isas == EVERY_ISA


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that torch's operators run, in order."""
    tasks: list[str] = []

    def noted(name: str) -> Any:
        tasks.append(name)
        return entry(name)

    monkeypatch.setattr(execute, "entry", noted)
    monkeypatch.setattr(execute_conv, "entry", noted)
    monkeypatch.setattr(training_products, "entry", noted)
    return tasks


def _linear(
    in_features: int, batch: int, dtype: ValueDtype, *, packed: bool = True, groups: tuple[int, ...] = (1,)
) -> None:
    weight = condensed(40, in_features, 19, n_active=37, dtype=dtype, groups=groups)
    with torch.inference_mode(not packed):  # torch does not count the writes to what is made here
        tensors = tuple(part.clone() for part in operands(weight))
    x, residual = torch.randn(batch, in_features), torch.randn(batch, 40)
    check_linear(weight, x, tensors=tensors, residual=residual, activation="relu")  # type: ignore[arg-type]


def _conv(n: int, dtype: ValueDtype, groups: tuple[int, ...] = (1,)) -> None:
    shape = Convolution(n=n, padding=(1, 1))
    check_conv(shape, shape.condensed(5, dtype=dtype, groups=groups), shape.input(2))


def _innermost(dtype: ValueDtype) -> None:
    shape = Convolution(n=37, padding=(1, 1))
    check_conv(shape, shape.condensed(5, dtype=dtype), shape.input(16), is_arranged=True)


def _training(kernel: str) -> None:
    mask = torch.rand(37, 200) < 0.1
    w, x, g = torch.randn(37, 200) * mask, torch.randn(70, 200), torch.randn(70, 37)
    pattern = Pattern.of_mask(mask)
    if kernel == "product_task":
        found, terms, other = pattern.multiply(w[mask], pack(x)), x.abs() @ w.abs().t(), x.double() @ w.double().t()
    else:
        found, terms = pattern.value_gradient(pack(x), pack(g)), (g.abs().t() @ x.abs())[mask]
        other = (g.double().t() @ x.double())[mask]
    assert_close(found, other.numpy(), terms.numpy(), 200, kernel)


# For each kernel that torch takes, a call that the plan gives to it on every instruction set that has it.
CALLS: dict[str, Callable[[ValueDtype], None]] = {
    "rows_task": lambda dtype: _linear(200, 7, dtype, packed=False),
    "dot_task": lambda dtype: _linear(200, 1, dtype),
    "tile_task": lambda dtype: _linear(200, 37, dtype),
    "shared_tile_task": lambda dtype: _linear(200, 37, dtype, groups=(4,)),
    "int8_dot_task": lambda dtype: _linear(200, 2, dtype),
    "int8_tile_task": lambda dtype: _linear(200, 64, dtype),
    "int8_conv_task": lambda dtype: _conv(5, dtype),
    "conv_rows_task": lambda dtype: _conv(5, dtype),
    "conv_tile_task": lambda dtype: _conv(37, dtype),
    "conv_shared_tile_task": lambda dtype: _conv(37, dtype, groups=(4,)),
    "conv_innermost_task": _innermost,
    "product_task": lambda dtype: _training("product_task"),
    "value_gradient_task": lambda dtype: _training("value_gradient_task"),
}


@pytest.mark.parametrize(
    ("kernel", "dtype"), [pytest.param(row, dtype, id=f"{row.task}-{dtype}") for row in KERNELS for dtype in row.values]
)
def test_each_kernel_runs_for_each_value_dtype(
    kernel: Kernel, dtype: ValueDtype, ran: list[str], request: pytest.FixtureRequest
) -> None:
    """A new row of the table fails here until somebody says how it is reached."""
    if host_isa() not in kernel.isas:
        assert not plan.window_of(kernel.number, LEVEL, 200, 37, 19)
    elif kernel.task == "strided_task":  # torch turns the tensors around instead
        request.getfixturevalue("library")
        weight = condensed(40, 70_000, 19, n_active=37, dtype=dtype)  # too wide for a tile
        for x_columns, y_columns in ((True, False), (False, True), (True, True)):
            operator = LinearOperator(weight, library=True, x_feature_major=x_columns, y_feature_major=y_columns)
            operator.check(torch.randn(7, 70_000))
    else:
        CALLS[kernel.task](dtype)
        assert kernel.task in ran
        also = {"conv_pack_task", "pack_task", "int8_pack_task", "int8_scales_task"}
        assert {task for task in ran if task.endswith("_task")} <= {kernel.task} | also


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [20, 63, 64, 200])
def test_torch_and_onnxruntime_give_the_same_bits(in_features: int, dtype: ValueDtype) -> None:
    """The kernels sum in orders of their own, so that another kernel shows in the last bits.

    Two to five samples of fewer than 64 inputs ran row by row in one of them and in tiles in the other.
    """
    weight = condensed(70, in_features, 17, n_active=66, dtype=dtype)
    operator = LinearOperator(weight, library=True)
    for batch in (1, 2, 3, 5, 6, 16, 17, 40, 66, 131):
        x = torch.randn(batch, in_features)
        assert torch.equal(check_linear(weight, x), operator.check(x)), batch


def test_few_samples_of_a_narrow_layer(ran: list[str]) -> None:
    weight = condensed(300, 63, 20)
    check_linear(weight, torch.randn(1, 63))
    assert ran[-1] == ("dot_task" if level_of(host_isa()) == 1 else "rows_task")
    check_linear(weight, torch.randn(2, 63))
    assert ran[-1] == ("dot_task" if level_of(host_isa()) == 1 else "tile_task")
    check_linear(weight, torch.randn(3, 63))
    assert ran[-1] == "tile_task"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [1, 255, 256, 257, 65535, 65536, 65537, 70000])
def test_the_widest_windows_of_a_dot_panel(in_features: int, dtype: ValueDtype) -> None:
    """AVX2 names inputs by two bytes; what lies beyond is in a window of its own."""
    weight = condensed(33, in_features, min(in_features, 9), dtype=dtype)
    for batch in (1, 2, 5):
        check_linear(weight, torch.randn(batch, in_features))


@pytest.mark.parametrize(("isa", "most"), [(BASELINE, 0), (AVX2, 2), (AVX512, 5), (NEON, 2)])
@pytest.mark.parametrize(("in_features", "n_active", "k"), [(64, 16, 1), (300, 100, 30), (4096, 4096, 819)])
def test_up_to_how_many_samples_inputs_are_looked_up(
    isa: str, most: int, in_features: int, n_active: int, k: int
) -> None:
    """More are tiles: AVX2 loads each input, three samples as long as a tile takes; the baseline has no such kernel."""
    kernels = [
        plan.linear_kernel(level_of(isa), in_features, n_active, k, batch, False, True) for batch in range(1, 18)
    ]
    assert kernels == [plan.DOT if batch <= most else plan.ROWS if batch == 1 else plan.TILE for batch in range(1, 18)]
    kernels = [plan.linear_kernel(level_of(isa), in_features, n_active, k, batch, True, True) for batch in range(1, 18)]
    assert set(kernels) == {plan.TILE}  # which reads and writes such tensors as they lie


def test_the_documentation_has_the_tables(checkout: Path) -> None:
    page = (checkout / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert with_tables(page) == page, "make tables writes them"


def test_every_kernel_is_measured(checkout: Path) -> None:
    """``benchmarks/kernels.py`` stops at a kernel that it has no call for; its page is made anew with each row."""
    page = (checkout / "benchmarks" / "results" / "kernels.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in page.splitlines() if line.startswith("| `")]
    assert [(row[1], row[4]) for row in rows] == [(kernel.task, dtype) for kernel in KERNELS for dtype in kernel.values]


@pytest.mark.slow
def test_the_library_is_named_after_all_that_it_is_made_from() -> None:
    """A source that its name forgot would leave an old library in use."""
    code = "import sys, srigl_fx.runtime.ort.compile\n"
    code += "print(*(module.__file__ for name, module in sys.modules.items() if name.startswith('srigl_fx.runtime.')))"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    used = {Path(file).resolve() for file in made}
    sources = {path.resolve() for path in library.sources()}
    assert {path.name for path in used - sources} == {"__init__.py"}
    assert len(sources) > 30
