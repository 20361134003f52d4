"""Estimated times: hand-computed, and going where they should when the work grows."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srigl_fx.runtime.costs import calibration
from srigl_fx.runtime.costs.calibration import fit, host_machine, machine_constants, predicted
from srigl_fx.runtime.costs.cost_model import Machine, Work, condensed, dense, estimate, kernel_for
from srigl_fx.runtime.costs.timings import Timings
from srigl_fx.runtime.cpu.kernels import plan
from srigl_fx.runtime.cpu.kernels.isa import AVX2, AVX512_VBMI, NARROW_TILES, TARGETS

# Round numbers, such that every term can be told from the sum.
SIMPLE = Machine(
    dense_rate=1e6,
    bandwidth=1e6,
    cached_bandwidth=4e6,
    cache_bytes=1000,
    dot_rate=1e3,
    tile_rate=1e3,
    move_rate=1e3,
    dense_call=100.0,
    condensed_call=200.0,
)
SMALL = Work(rows=10, fan_in=20, active=10, kept=50, columns=1)
LARGE = replace(SMALL, rows=1000, fan_in=1000, kept=10**5, active=1000)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (SMALL, 100 + 800 / 4e6),  # read from the cache
        (LARGE, 100 + 4.0),  # read from memory
        (replace(LARGE, columns=8), 100 + 8.0 + 8.0),  # copied first, then multiplied
    ],
)
def test_dense_by_hand(work: Work, seconds: float) -> None:
    assert dense(work, SIMPLE) == pytest.approx(seconds, rel=1e-12)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (SMALL, 200 + 1.3 * 50 / 1e3),  # 30 % gaps
        (replace(LARGE, columns=5), 200 + 5 * 130.0),
        (replace(SMALL, columns=5), 200 + 16 * 50 / 1e3 + 150 / 1e3),  # too narrow for a dot panel: tiles of 16 columns
        (replace(LARGE, kept=1000), 200 + 10**6 / 32 / 1e3),  # mostly gaps
        (replace(SMALL, columns=5, convolution=True), 200 + 16 * 50 / 1e3 + 150 / 1e3),  # tiles of 16 columns
        (replace(SMALL, columns=17), 200 + 32 * 50 / 1e3 + 510 / 1e3),
        (LARGE, 200 + 130.0),
    ],
)
def test_condensed_by_hand(work: Work, seconds: float) -> None:
    assert condensed(work, SIMPLE) == pytest.approx(seconds, rel=1e-12)


def test_values_of_two_bytes_help_where_memory_is_the_limit() -> None:
    slow_memory = replace(SIMPLE, bandwidth=1e3)
    assert condensed(LARGE, slow_memory) == pytest.approx(200 + 1.3 * 500)
    assert condensed(replace(LARGE, value_bytes=2), slow_memory) == pytest.approx(200 + 1.3 * 300)


def test_shrunk_only_where_rows_are_ablated() -> None:
    assert set(estimate(SMALL, SIMPLE)) == {"dense", "condensed"}
    assert set(estimate(replace(SMALL, active=0), SIMPLE)) == {"dense", "condensed"}
    ablated = estimate(replace(LARGE, active=100, columns=1000), Machine())
    assert ablated["shrunk"] < 0.2 * ablated["dense"]


def test_kernels_by_columns() -> None:
    def kernels(work: Work, machine: Machine) -> list[str]:
        return [kernel_for(replace(work, columns=columns), machine) for columns in (1, 2, 5, 6, 4096)]

    assert kernels(LARGE, Machine()) == ["dot"] * 3 + ["tile"] * 2
    assert kernels(replace(LARGE, fan_in=63), Machine()) == ["dot"] + ["tile"] * 4  # too narrow for a dot panel
    assert kernels(replace(LARGE, fan_in=63), Machine(level=1)) == ["dot"] * 2 + ["tile"] * 3
    assert kernels(LARGE, Machine(level=1)) == ["dot"] * 2 + ["tile"] * 3  # AVX2 loads inputs one by one
    assert kernels(LARGE, Machine(level=0)) == ["dot"] + ["tile"] * 4
    assert kernels(replace(LARGE, fan_in=1 << 17), Machine(level=0)) == ["dot"] * 5  # row by row: tiles are not so wide
    assert kernels(replace(LARGE, convolution=True), Machine()) == ["tile"] * 5


def test_few_samples_cost_a_narrow_tile_with_avx2() -> None:
    """Three as many as 16, but for what is moved; there the time does not grow with each sample."""
    few = [condensed(replace(LARGE, columns=columns), replace(SIMPLE, level=1)) for columns in (3, 5, 16, 17)]
    tile = 16 * 10**5 / 1e3
    assert few == pytest.approx([200 + tile + 2 * 3, 200 + tile + 2 * 5, 200 + tile + 2 * 16, 200 + 2 * tile + 2 * 17])


@given(
    rows=st.integers(1, 4096),
    fan_in=st.integers(1, 4096),
    columns=st.integers(1, 4096),
    density=st.floats(0.001, 1),
    convolution=st.booleans(),
)
def test_more_work_never_takes_less(rows: int, fan_in: int, columns: int, density: float, convolution: bool) -> None:
    kept = rows * max(1, int(density * fan_in))
    work = Work(
        rows=rows,
        fan_in=fan_in,
        active=rows,
        kept=kept,
        columns=columns,
        convolution=convolution,
    )
    now = estimate(work, Machine())
    assert all(seconds > 0 for seconds in now.values())
    denser = estimate(replace(work, kept=kept + rows), Machine())
    assert denser["dense"] == now["dense"]
    assert denser["condensed"] >= now["condensed"]
    assert dense(replace(work, columns=2 * columns), Machine()) >= now["dense"]
    faster = estimate(work, Machine().with_threads(2))
    assert all(faster[form] <= seconds for form, seconds in now.items())


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_constants_are_found_again(factor: float) -> None:
    start = Machine()
    names = ("dense_rate", "bandwidth", "cached_bandwidth", "dot_rate", "tile_rate", "move_rate")
    machine = replace(start, **{name: factor * getattr(start, name) for name in names})
    seconds = predicted(machine)
    found = predicted(fit(seconds, start))
    assert all(found[name] == pytest.approx(seconds[name], rel=0.1) for name in seconds)


def test_noise_gives_no_absurd_constants() -> None:
    seconds = dict.fromkeys(predicted(Machine()), 1e-5)  # a call as dear as a layer
    found = fit(seconds, Machine())
    assert all(value > 0 for value in vars(found).values())
    assert all(value < 1e-3 for value in predicted(found).values())


def test_probes_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = Timings(None)
    assert machine_constants(timings, may_measure=False) == host_machine()
    measured = {name: 1.5 * seconds for name, seconds in predicted(Machine()).items()}
    monkeypatch.setattr(calibration, "probe", lambda: measured)
    found = machine_constants(timings)
    monkeypatch.setattr(calibration, "probe", lambda: pytest.fail("measured again"))
    assert machine_constants(timings) == machine_constants(timings, may_measure=False) == found
    assert found != Machine()


@pytest.mark.parametrize("target", TARGETS)
def test_eight_bits_have_rates_of_their_own_for_each_target(target: str) -> None:
    machine = replace(Machine(), target=TARGETS.index(target))
    for columns in (1, 4, 64, 1024):
        work = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=columns)
        bytewise = replace(work, value_bytes=1, eight_bits=True)
        seconds, usual = condensed(bytewise, machine), condensed(work, machine)
        assert 0.1 * usual < seconds < 10 * usual
        assert estimate(bytewise, machine) == {"dense": dense(work, machine), "condensed": seconds}
        if columns == 1024:
            assert seconds < usual
    for convolution in (False, True):  # 50 take a full tile, used or not
        few, many = (replace(bytewise, columns=columns, convolution=convolution) for columns in (50, 64))
        assert kernel_for(few, machine) == kernel_for(many, machine) == "tile"
        moved = 14 * (work.fan_in + work.rows) / machine.move_rate
        assert condensed(many, machine) - condensed(few, machine) == pytest.approx(moved)


@pytest.mark.parametrize("target", [target for target in TARGETS if target != AVX512_VBMI])
def test_a_tile_of_few_samples_is_narrow(target: str) -> None:
    """Of a linear layer; a convolution has 64 columns whatever is used of them."""
    machine = replace(Machine(), target=TARGETS.index(target), condensed_call=0.0, move_rate=float("inf"))
    work = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=5, value_bytes=1, eight_bits=True)

    def seconds(columns: int, convolution: bool = False) -> float:
        return condensed(replace(work, columns=columns, convolution=convolution), machine)

    assert seconds(5) == seconds(16) < 0.7 * seconds(64)
    if target == AVX2:  # from 32 columns on a tile is almost as good as a full one
        assert seconds(48) / 3 == pytest.approx(seconds(32) / 2)
        assert seconds(64) / 4 < seconds(32) / 2 < seconds(16)
    elif target in NARROW_TILES:
        assert seconds(16) == pytest.approx(seconds(32) / 2) == pytest.approx(seconds(33) / 3)
        assert seconds(48) < 1.05 * seconds(64)
    else:
        assert seconds(17) == seconds(48) == seconds(64)
    assert seconds(64 + 16) == pytest.approx(seconds(64) + seconds(16))
    assert seconds(5, convolution=True) == seconds(64, convolution=True) == seconds(64)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(
    ("eight_bits", "index_rows", "factor"),
    [
        (False, 0, 1.0),
        (False, 768, 1.0),
        (False, 384, 1.0),  # twos fill half of the places of fours
        (False, 192, 0.5),
        (False, 96, 0.5),  # eights are two fours
        (True, 0, 1.0),
        (True, 768, 1.0),
        (True, 384, 1.0),
        (True, 192, 0.975),
        (True, 96, 0.8375),
    ],
)
def test_rows_that_share_their_inputs_by_hand(
    convolution: bool, eight_bits: bool, index_rows: int, factor: float
) -> None:
    """Only the multiplying gets cheaper: calls and what is moved cost as much."""
    machine = replace(SIMPLE, target=TARGETS.index(AVX2), level=1)
    alone = Work(
        rows=800,
        fan_in=3072,
        active=768,
        kept=768 * 307,
        columns=64,
        eight_bits=eight_bits,
        convolution=convolution,
    )
    moved = 200 + 64 * (3072 + 800) / 1e3
    expected = moved + factor * (condensed(alone, machine) - moved)
    assert condensed(replace(alone, index_rows=index_rows), machine) == pytest.approx(expected, rel=1e-12)


def test_one_sample_gains_nothing_by_shared_inputs() -> None:
    """The kernels that look inputs up have indices of their own for each row."""
    for eight_bits, target in itertools.product((False, True), TARGETS):
        machine = replace(Machine(), target=TARGETS.index(target))
        alone = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=1, eight_bits=eight_bits)
        assert condensed(replace(alone, index_rows=192), machine) == condensed(alone, machine)


@pytest.mark.parametrize("eight_bits", [False, True])
def test_groups_of_four_as_they_were_measured(eight_bits: bool) -> None:
    """With AVX2 calls at 90 % took 0.85 to 1.14 times as long without groups in int8, 1.4 to 1.7 in float32."""
    machine = replace(Machine(), target=TARGETS.index(AVX2), level=1)
    for (inputs, rows), columns in itertools.product(((768, 3072), (3072, 768)), (16, 32, 64)):
        work = Work(rows=rows, fan_in=inputs, active=rows, kept=rows * inputs // 10, columns=columns)
        work = replace(work, eight_bits=eight_bits)
        gain = condensed(work, machine) / condensed(replace(work, index_rows=rows // 4), machine)
        assert (1.0 if eight_bits else 1.3) < gain < (1.14 if eight_bits else 2.0)


def test_samples_share_what_is_looked_up() -> None:
    """On a processor of the Zen 4 generation 16 samples took about half as long as in float32, a tile of 64 a third."""
    machine = replace(Machine(), target=TARGETS.index(AVX512_VBMI))
    work = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=16)
    bytewise = replace(work, value_bytes=1, eight_bits=True)
    assert kernel_for(bytewise, machine) == "dot"
    assert 1.5 < condensed(work, machine) / condensed(bytewise, machine) < 3


def test_samples_behind_the_last_whole_tile_cost_what_they_do_alone() -> None:
    machine = replace(Machine(), target=TARGETS.index(AVX512_VBMI), condensed_call=1e-3)
    work = Work(rows=768, fan_in=3072, active=768, kept=768 * 307, columns=192, value_bytes=1, eight_bits=True)
    whole, few, both = (condensed(replace(work, columns=columns), machine) for columns in (192, 5, 197))
    assert both == pytest.approx(whole + few - 1e-3)
    assert condensed(replace(work, columns=197, convolution=True), machine) > both  # whose tiles are never split


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_of_eight_bits_is_the_plans(target: str) -> None:
    for samples, k in itertools.product((1, 4, 5, 16, 17, 64), (1, 20, 300)):
        work = Work(rows=64, fan_in=700, active=60, kept=60 * k, columns=samples, value_bytes=1, eight_bits=True)
        planned = plan.int8_linear_kernel(target == AVX512_VBMI, 700, 60, k, samples, False)
        assert kernel_for(work, replace(Machine(), target=TARGETS.index(target))) == (
            "tile" if planned == plan.INT8_TILE else "dot"
        )
