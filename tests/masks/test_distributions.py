import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from srigl_fx.errors import SparsifyError
from srigl_fx.masks.budgets import budget
from srigl_fx.masks.distributions import erk, uniform, uniform_rigl

SMALL = {"a": (8, 4), "b": (16, 16)}


def resnet50() -> dict[str, tuple[int, ...]]:
    """torchvision's ResNet-50: convolutions in registration order, then the classifier."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, inputs, 1, 1))
            inputs = 4 * width
    shapes.append((1000, 2048))
    return {str(i): shape for i, shape in enumerate(shapes)}


def resnet18_cifar() -> dict[str, tuple[int, ...]]:
    """ResNet-18 with a 3x3 stem and ten classes."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, inputs, 3, 3), (width, width, 3, 3)]
            if block == 0 and inputs != width:
                shapes.append((width, inputs, 1, 1))
            inputs = width
    shapes.append((10, 512))
    return {str(i): shape for i, shape in enumerate(shapes)}


def _scale(shapes: dict[str, tuple[int, ...]], densities: dict[str, float]) -> float:
    """The factor between density and raw score, read off a sparse layer."""
    name = next(name for name in shapes if densities[name] < 1)
    return densities[name] * math.prod(shapes[name]) / sum(shapes[name])


def _dense(densities: dict[str, float]) -> list[int]:
    return [int(name) for name, density in densities.items() if density == 1]


def test_erk_vectors() -> None:
    assert erk(SMALL, 0.75) == pytest.approx({"a": 0.613636, "b": 0.204545}, abs=1e-6)
    assert erk(SMALL, 0.5) == {"a": 1.0, "b": 0.4375}


@pytest.mark.parametrize(
    ("sparsity", "scale", "dense"),
    [(0.9, 48.787, [1]), (0.8, 99.562, [1, 3, 4, 5, 7, 8, 10, 11]), (0.95, 24.372, []), (0.99, 4.8748, [])],
)
def test_erk_on_resnet50(sparsity: float, scale: float, dense: list[int]) -> None:
    shapes = resnet50()
    assert len(shapes) == 54
    assert sum(map(math.prod, shapes.values())) == 25_502_912
    densities = erk(shapes, sparsity)
    assert _dense(densities) == dense
    assert _scale(shapes, densities) == pytest.approx(scale, rel=2e-5)


def test_erk_on_resnet50_layers() -> None:
    shapes = resnet50()
    densities = erk(shapes, 0.9)
    assert densities["0"] == pytest.approx(0.420, abs=5e-4)
    assert densities["53"] == pytest.approx(0.0726, abs=5e-5)

    def fan_in(name: str, density: float) -> int:
        return budget(math.prod(shapes[name]), density) // shapes[name][0]

    assert min(fan_in(name, density) for name, density in densities.items()) == 61
    extreme = erk(shapes, 0.99)
    assert (fan_in("0", extreme["0"]), fan_in("53", extreme["53"])) == (6, 14)


@pytest.mark.parametrize(("sparsity", "dense"), [(0.99, [20]), (0.9, [0, 7, 12, 20])])
def test_erk_on_cifar_resnet18(sparsity: float, dense: list[int]) -> None:
    shapes = resnet18_cifar()
    assert len(shapes) == 21
    assert sum(map(math.prod, shapes.values())) == 11_164_352
    assert _dense(erk(shapes, sparsity)) == dense


def test_uniform_vector() -> None:
    assert uniform(SMALL, 0.7, dense=["a"])["b"] == pytest.approx(1 - 0.7875)


def test_uniform_falls_back_where_dense_layers_exceed_the_total(caplog: pytest.LogCaptureFixture) -> None:
    assert uniform(SMALL, 0.9, dense=["a"]) == {"a": 1.0, "b": pytest.approx(0.1)}
    assert "allows 28 of 288" in caplog.text


def test_uniform_rigl_leaves_the_first_dense_and_does_not_compensate() -> None:
    assert uniform_rigl({**SMALL, "c": (4, 4)}, 0.9, dense=["c"]) == {"a": 1.0, "b": pytest.approx(0.1), "c": 1.0}


def test_everything_dense() -> None:
    assert erk(SMALL, 0.0) == uniform(SMALL, 0.0) == {"a": 1.0, "b": 1.0}
    assert erk({}, 0.5) == uniform({}, 0.5) == uniform_rigl({}, 0.5) == {}


shapes_strategy = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(
        st.tuples(st.integers(1, 64), st.integers(1, 64)),
        st.tuples(st.integers(1, 32), st.integers(1, 32), st.integers(1, 5), st.integers(1, 5)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.slow
@given(shapes_strategy, st.floats(0.0, 0.99))
def test_the_budgets_add_up(shapes: dict[str, tuple[int, ...]], sparsity: float) -> None:
    total = sum(map(math.prod, shapes.values()))
    for distribution in (erk, uniform):
        densities = distribution(shapes, sparsity)
        assert list(densities) == list(shapes)
        assert all(0 < density <= 1 for density in densities.values())
        kept = sum(budget(math.prod(shape), densities[name]) for name, shape in shapes.items())
        assert abs(kept - (1 - sparsity) * total) <= len(shapes) + 1e-3


@pytest.mark.parametrize("distribution", [erk, uniform, uniform_rigl])
def test_bad_arguments(distribution: object) -> None:
    assert callable(distribution)
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(SparsifyError, match=r"\[0, 1\)"):
            distribution(SMALL, sparsity)
    with pytest.raises(SparsifyError, match="nope"):
        distribution(SMALL, 0.5, dense=["nope"])
    with pytest.raises(SparsifyError, match="empty"):
        distribution({"empty": (0, 3)}, 0.5)


@pytest.mark.slow
@given(shapes_strategy, st.floats(0.0, 0.99), st.data())
def test_forced_dense_layers_are_made_up_for(
    shapes: dict[str, tuple[int, ...]], sparsity: float, data: st.DataObject
) -> None:
    dense = data.draw(st.sets(st.sampled_from(list(shapes))))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    allowed, fixed = (1 - sparsity) * sum(sizes.values()), sum(sizes[name] for name in dense)
    assume(len(dense) == len(shapes) or fixed < allowed - len(shapes) - 1)
    densities = erk(shapes, sparsity, dense=dense)
    assert all(densities[name] == 1 for name in dense)
    assert all(0 < density <= 1 for density in densities.values())
    if len(dense) < len(shapes):
        kept = sum(budget(size, densities[name]) for name, size in sizes.items())
        assert abs(kept - allowed) <= len(shapes) + 1e-3


@pytest.mark.slow
@given(shapes_strategy, st.floats(0.0, 0.99))
def test_erk_equals_its_literal_reading(shapes: dict[str, tuple[int, ...]], sparsity: float) -> None:
    """One layer becomes dense at a time here; all tied ones at once give the same."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}
    zeros = {name: math.floor(size * sparsity + 1e-6) for name, size in sizes.items()}
    full: set[str] = set()
    while len(full) < len(shapes):
        rest = [name for name in shapes if name not in full]
        kept = sum(sizes[name] - zeros[name] for name in rest) - sum(zeros[name] for name in full)
        scale = kept / sum(raw[name] * sizes[name] for name in rest)
        largest = max(rest, key=raw.__getitem__)
        if scale * raw[largest] <= 1:
            break
        full.add(largest)
    expected = {name: 1.0 if name in full else scale * raw[name] for name in shapes}
    assert erk(shapes, sparsity) == pytest.approx(expected, rel=1e-9)


def test_what_exceeds_the_total_once_more_layers_are_dense_is_spread_again() -> None:
    """ "a" is above 1 at first; with it dense, "b" is too; "c" takes what is left."""
    shapes = {"a": (2, 2), "b": (6, 6), "c": (100, 100)}
    densities = erk(shapes, 0.8)
    assert (densities["a"], densities["b"]) == (1.0, 1.0)
    assert densities["c"] == pytest.approx((10_000 - (3 + 28 + 8_000)) / 10_000)


def test_erk_refuses_dense_layers_above_the_total() -> None:
    with pytest.raises(SparsifyError, match=r"\(b\) hold 256 weights.*lower the sparsity"):
        erk(SMALL, 0.9, dense=["b"])
