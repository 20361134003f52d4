"""The operators in ONNX Runtime against the oracle, by the library and by the fallback: sizes, dtypes, epilogues.

Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_support import ACTIVATIONS, DTYPES, PATTERNS, SHAPES, Convolution, bits, condensed
from kernel_support.onnx_models import ConvOperator, LinearOperator

from srigl_fx.runtime.format import ValueDtype
from srigl_fx.runtime.value_types import FLOATS

dtypes = pytest.mark.parametrize("dtype", DTYPES)
float_dtypes = pytest.mark.parametrize("dtype", FLOATS)
kinds = pytest.mark.parametrize("dtype", ["float32", "int8"])  # one of each kind of kernels
EPILOGUES = list(itertools.product((False, True), ACTIVATIONS))
LAYOUTS = list(itertools.product((False, True), repeat=2))
BATCHES = (0, 1, 2, 5, 6, 16, 17, 40, 64, 65, 130)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
needs_library = pytest.mark.usefixtures("library")


@pytest.fixture(params=[True, False], ids=["library", "fallback"])
def by_library(request: pytest.FixtureRequest) -> bool:
    if request.param:
        request.getfixturevalue("library")  # built, or the test is skipped
    return bool(request.param)


@dtypes
def test_linear_batches(by_library: bool, dtype: ValueDtype) -> None:
    weight = condensed(37, 75, 7, n_active=33, dtype=dtype)
    operator = LinearOperator(weight, library=by_library)
    for batch in (*range(68), 127, 128, 129, 255, 256, 257):
        operator.check(torch.randn(batch, 75))


@dtypes
@pytest.mark.parametrize(
    ("n", "n_active", "in_features", "k"),
    [
        *((1, 1, 1, 1), (1, 0, 5, 2), (20, 1, 3, 2), (15, 15, 16, 16), (16, 16, 17, 5), (17, 17, 33, 1)),
        *((40, 15, 63, 18), (40, 16, 64, 64), (40, 17, 65, 31), (33, 31, 127, 3), (64, 33, 128, 16)),
        *((20, 0, 129, 33), (19, 18, 255, 20), (19, 18, 256, 66), (19, 18, 257, 257), (530, 513, 700, 70)),
    ],
)
def test_linear_sizes(n: int, n_active: int, in_features: int, k: int, by_library: bool, dtype: ValueDtype) -> None:
    weight = condensed(n, in_features, k, n_active=n_active, dtype=dtype)
    operator = LinearOperator(weight, library=by_library)
    for batch in BATCHES:
        operator.check(torch.randn(batch, in_features))


@dtypes
@pytest.mark.parametrize("in_features", [65535, 65536, 65537])
def test_linear_widest_inputs(in_features: int, by_library: bool, dtype: ValueDtype) -> None:
    for pattern in ("random", "ends"):
        weight = condensed(17, in_features, 50, n_active=16, dtype=dtype, pattern=pattern)
        operator = LinearOperator(weight, library=by_library)
        for batch in (1, 3, 33):
            operator.check(torch.randn(batch, in_features))


@dtypes
@pytest.mark.parametrize("pattern", PATTERNS)
def test_linear_adversarial_masks(pattern: str, by_library: bool, dtype: ValueDtype) -> None:
    for in_features, k in ((40, 40), (700, 1), (700, 130), (1500, 260)):
        weight = condensed(37, in_features, k, n_active=35, dtype=dtype, pattern=pattern)
        operator = LinearOperator(weight, library=by_library)
        for batch in (1, 5, 20, 64):
            operator.check(torch.randn(batch, in_features))


@dtypes
@pytest.mark.parametrize(("residual", "activation"), EPILOGUES)
def test_linear_epilogues(residual: bool, activation: str, by_library: bool, dtype: ValueDtype) -> None:
    weight = condensed(37, 60, 10, n_active=31, dtype=dtype)
    operator = LinearOperator(weight, library=by_library, residual=residual, activation=activation)
    for batch in (0, 1, 3, 17, 40, 64):
        operator.check(torch.randn(batch, 60))


@pytest.mark.long
@pytest.mark.parametrize(("x_feature_major", "y_feature_major"), LAYOUTS)
@pytest.mark.parametrize("residual", [False, True])
@kinds
def test_linear_layouts(
    dtype: ValueDtype, residual: bool, x_feature_major: bool, y_feature_major: bool, by_library: bool
) -> None:
    for in_features, n_active in ((70, 33), (65537, 33), (70, 0), (9, 40)):
        weight = condensed(40, in_features, min(9, in_features), n_active=n_active, dtype=dtype)
        for rank, leading in ((1, [()]), (2, [(batch,) for batch in BATCHES]), (3, [(2, 3), (5, 13), (0, 4), (1, 1)])):
            operator = LinearOperator(
                weight,
                library=by_library,
                rank=rank,
                residual=residual,
                activation="silu",
                x_feature_major=x_feature_major,
                y_feature_major=y_feature_major,
            )
            for sizes in leading if in_features < 100 else leading[:5]:
                operator.check(torch.randn(*sizes, in_features))


@dtypes
@every_shape
def test_conv_shapes(shape: Convolution, by_library: bool, dtype: ValueDtype) -> None:
    for k, n_active in ((1, 1), (3, shape.n - 1), (shape.in_features, shape.n), (1, 0)):
        weight = shape.condensed(min(k, shape.in_features), n_active=n_active, dtype=dtype)
        operator = ConvOperator(shape, weight, library=by_library)
        for batch in (0, 1, 2, 3):
            operator.check(shape.input(batch))


@pytest.mark.long
@every_shape
@pytest.mark.parametrize("dtypes_in_turn", [FLOATS, ("int8",)], ids=["floats", "int8"])
def test_conv_epilogues(dtypes_in_turn: Sequence[ValueDtype], shape: Convolution, by_library: bool) -> None:
    for dtype, (residual, activation) in zip(itertools.cycle(dtypes_in_turn), EPILOGUES, strict=False):
        weight = shape.condensed(3, n_active=shape.n - 1, dtype=dtype)
        ConvOperator(shape, weight, library=by_library, residual=residual, activation=activation).check(shape.input(2))


@dtypes
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("transposed", [False, True])
def test_conv_many_filters(pattern: str, transposed: bool, by_library: bool, dtype: ValueDtype) -> None:
    shape = Convolution(n=40, channels=40, groups=2, padding=(1, 1), size=(6, 7), transposed=transposed)
    for k in (1, 9, 20):
        weight = shape.condensed(k, n_active=37, dtype=dtype, pattern=pattern)
        ConvOperator(shape, weight, library=by_library, residual=True, activation="relu").check(shape.input(3))


@pytest.mark.parametrize("width", [15, 16, 17, 63, 64, 65, 255, 256, 257])
@pytest.mark.parametrize("kernel", [1, 3])
@kinds
def test_conv_widths(dtype: ValueDtype, kernel: int, width: int, by_library: bool) -> None:
    shape = Convolution(n=17, channels=3, kernel=(1, kernel), padding=(0, kernel // 2), size=(2, width))
    ConvOperator(shape, shape.condensed(2, n_active=16, dtype=dtype), library=by_library).check(shape.input(2))


@kinds
def test_weights_that_are_not_constant(dtype: ValueDtype, by_library: bool) -> None:
    weight = condensed(40, 300, 30, n_active=38, dtype=dtype)
    operator = LinearOperator(weight, library=by_library, constant=False, residual=True, activation="gelu")
    for batch in BATCHES:
        operator.check(torch.randn(batch, 300))
        weight.values[:] *= -1  # seen at the next run
    for shape in (SHAPES["2d strided"], SHAPES["2d transposed, strided"]):
        conv = ConvOperator(shape, shape.condensed(3, dtype=dtype), library=by_library, constant=False)
        for batch in (1, 2):
            conv.check(shape.input(batch))


@needs_library
@float_dtypes
@pytest.mark.parametrize("batch", [1, 5, 16, 24, 70])
def test_specials_in_every_input(batch: int, dtype: ValueDtype) -> None:
    """NaN and infinity reach the rows that keep a weight for them, and no others; the fallback is dense."""
    weight = condensed(37, 150, 3, n_active=35, dtype=dtype)
    operator = LinearOperator(weight, library=True)
    dead = np.setdiff1d(np.arange(150), weight.indices)
    assert dead.size
    for special in (math.nan, math.inf, -math.inf):
        for column in range(150):
            x = torch.randn(batch, 150)
            x[:, dead] = special
            x[column % batch, column] = special
            y = operator.check(x)
            others = torch.arange(batch) != column % batch
            assert y[others].isfinite().all()


@pytest.mark.parametrize("batch", [1, 5, 16, 24, 70])
@pytest.mark.parametrize("feature_major", [False, True])
def test_a_special_makes_all_of_its_sample_unknown_in_eight_bits(
    feature_major: bool, batch: int, by_library: bool
) -> None:
    """Whether a weight is kept for it or not; rows without weights have their bias, and other samples their numbers."""
    weight = condensed(37, 150, 3, n_active=35, dtype="int8")
    operator = LinearOperator(weight, library=by_library, x_feature_major=feature_major, y_feature_major=feature_major)
    ablated = np.setdiff1d(np.arange(37), weight.rows)
    for column, special in itertools.product(range(0, 150, 7), (math.nan, math.inf, -math.inf)):
        x = torch.randn(batch, 150)
        x[column % batch, column] = special
        y = operator.check(x)
        assert y[column % batch, weight.active].isnan().all()
        assert bits(y[:, ablated]) == np.tile(weight.bias[ablated], (batch, 1)).tobytes()
        assert y[torch.arange(batch) != column % batch].isfinite().all()


@needs_library
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("x_feature_major", "y_feature_major"), LAYOUTS)
def test_specials_through_the_epilogue(
    x_feature_major: bool, y_feature_major: bool, activation: str, dtype: ValueDtype
) -> None:
    weight = condensed(37, 40, 4, n_active=30, dtype=dtype)
    operator = LinearOperator(
        weight,
        library=True,
        residual=True,
        activation=activation,
        x_feature_major=x_feature_major,
        y_feature_major=y_feature_major,
    )
    for batch, special in itertools.product((1, 5, 40), (math.nan, math.inf, -math.inf)):
        x = torch.randn(batch, 40)
        x[batch // 2, 7] = special
        operator.check(x)


@needs_library
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["1d", "2d strided, dilated", "2d groups", "2d pointwise", "3d", "1d transposed", "2d transposed, strided"]
)
@kinds
def test_specials_in_a_convolution(dtype: ValueDtype, name: str, special: float) -> None:
    shape = SHAPES[name]
    weight = shape.condensed(3, n_active=shape.n - 1, dtype=dtype)
    operator = ConvOperator(shape, weight, library=True, activation="hardswish")
    x = shape.input(2)
    for position in range(0, x.numel(), 7):
        changed = x.clone()
        changed.view(-1)[position] = special
        operator.check(changed)


@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["1d", "2d groups", "3d", "2d transposed, strided"])
def test_a_special_in_a_convolution_of_eight_bits_by_the_fallback(name: str, special: float) -> None:
    shape = SHAPES[name]
    operator = ConvOperator(shape, shape.condensed(3, n_active=shape.n - 1, dtype="int8"), library=False)
    x = shape.input(3)
    x[1].view(-1)[5] = special
    assert operator.check(x).isnan().any(dim=1).flatten(1).any(dim=1).tolist() == [False, True, False]


@dtypes
def test_huge_and_denormal_numbers(by_library: bool, dtype: ValueDtype) -> None:
    weight = condensed(37, 90, 7, n_active=33, dtype=dtype)
    operator = LinearOperator(weight, library=by_library)
    for batch, scale in itertools.product((1, 5, 40), (1e30, 1e-30, 1e-38, 1e-41)):
        operator.check(torch.randn(batch, 90) * scale)


@pytest.mark.long
@needs_library
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "active",
    [range(300), range(130, 300), range(170), range(0, 300, 2), [299], [0], []],
    ids=["all", "last", "first", "every other", "very last", "very first", "none"],
)
@kinds
def test_threads_share_the_work_and_agree(dtype: ValueDtype, active: Sequence[int], threads: int) -> None:
    weight = condensed(300, 500, 60, active=active, dtype=dtype)
    shape = Convolution(n=80, channels=40, size=(10, 13), padding=(1, 1))
    some = [row for row in active if row < 80]
    operators = [LinearOperator(weight, library=True, threads=threads) for _ in range(2)]
    conv = ConvOperator(shape, shape.condensed(9, active=some, dtype=dtype), library=True, threads=threads)
    for batch in (1, 9, 64, 150):
        x = torch.randn(batch, 500)
        first, *again = (bits(operator.check(x)) for operator in (*operators, *operators))
        assert all(other == first for other in again)
    for batch in (1, 5):
        x = shape.input(batch)
        assert bits(conv.check(x)) == bits(conv.check(x))


def test_extremes_of_eight_bits(by_library: bool) -> None:
    """Sums as large as they get, constant samples, rows of zeros, and scales too small for float32's full precision."""
    rng = np.random.default_rng(0)
    weight = condensed(37, 90, 65, n_active=35, dtype="int8")
    largest = dataclasses.replace(weight, values=np.where(rng.random(weight.values.shape) < 0.9, 127, -127))
    largest = dataclasses.replace(largest, values=largest.values.astype(np.int8))
    zeros = np.array(weight.values)
    zeros[::3] = 0
    scales = np.array(weight.scales)
    scales[::4] = 0
    scales[1::4] = 1e-41
    for changed in (largest, dataclasses.replace(weight, values=zeros, scales=scales)):
        operator = LinearOperator(changed, library=by_library)
        for batch in (1, 5, 17, 64):
            x = torch.randn(batch, 90)
            x[0] = 0
            operator.check(x)
            for constant in (1.0, -1.0, 1e-20, -3e38):
                operator.check(torch.full((batch, 90), constant))


@pytest.mark.long
@given(
    n=st.integers(1, 50),
    in_features=st.integers(1, 200),
    density=st.floats(0, 1),
    ablated=st.integers(0, 50),
    dtype=st.sampled_from(DTYPES),
    pattern=st.sampled_from(sorted(PATTERNS)),
    leading=st.lists(st.integers(0, 9), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    epilogue=st.sampled_from(EPILOGUES),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_linear(
    by_library: bool,
    n: int,
    in_features: int,
    density: float,
    ablated: int,
    dtype: ValueDtype,
    pattern: str,
    leading: list[int],
    layout: tuple[bool, bool],
    epilogue: tuple[bool, str],
) -> None:
    torch.manual_seed(0)
    k = max(1, round(density * in_features))
    weight = condensed(n, in_features, k, n_active=max(0, n - ablated), dtype=dtype, pattern=pattern)
    operator = LinearOperator(
        weight,
        library=by_library,
        rank=len(leading) + 1,
        residual=epilogue[0],
        activation=epilogue[1],
        x_feature_major=layout[0],
        y_feature_major=layout[1],
    )
    operator.check(torch.randn(*leading, in_features))
