"""The benchmark of peers: its tables, bars, files and plots by hand, and a few tiny real measurements."""

import math
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _benchmarks(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests of this process keep theirs


def _harness(name: str) -> Any:
    return import_module(f"harness.{name}")


def _records(section: str = "linear", batch: int = 1, sparsity: float = 0.9, **times: float) -> list[Any]:
    cells = _harness("cells")
    names = {
        "torch": cells.TORCH_DENSE,
        "ort": cells.ORT_DENSE,
        "ours": cells.OURS_TORCH,
        "ours_ort": cells.OURS_ORT,
        "ort_int8": cells.ORT_INT8,
        "ours_int8": cells.OURS_ORT_INT8,
        "deepsparse": cells.DEEPSPARSE,
        "csr": cells.CSR_TORCH,
        "dense_step": cells.DENSE_STEP,
        "sparse_step": cells.SPARSE_STEP,
    }
    return [
        cells.Record(
            section=section,
            layer="8 -> 4",
            sparsity=sparsity,
            batch=batch,
            threads=1,
            contender=names[name],
            microseconds=time,
            note="" if time == time else "not installed",
            bytes=1000,
            fmas=500,
        )
        for name, time in times.items()
    ]


def test_the_median_of_interleaved_turns() -> None:
    timing = _harness("timing")
    order: list[str] = []

    def contender(name: str, seconds: list[float]) -> Any:
        def taken(calls: int) -> float:
            order.append(name)
            return calls * seconds[order.count(name) - 1]

        return taken

    slow = timing.SLOW * 2  # one call to warm up, and no uncounted call before a turn
    timers = {"first": contender("first", [slow, 1.0, 9.0, 2.0]), "second": contender("second", [slow, 4.0, 5.0, 6.0])}
    assert timing.interleaved(timers, seconds=6.0, rounds=3) == {"first": 2.0, "second": 5.0}
    assert order[2:] == ["second", "first", "first", "second", "second", "first"]


def test_a_long_call_takes_part_once() -> None:
    timing = _harness("timing")
    calls: list[int] = []

    def taken(count: int) -> float:
        calls.append(count)
        return 3.0

    assert timing.interleaved({"slow": taken}, seconds=0.1, rounds=7) == {"slow": 3.0}
    assert calls == [1, 1]


def test_turns_count_while_the_machine_is_calm() -> None:
    timing = _harness("timing")
    calm = iter([False, True, False, True, True, True, True])
    seconds = iter([2.0, 7.0, 3.0, 5.0])  # to warm up; its machine was disturbed; the two that count
    timers = {"one": lambda calls: next(seconds)}
    assert timing.interleaved(timers, seconds=6.0, rounds=2, calm=lambda name: next(calm)) == {"one": 4.0}
    assert not list(calm)
    assert not timing.interleaved({"one": lambda calls: 2.0}, rounds=2, calm=lambda name: False)


@pytest.mark.long
def test_processors_are_probed() -> None:
    processors = _harness("processors").Processors()
    found = [processors(1) for _ in range(20)]
    assert not processors(10**4)
    assert processors.probes == 21
    assert processors.whole == sum(found)
    assert f"{sum(found)} of 21 moments" in processors.describe()


def test_real_times_are_in_proportion() -> None:
    timing = _harness("timing")
    timers = {name: timing.timer(lambda d=d: time.sleep(d)) for name, d in (("short", 0.001), ("long", 0.01))}
    times = timing.interleaved(timers, seconds=0.03, rounds=3)
    assert times["long"] > 2 * times["short"] >= 0.002


def test_bars_compare_the_better_of_both_sides() -> None:
    bars = _harness("bars")
    records = _records(torch=100.0, ort=80.0, ours=40.0, ours_ort=10.0, deepsparse=12.0, csr=30.0)
    found = {outcome.bar: outcome for outcome in bars.outcomes(records)}
    over_dense = found["linear, batch 1, 90%, over dense"]
    assert (over_dense.measured, over_dense.target, over_dense.verdict) == (8.0, 5.0, "met")
    assert over_dense.microseconds == 10.0
    assert found["linear, every cell, over DeepSparse"].verdict == "missed by 20%"
    assert found["linear, batch 1, 90%, over torch CSR"].verdict == "missed by 25%"


def test_the_worst_cell_decides() -> None:
    bars = _harness("bars")
    cells = {("linear", name, 0.9, 1, 1): dense for name, dense in (("a", 60.0), ("b", 20.0), ("c", math.nan))}
    records = {key: {r.contender: r for r in _records(torch=dense, ours=10.0)} for key, dense in cells.items()}
    (outcome,) = bars._worst("every cell", 5.0, records, ["torch dense"])
    assert (outcome.measured, outcome.verdict) == (2.0, "missed by 60%")
    assert outcome.where == "worst at b, 90%, batch 1; 1 of 2 met"


def test_convolutions_are_judged_by_their_geometric_mean() -> None:
    bars = _harness("bars")
    records = [
        *_records("conv", 1, ort=20.0, torch=1.0, ours=10.0, deepsparse=10.0),
        *_records("conv", 16, ort=80.0, torch=1.0, ours=10.0, deepsparse=math.nan),
    ]
    mean, peer, worst = bars.outcomes(records)
    assert (mean.measured, peer.measured, worst.measured) == pytest.approx((4.0, 1.0, 2.0))
    assert (mean.where, peer.where) == ("2 cells", "1 cells")


def test_training_and_threads() -> None:
    bars, cells = _harness("bars"), _harness("cells")
    (step,) = bars.outcomes(_records("train", 256, 0.95, dense_step=90.0, sparse_step=20.0))
    assert (step.measured, step.verdict) == (4.5, "met")
    one = _records("threads", 16, ours=100.0, ours_ort=90.0)
    two = [cells.Record(**{**vars(record), "threads": 2, "microseconds": 60.0}) for record in one]
    torch_, ort = bars.outcomes([*one, *two])
    assert (torch_.measured, ort.measured) == pytest.approx((100 / 60, 1.5))
    assert torch_.verdict == "missed by 2%"


def test_the_bars_of_eight_bits() -> None:
    bars, tables = _harness("bars"), _harness("tables")
    times = {"ort": 300.0, "ort_int8": 100.0, "ours": 60.0, "ours_int8": 40.0}
    over_int8, over_ours = bars.outcomes(_records("int8", 16, **times))
    assert (over_int8.measured, over_int8.target, over_int8.verdict) == (2.5, 2.2, "met")
    assert (over_ours.measured, over_ours.target, over_ours.verdict) == (1.5, 2.0, "missed by 25%")
    row = tables.cells_table(_records("int8", 16, **times), {}).splitlines()[2]
    assert row.endswith("| 300 | 100 | 60.0 | 40.0 | 5.00x | 2.50x | - |")
    one = _records("int8_conv", 1, ort_int8=100.0, ours_int8=50.0)
    (mean,) = bars.outcomes(one)
    assert (mean.measured, mean.verdict, mean.where) == (pytest.approx(2.0), "met", "1 cells")


def test_what_is_not_measured_is_said() -> None:
    bars, tables = _harness("bars"), _harness("tables")
    records = _records(torch=math.nan, ours=10.0)
    assert bars.outcomes(records)[0].verdict == "not measured"
    text = tables.cells_table(records, {})
    assert text.splitlines()[2] == "| 8 -> 4 | 90% | 1 | 1 | - | 10.0 | - | - | - |"
    assert text.endswith("- torch dense: not installed")


def test_tables_show_the_limit_of_a_cell() -> None:
    bars, tables = _harness("bars"), _harness("tables")
    records = _records(torch=100.0, ours=10.0)
    limits = {records[0].cell: (4.0, "bytes from L2")}
    row = tables.cells_table(records, limits).splitlines()[2]
    assert row.endswith("| 10.0x | - | - | 0.001 | 0.0005 | 4.00 | 2.50x | bytes from L2 |")
    assert "| met | worst at 8 -> 4, 90%, batch 1; 1 of 1 met | 2.50x | bytes from L2 |" in tables.bars_table(
        bars.outcomes(records), limits
    )


def test_limits_are_those_of_the_processor_that_ran_the_part(tmp_path: Path) -> None:
    run, ceilings, records = _harness("run"), _harness("ceilings"), _records(torch=100.0, ours=10.0)
    _harness("cells").write_csv(tmp_path / "peers_linear.csv", records)
    ceilings.write_ceilings(tmp_path / "peers_ceilings.csv", ceilings.measure_ceilings(0.002, 1 << 20))
    for processor, known in (("One (family 1, model 2)", 1), ("Other (family 1, model 2)", 0)):
        (tmp_path / "peers_ceilings.md").write_text("# Peers: ceilings\n\n`made`\n\nOne (family 1, model 2), avx2\n")
        run.write_page(tmp_path / "peers_linear.md", "linear", records, f"{processor}, avx2", "made")
        assert len(run.limits(records, tmp_path)) == known
        run.write_bars(tmp_path / "peers.md", tmp_path)
        assert f"- linear: `made`; {processor}\n" in (tmp_path / "peers.md").read_text(encoding="utf-8")


def test_records_survive_their_file(tmp_path: Path) -> None:
    cells = _harness("cells")
    records = _records(torch=1.25, ours=math.nan)
    cells.write_csv(tmp_path / "peers_linear.csv", records)
    first, second = cells.read_csv(tmp_path / "peers_linear.csv")
    assert first == records[0]
    assert math.isnan(second.microseconds)
    assert second.note == "not installed"
    assert [path.name for path in tmp_path.iterdir()] == ["peers_linear.csv"]


def test_limits_follow_bytes_or_multiply_adds() -> None:
    ceilings = _harness("ceilings")
    levels = tuple(ceilings.Level(name=n, buffer=b, rate=r) for n, b, r in (("L1", 100, 100.0), ("L2", 10000, 1.0)))
    machine = ceilings.Ceilings(levels=levels, register_fmas=20.0, load_fmas=10.0, sparse_fmas=9.0)
    assert machine.limit(50, 1) == (pytest.approx(0.5), "bytes from L1")
    assert machine.limit(1000, 1) == (pytest.approx(100.0), "bytes from L2")  # between, by logarithms: 10 a second
    assert machine.limit(50, 100) == (10.0, "multiply-adds")


def test_measured_ceilings_are_in_order(tmp_path: Path) -> None:
    ceilings = _harness("ceilings")
    found = ceilings.measure_ceilings(seconds=0.002, largest=1 << 21)
    assert found.register_fmas >= 0.9 * found.load_fmas > 1e8
    assert found.load_fmas >= 0.9 * found.sparse_fmas > 1e8
    assert [level.buffer for level in found.levels] == sorted({level.buffer for level in found.levels})
    ceilings.write_ceilings(tmp_path / "ceilings.csv", found)
    again = ceilings.read_ceilings(tmp_path / "ceilings.csv")
    assert again.load_fmas == pytest.approx(found.load_fmas, rel=1e-5)
    assert again.sparse_fmas == pytest.approx(found.sparse_fmas, rel=1e-5)
    assert len(again.levels) == len(found.levels)


@pytest.mark.parametrize("kernel", [0, 3])
def test_every_contender_of_a_layer_is_right(library: Path, kernel: int) -> None:
    layers, contenders, cells = _harness("layers"), _harness("contenders"), _harness("cells")
    layer = (
        layers.Layer(inputs=12, outputs=8, kernel=kernel, size=6, stride=2)
        if kernel
        else layers.Layer(inputs=40, outputs=24)
    )
    wanted = cells.CONV if kernel else tuple(name for name in cells.LINEAR if name != cells.GATHER)
    made = contenders.LayerContenders(layer, layers.random_weight(layer, 0.75), wanted, 1)
    for batch in (1, 3):
        with torch.inference_mode():
            calls, missing = made.calls(layers.random_input(layer, batch))
        # make extras-test installs OpenVINO.
        absent = set() if find_spec("openvino") else {cells.OPENVINO_DENSE, cells.OPENVINO_INT8}
        assert missing == dict.fromkeys(absent, "not available: pip install openvino")
        assert {*calls} == {*wanted} - {cells.DEEPSPARSE, cells.DEEPSPARSE_ORT} - absent


def test_deepsparse_takes_its_turns(library: Path) -> None:
    process, layers, cells = _harness("deepsparse_process"), _harness("layers"), _harness("cells")
    if not process.python(process.default_folder()).exists():
        pytest.skip("SRIGL_FX_PEERS names no folder with DeepSparse's environment")
    measuring = _harness("measuring")
    with process.Worker(process.default_folder()) as worker:
        assert worker.versions["deepsparse"] == "1.8.0"
        bench = measuring.Bench(threads=1, effort=measuring.Effort(seconds=0.01, rounds=2), worker=worker)
        wanted = (cells.TORCH_DENSE, cells.DEEPSPARSE, cells.DEEPSPARSE_ORT)
        for layer in (layers.Layer(inputs=64, outputs=32), layers.Layer(inputs=16, outputs=16, kernel=3, size=8)):
            for found in measuring.measure_layers("linear", [layer], [0.9], [1, 3], wanted, bench):
                assert [record.note for record in found] == ["", "", ""]
                assert all(record.microseconds > 0 for record in found)
        with pytest.raises(process.PeerError):
            worker.load(b"no model", {"x": np.ones((1, 4), np.float32)}, threads=1)
        with pytest.raises(process.PeerError, match="KeyError"):
            worker.timer("another")(1)


def test_a_wrong_output_is_found() -> None:
    contenders = _harness("contenders")
    right = torch.tensor([[1.0, -4.0]])
    assert contenders.difference(np.array([[1.0001, -4.0]], np.float32), right, 1e-4) == ""
    assert contenders.difference(np.array([[1.1, -4.0]], np.float32), right, 1e-4) == "relative error 2.5e-02"
    assert contenders.difference(np.ones((2, 1), np.float32), right, 1e-4) == "shape (2, 1) instead of (1, 2)"


def test_both_training_steps_learn() -> None:
    training = _harness("training")
    x, target = torch.randn(16, 12), torch.randn(16, 4)
    for step in (training.dense_step((12, 20, 4), x, target), training.sparse_step((12, 20, 4), 0.5, x, target)):
        losses = [float(step()) for _ in range(50)]
        assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_quick_run_writes_its_files(library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the extra [demo] is not installed")
    peers = import_module("peers")
    folders = ["--out", str(tmp_path), f"--peers={tmp_path}"]
    some = ["--contenders", "torch dense", "ours in torch", "ours in ORT", "DeepSparse"]
    peers.main(["--quick", "--only", "ceilings", "linear", "conv", "train", *folders, *some, "--sparsities", "0.9"])
    printed = capsys.readouterr()
    assert "[bar 5x:" in printed.out
    assert "--setup-deepsparse" in printed.err
    names = {f"peers_{part}.{kind}" for part in ("ceilings", "linear", "conv", "train") for kind in ("csv", "md")}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "peers.md", "peers_linear.png", "peers_conv.png"}
    page = (tmp_path / "peers_linear.md").read_text(encoding="utf-8")
    assert page.splitlines()[2].startswith(
        "`python benchmarks/peers.py --quick --only ceilings linear conv train --cont"
    )
    assert str(tmp_path) not in page.splitlines()[2]
    assert "- DeepSparse: no DeepSparse in" in page
    assert "linear, batch 16, 90%, over dense" in (tmp_path / "peers.md").read_text(encoding="utf-8")


@pytest.mark.long
def test_dense_int8_and_ours_are_measured(library: Path, tmp_path: Path) -> None:
    cells, peers = _harness("cells"), import_module("peers")
    peers.main(["--quick", "--only", "int8", "int8_conv", "--out", str(tmp_path), f"--peers={tmp_path}"])
    for section in ("int8", "int8_conv"):
        found = cells.read_csv(tmp_path / f"peers_{section}.csv")
        times = {record.contender: record.microseconds for record in found}
        assert times.keys() == {*cells.DENSE, *cells.DENSE_INT8, *cells.OURS, *cells.OURS_INT8}
        measured = (cells.ORT_INT8, *cells.OURS_INT8)
        assert all(times[name] > 0 for name in measured), [record.note for record in found]
        assert f"over {cells.ORT_INT8}" in (tmp_path / f"peers_{section}.md").read_text(encoding="utf-8")


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    peers = import_module("peers")
    folders = ["--quick", "--out", str(tmp_path), "--peers", str(tmp_path), "--only", "linear"]
    for options, message in (
        (["--shapes", "12"], "cannot read the shape '12'"),
        (["--contenders", "x"], "no contender x"),
    ):
        with pytest.raises(SystemExit, match=message):
            peers.main([*folders, *options])


def test_the_documentation_names_every_part(checkout: Path) -> None:
    page = (checkout / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    peers, run = import_module("peers"), _harness("run")
    assert tuple(run.SECTIONS) == peers.SECTIONS
    assert all(f"| `{section}` |" in page for section in peers.SECTIONS)
