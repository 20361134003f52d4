"""The CUDA kernels in Numba's simulator against the oracle: indices, bounds, alignment and layouts, on odd shapes.

Calls go through everything but the driver, which is simulated. What is wrong on a GPU alone (races, machine code) is
not seen here.
"""

from typing import Any

import pytest
import torch
from cuda_support import SimulatedGpu, simulate
from kernel_support import ACTIVATIONS, compare_linear, condensed, operands

from srigl_fx.runtime.cuda import execute, plan
from srigl_fx.runtime.cuda.table import KERNELS
from srigl_fx.runtime.format import CondensedWeight
from srigl_fx.runtime.validation import check_weight
from srigl_fx.runtime.value_types import FLOATS

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.slow]  # of infinite numbers
PACKED = [kernel.name for kernel in KERNELS if kernel.family != "rows"]


@pytest.fixture(scope="module", autouse=True)
def _simulator() -> None:
    simulate()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Compute a layer by one kernel, whatever the plan has for it, and compare with the oracle."""

    def computed(
        name: str,
        weight: CondensedWeight,
        x: torch.Tensor,
        *,
        threads: int = 32,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        y_feature_major: bool = False,
    ) -> torch.Tensor:
        gpu, every, parts = SimulatedGpu(threads=threads), plan.candidates, operands(weight)

        def only(*call: Any) -> list[plan.Launch]:
            return [launch for launch in every(*call) if launch.kernel.name == name]

        plan.plan.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(plan, "candidates", only)
            patch.setattr(execute, "machine_of", lambda device: gpu)
            checked = None if name.startswith("rows") else check_weight("test", *parts, weight.in_features)
            y = execute.linear(checked, x, parts, weight.in_features, residual, activation, y_feature_major)
        plan.plan.cache_clear()
        assert gpu.launched == ([name] if y.numel() else [])
        compare_linear(y, weight, x, residual, activation)
        return y

    return computed


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", PACKED)
def test_values(run: Any, name: str, dtype: Any) -> None:
    weight = condensed(9, 71, 11, n_active=7, dtype=dtype)
    run(name, weight, torch.randn(1 if name == "vector1" else 5, 71), residual=None)


@pytest.mark.long
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_in_the_canonical_format(run: Any, dtype: Any) -> None:
    run("rows_uint16", condensed(3, 71, 37, n_active=2, dtype=dtype), torch.randn(2, 71), threads=64)


def test_many_inputs_in_the_canonical_format(run: Any) -> None:
    run("rows_int32", condensed(2, 70_000, 5), torch.randn(1, 70_000))


@pytest.mark.parametrize("groups", [(2,), (1, 3)])
def test_rows_that_share_indices(run: Any, groups: tuple[int, ...]) -> None:
    weight = condensed(5, 40, 9, n_active=4, groups=groups)
    run("rows_uint16", weight, torch.randn(1, 40))
    run("vector1", weight, torch.randn(1, 40))
    run("tile1x4", weight, torch.randn(3, 40))


@pytest.mark.parametrize("name", ["rows_uint16", "vector4", "tile2x8"])
def test_rows_of_unequal_lengths_read_no_padding(run: Any, name: str) -> None:
    """Padding repeats an index, and what lies there may be infinite: it must not be multiplied with zero."""
    weight = condensed(4, 12, 6, pattern="uneven")
    x = torch.randn(2, 12)
    x[1] = float("inf")
    run(name, weight, x)


@pytest.mark.parametrize("name", PACKED)
def test_numbers_that_are_not_finite(run: Any, name: str) -> None:
    x = torch.randn(1 if name == "vector1" else 3, 50)
    x[0, 3], x[0, 20], x[-1, 7] = float("inf"), float("nan"), float("-inf")
    run(name, condensed(6, 50, 7), x)


@pytest.mark.parametrize("name", PACKED)
def test_no_weights_at_all(run: Any, name: str) -> None:
    weight = condensed(5, 20, 4, n_active=0)
    run(
        name,
        weight,
        torch.randn(1 if name == "vector1" else 2, 20),
        residual=torch.randn(1 if name == "vector1" else 2, 5),
    )


@pytest.mark.parametrize("in_features", [1, 4, 5, 33])
def test_few_inputs(run: Any, in_features: int) -> None:
    weight = condensed(3, in_features, max(1, in_features - 1))
    run("vector1", weight, torch.randn(1, in_features))
    run("tile1x4", weight, torch.randn(2, in_features))


@pytest.mark.parametrize("in_features", [191, 192, 193, 385])
def test_windows(run: Any, in_features: int) -> None:
    for pattern in ("ends", "random"):
        run("tile1x4", condensed(5, in_features, 9, pattern=pattern), torch.randn(2, in_features))


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 65])
def test_blocks_of_samples(run: Any, batch: int) -> None:
    run("tile1x4", condensed(3, 20, 4), torch.randn(batch, 20))


def test_blocks_of_interleaved_samples(run: Any) -> None:
    weight = condensed(3, 20, 4)
    for batch in (2, 4, 5, 16):
        run("vector4", weight, torch.randn(batch, 20))


@pytest.mark.long
@pytest.mark.parametrize("name", ["tile1x4", "tile2x8", "tile4x16"])
def test_several_warps_and_blocks(run: Any, name: str) -> None:
    weight = condensed(35, 210, 9, n_active=33)
    run(name, weight, torch.randn(3, 210), threads=64, residual=torch.randn(3, 35), activation="relu")


@pytest.mark.parametrize(("n", "k"), [(1, 1), (9, 3), (18, 33), (3, 130)])
def test_lanes_that_share_a_row(run: Any, n: int, k: int) -> None:
    run("vector1", condensed(n, 140, k), torch.randn(1, 140), threads=64)


@pytest.mark.parametrize("x_columns", [False, True])
@pytest.mark.parametrize("y_columns", [False, True])
def test_feature_major(run: Any, x_columns: bool, y_columns: bool) -> None:
    for name in ("tile1x4", "tile4x16"):
        x = torch.randn(5, 40)
        x = x.t().contiguous().t() if x_columns else x
        settings = {"residual": torch.randn(5, 9), "activation": "tanh"}
        y = run(name, condensed(9, 40, 6, n_active=8), x, y_feature_major=y_columns, **settings)
        assert y.t().is_contiguous() == y_columns


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(run: Any, activation: str) -> None:
    x = torch.randn(1, 30)
    x[0, 0] = float("nan")
    weight = condensed(12, 30, 4)
    run("vector1", weight, 40 * x, residual=torch.randn(1, 12), activation=activation)


def test_many_axes_and_no_samples(run: Any) -> None:
    weight = condensed(4, 10, 3)
    run("vector4", weight, torch.randn(2, 1, 2, 10))
    run("vector4", weight, torch.randn(2, 0, 10))


def test_unaligned_samples(run: Any) -> None:
    """A view whose first sample does not begin at a multiple of 16 bytes."""
    weight = condensed(4, 12, 3)
    run("vector1", weight, torch.randn(13)[1:].reshape(1, 12))


def test_a_packed_weight_is_kept_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, weight = SimulatedGpu(threads=32), condensed(4, 12, 3)
    monkeypatch.setattr(execute, "machine_of", lambda device: gpu)
    parts, x = operands(weight), torch.randn(1, 12)
    checked = check_weight("test", *parts, 12)
    assert checked is not None
    first = execute.linear(checked, x, parts, 12, None, "none", False)
    kept = checked.packed["cuda", "vector"]
    assert torch.equal(execute.linear(checked, x, parts, 12, None, "none", False), first)
    assert checked.packed["cuda", "vector"] is kept
    parts[0].mul_(2)
    doubled = execute.linear(checked, x, parts, 12, None, "none", False)
    assert checked.packed["cuda", "vector"] is not kept
    torch.testing.assert_close(doubled - parts[3], 2 * (first - parts[3]))


def test_values_that_train_are_read_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer may write to them without a word to torch: no copy of them may be computed with."""
    gpu, weight = SimulatedGpu(threads=32), condensed(2, 12, 3)
    monkeypatch.setattr(execute, "machine_of", lambda device: gpu)
    parts, x = operands(weight), torch.randn(1, 12)
    parts[0].requires_grad_()
    checked = check_weight("test", *parts, 12)
    with torch.no_grad():
        compare_linear(execute.linear(checked, x, parts, 12, None, "none", False), weight, x, None, "none")
    assert gpu.launched == ["rows_uint16"]
