"""``condensed_linear`` against the oracle: every dtype, awkward sizes and masks, every layout of the operands.

Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import (
    ACTIVATIONS,
    DTYPES,
    PATTERNS,
    axes,
    check_linear,
    condensed,
    layouts,
    misaligned,
    operands,
    tensor,
)
from torch import Tensor

from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import ValueDtype

dtypes = pytest.mark.parametrize("dtype", DTYPES)
# One sample, a few, half a tile, tiles with and without a rest.
BATCHES = (1, 2, 7, 16, 40, 64, 65)
# fmt: off
SIZES = (
    (1, 1), (2, 1), (3, 2), (15, 4), (16, 16), (17, 5), (33, 1), (63, 18), (64, 64), (65, 31), (127, 3), (128, 16),
    (129, 33), (255, 20), (256, 66), (257, 257), (300, 1), (511, 15), (512, 17), (513, 129), (1025, 100),
)
ROWS = (
    (1, 1), (1, 0), (20, 0), (20, 1), (15, 15), (16, 16), (17, 17), (40, 15), (40, 16), (40, 17), (33, 31), (64, 33),
    (257, 250), (530, 513), (1100, 1090),
)
# fmt: on


@dtypes
def test_every_batch_size(dtype: ValueDtype) -> None:
    weight = condensed(37, 75, 7, n_active=33, dtype=dtype)
    for batch in axes(67, 96, 128, 256, 512):
        check_linear(weight, torch.randn(batch, 75))


@dtypes
@pytest.mark.parametrize(
    ("in_features", "k"),
    SIZES,
)
def test_sizes(in_features: int, k: int, dtype: ValueDtype) -> None:
    weight = condensed(19, in_features, k, n_active=18, dtype=dtype)
    for batch in BATCHES:
        check_linear(weight, torch.randn(batch, in_features))


@dtypes
@pytest.mark.parametrize(
    ("n", "n_active"),
    ROWS,
)
def test_rows(n: int, n_active: int, dtype: ValueDtype) -> None:
    weight = condensed(n, 90, 11, n_active=n_active, dtype=dtype)
    for batch in BATCHES:
        y = check_linear(weight, torch.randn(batch, 90))
        dead = torch.ones(n, dtype=torch.bool).index_fill(0, tensor(weight.rows).long(), False)
        assert torch.equal(y[:, dead], tensor(weight.bias)[dead].expand(batch, -1))


@dtypes
@pytest.mark.parametrize("in_features", [4094, 4095, 4096, 65535, 65536, 65537])
@pytest.mark.parametrize("pattern", ["random", "first", "last", "ends"])
def test_the_widest_inputs(in_features: int, pattern: str, dtype: ValueDtype) -> None:
    assert (in_features > 65536) == (condensed(1, in_features, 1).indices.dtype.name == "int32")
    for k in (1, 50):
        weight = condensed(17, in_features, k, n_active=16, dtype=dtype, pattern=pattern)
        for batch in (1, 3, 17, 33):
            check_linear(weight, torch.randn(batch, in_features))


@dtypes
@pytest.mark.parametrize("pattern", PATTERNS)
def test_adversarial_masks(pattern: str, dtype: ValueDtype) -> None:
    for in_features, k in ((40, 40), (700, 1), (700, 30), (700, 130), (1500, 260)):
        weight = condensed(37, in_features, k, n_active=35, dtype=dtype, pattern=pattern)
        for batch in (1, 5, 20, 64):
            check_linear(weight, torch.randn(batch, in_features))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_layouts(batch: int, y_feature_major: bool) -> None:
    weight = condensed(21, 70, 9, n_active=20)
    for x in layouts(torch.randn(batch, 70)).values():
        before = x.clone()
        check_linear(weight, x, y_feature_major=y_feature_major)
        assert torch.equal(x, before)


@pytest.mark.parametrize("y_feature_major", [False, True])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(70),
        torch.randn(0, 70),
        torch.randn(2, 0, 70),
        torch.randn(2, 3, 70),
        torch.randn(5, 13, 70),
        torch.randn(13, 5, 70).transpose(0, 1),
        torch.randn(70, 5, 13).permute(1, 2, 0),
        torch.randn(5, 70, 13).transpose(1, 2),
        torch.randn(2, 1, 70).expand(2, 20, 70),
        torch.randn(3, 4, 70)[::2, 1:],
        torch.randn(2, 2, 3, 2, 70),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.stride()}",
)
def test_leading_dimensions(x: Tensor, y_feature_major: bool) -> None:
    weight = condensed(21, 70, 9, n_active=20)
    residual = torch.randn(*x.shape[:-1], 21)
    check_linear(weight, x, y_feature_major=y_feature_major)
    check_linear(weight, x, residual=residual, activation="silu", y_feature_major=y_feature_major)


@dtypes
@pytest.mark.parametrize("batch", [1, 5, 33, 64])
def test_weights_with_gaps_and_out_of_line(batch: int, dtype: ValueDtype) -> None:
    weight = condensed(21, 70, 9, n_active=20, dtype=dtype)
    tensors = operands(weight)
    x = torch.randn(batch, 70)
    shifted = [misaligned(part) for part in tensors]
    check_linear(weight, x, tensors=(shifted[0], shifted[1], shifted[2], shifted[3]))
    gaps = [torch.stack((part, part), -1)[..., 1] for part in tensors]
    assert not any(part.is_contiguous() for part in gaps)
    check_linear(weight, x, tensors=(gaps[0], gaps[1], gaps[2], gaps[3]))


@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation: str, dtype: ValueDtype) -> None:
    weight = condensed(37, 60, 10, n_active=31, dtype=dtype)
    for batch in (1, 3, 16, 17, 40, 64):
        x, residual = torch.randn(batch, 60), 3 * torch.randn(batch, 37)
        check_linear(weight, x, activation=activation)
        for added in (residual, residual.t().contiguous().t(), misaligned(residual), residual[:1].expand(batch, 37)):
            for y_feature_major in (False, True):
                check_linear(weight, x, residual=added, activation=activation, y_feature_major=y_feature_major)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n_active", [0, 1, 5])
def test_ablated_rows_pass_through_the_epilogue(activation: str, n_active: int) -> None:
    weight = condensed(20, 30, 4, n_active=n_active)
    for batch in (1, 4, 40):
        check_linear(weight, torch.randn(batch, 30), residual=torch.randn(batch, 20), activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("active", [range(48), range(40), range(3, 48), [*range(20), *range(30, 47)]])
def test_whole_tiles(active: Sequence[int], activation: str) -> None:
    """Outputs that are computed in their place, in several passes over the inputs, beside rows that are not."""
    weight, x = condensed(48, 500, 100, active=active), torch.randn(100, 500)
    x[3, 7], x[50, 499] = torch.nan, torch.inf
    for residual in (None, torch.randn(100, 48)):
        check_linear(weight, x, residual=residual, activation=activation, y_feature_major=True)
        check_linear(weight, x, residual=residual, activation=activation, x_feature_major=True)


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_weights_that_change_in_place_are_seen(batch: int) -> None:
    weight = condensed(21, 70, 9, n_active=20)
    tensors = operands(weight)  # which share the arrays' memory
    x = torch.randn(batch, 70)
    first = check_linear(weight, x, tensors=tensors)
    tensors[0].mul_(-2)
    second = check_linear(weight, x, tensors=tensors)
    assert not torch.allclose(first, second)
    tensors[1].copy_(operands(condensed(21, 70, 9, n_active=20, seed=1))[1])
    third = check_linear(weight, x, tensors=tensors)
    assert not torch.allclose(second, third)
    tensors[2].copy_(torch.arange(20, dtype=torch.int32))
    tensors[3].add_(1)
    check_linear(weight, x, tensors=tensors)


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_weights_that_follow_each_other_in_the_same_memory(batch: int) -> None:
    for seed in range(30):  # each freed before the next: whatever is kept for one must not serve another
        check_linear(condensed(21, 70, 9, n_active=20, seed=seed), torch.randn(batch, 70))


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_values_that_follow_each_other_in_the_same_memory(batch: int) -> None:
    """As where values are made anew for each call: the allocator gives them the memory of those before."""
    weight = condensed(37, 300, 40, n_active=35)
    _, indices, active, bias = operands(weight)
    memory, x = weight.values.copy(), torch.randn(batch, 300)
    for factor in (1, 2, -3):
        memory[:] = factor * weight.values
        values = torch.from_numpy(memory)
        y = torch.ops.srigl_fx.condensed_linear(x, values, indices, active, bias, 300)
        expected = torch.nn.functional.linear(x, factor * tensor(weight.to_dense()[0]), bias)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
        del values


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_inference_tensors(batch: int) -> None:
    with torch.inference_mode():
        for dtype in DTYPES:
            weight = condensed(37, 300, 40, n_active=35, dtype=dtype)
            tensors = operands(weight)
            made_here = (tensors[0].clone(), tensors[1].clone(), tensors[2].clone(), tensors[3].clone())
            assert all(part.is_inference() for part in made_here)
            for x in layouts(torch.randn(batch, 300)).values():
                for y_feature_major in (False, True):
                    check_linear(weight, x, tensors=made_here, y_feature_major=y_feature_major)


@pytest.mark.parametrize("batch", [1, 4, 40])
@pytest.mark.parametrize("y_feature_major", [False, True])
def test_the_hint_for_export_changes_nothing(batch: int, y_feature_major: bool) -> None:
    weight = condensed(37, 300, 40, n_active=35)
    for x in layouts(torch.randn(batch, 300)).values():
        check_linear(weight, x, x_feature_major=True, y_feature_major=y_feature_major)


@pytest.fixture(params=[2, 3, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with torch_threads(request.param):
        yield request.param


@pytest.mark.parametrize(
    "active",
    [range(300), range(130, 300), range(170), range(0, 300, 2), range(150, 170), [299], [0], []],
    ids=["all", "last", "first", "every other", "few", "very last", "very first", "none"],
)
def test_threads_share_the_work(active: Sequence[int], threads: int) -> None:
    """Whichever rows are ablated at the borders of the threads' shares."""
    weight = condensed(300, 500, 60, active=active)
    for batch in (1, 9, 16, 64, 70, 150):
        x = torch.randn(batch, 500)
        check_linear(weight, x)
        check_linear(weight, x, residual=torch.randn(batch, 300), activation="relu", y_feature_major=True)
    x[batch // 2, 3] = torch.nan
    check_linear(weight, x)
    check_linear(weight, x[batch // 2 :][:1])


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, int | str]:
    in_features = draw(st.integers(1, 300))
    n = draw(st.integers(1, 70))
    return {
        "n": n,
        "in_features": in_features,
        "k": draw(st.integers(1, in_features)),
        "n_active": draw(st.integers(0, n)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "pattern": draw(st.sampled_from(sorted(PATTERNS))),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.slow
@given(
    case=_cases(),
    batch=st.integers(0, 140),
    layout=st.sampled_from(["", *layouts(torch.ones(2, 2))]),
    activation=st.sampled_from(ACTIVATIONS),
    with_residual=st.booleans(),
    y_feature_major=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_anything(
    case: dict[str, int | str], batch: int, layout: str, activation: str, with_residual: bool, y_feature_major: bool
) -> None:
    weight = condensed(**case)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(int(case["seed"]))
    x = torch.randn(max(batch, 1), weight.in_features, generator=generator)
    x = (layouts(x)[layout] if layout else x)[:batch]
    residual = torch.randn(batch, weight.out_features, generator=generator) if with_residual else None
    check_linear(weight, x, residual=residual, activation=activation, y_feature_major=y_feature_major)


@pytest.mark.slow
@dtypes
@pytest.mark.parametrize("density", [0.01, 0.05, 0.2])
@pytest.mark.parametrize(("n", "in_features"), [(768, 3072), (3072, 768), (1000, 1001)])
def test_layers_of_real_models(n: int, in_features: int, density: float, dtype: ValueDtype) -> None:
    weight = condensed(n, in_features, max(1, round(density * in_features)), n_active=n - n // 10, dtype=dtype)
    for batch in (1, 2, 8, 33):
        check_linear(weight, torch.randn(batch, in_features), residual=torch.randn(batch, n), activation="gelu")
