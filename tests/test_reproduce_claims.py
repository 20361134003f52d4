"""The experiment on the paper's claims: its real runs, shortened; its file, killed and resumed; its verdicts."""

import doctest
import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _examples(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests of this process keep theirs


def _run(folder: Path, *options: str) -> None:
    import_module("reproduce_claims").main(["--out", str(folder), *options])


SHORT = ("--only", "claims", "--seeds", "1", "--sparsities", "0.9", "--steps-scale")


@pytest.mark.long
def test_runs_resumes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, grid = tmp_path / "claims", ("--tasks", "cnn", *SHORT, "0.02")
    _run(folder, *grid)
    table, page = folder / "results.csv", folder.with_suffix(".md")
    finished, drawn = table.read_bytes(), {path.name: path.read_bytes() for path in (page, *folder.glob("*.svg"))}
    header, *lines = finished.decode().splitlines()
    assert [line.split(",")[:5] for line in lines] == [
        ["0", "cnn", method, "0.0" if method == "dense" else "0.9", "5"]
        for method in ("dense", "static", "set", "rigl", "srigl_no_ablation", "srigl", "srigl_other_gamma")
    ]
    assert header.startswith("seed,task,method,sparsity,steps,score")
    assert sorted(drawn) == ["active_neurons.svg", "claims.md", "score.svg", "widths.svg"]

    # Killed while it wrote its last line, which it then trains again, and that alone.
    table.write_bytes(finished[:-30])
    capsys.readouterr()
    _run(folder, *grid)
    assert "7/7" in capsys.readouterr().err
    again = table.read_text().splitlines()
    assert again[:-1] == [header, *lines[:-1]]
    seconds = header.split(",").index("train_cpu_seconds")
    assert _without(again[-1], seconds) == _without(lines[-1], seconds)

    table.write_bytes(finished)
    _run(folder, "--only", "claims", "--figure-only")
    assert {path.name: path.read_bytes() for path in (page, *folder.glob("*.svg"))} == drawn


def _without(line: str, column: int) -> list[str]:
    cells = line.split(",")
    return cells[:column] + cells[column + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vit", pytest.param("gpt", marks=pytest.mark.long)])
def test_the_transformers_run(task: str, tmp_path: Path) -> None:
    _run(tmp_path / "claims", "--tasks", task, "--methods", "srigl", *SHORT, "0.05")
    (row,) = import_module("claims.results").read(tmp_path / "claims" / "results.csv")
    assert 0.89 < row.number("sparsity_masked") < 0.92
    assert 0.0 < row.number("train_flops") < 0.2
    assert row.number("itop") > 1 - row.number("sparsity_masked")  # some weights were replaced
    widths = json.loads(row.values["layers"])
    assert any(active < neurons for active, neurons, *_ in widths.values())
    assert all(
        active == neurons for name, (active, neurons, *_) in widths.items() if "in_proj" in name or name == "head"
    )


def test_the_plan_spans_everything_seed_by_seed() -> None:
    plan = import_module("claims.results").plan()
    assert len(plan) == len(set(plan)) == 2 * 5 * (1 + 6 * 5) + 3 * (1 + 6 * 3)
    assert [key.seed for key in plan] == sorted(key.seed for key in plan)
    assert {key.task for key in plan if key.seed == 0} == {"cnn", "vit", "gpt"}


def _results(task: str, first: Sequence[float], second: Sequence[float]) -> Any:
    results, runs, analysis = (import_module(f"claims.{name}") for name in ("results", "runs", "analysis"))
    return analysis.Results(
        [
            results.Row(runs.Key(seed, task, method, 0.9, 1), {"score": str(score)})
            for method, scores in (("rigl", first), ("set", second))
            for seed, score in enumerate(scores)
        ]
    )


@pytest.mark.parametrize(
    ("task", "first", "second", "expected", "verdict"),
    [
        ("cnn", (91.0, 92.0, 93.1), (90.0, 91.0, 92.0), "more", "holds"),  # each seed 1 better: 1.03 +- 0.14
        ("cnn", (91.0, 92.0, 93.1), (90.0, 93.0, 92.0), "more", "undecided"),
        ("cnn", (90.0, 91.0, 92.0), (91.0, 92.0, 93.1), "more", "does not hold"),
        ("cnn", (90.0, 91.0, 92.0), (90.0, 91.0, 92.0), "more", "does not hold"),
        ("cnn", (90.0, 91.0, 92.0), (90.5, 91.5, 92.6), "not less", "holds"),  # within the point that is allowed
        ("cnn", (90.0, 91.0, 92.0), (93.0, 94.0, 95.1), "not less", "does not hold"),
        ("cnn", (93.0, 94.0, 95.1), (90.0, 91.0, 92.0), "not less", "holds"),
        ("cnn", (93.0, 94.0, 95.1), (90.0, 91.0, 92.0), "equal", "does not hold"),
        ("cnn", (90.0,), (80.0,), "more", "no data"),
        ("gpt", (2.00, 2.10, 2.21), (2.50, 2.60, 2.70), "more", "holds"),  # fewer bits are better
        ("gpt", (2.50, 2.60, 2.70), (2.00, 2.10, 2.21), "not less", "does not hold"),
    ],
)
def test_verdicts(task: str, first: Sequence[float], second: Sequence[float], expected: str, verdict: str) -> None:
    comparison = import_module("claims.analysis").Comparison(
        first=("rigl", 0.9), second=("set", 0.9), expected=expected
    )
    assert comparison.judge(_results(task, first, second), task)[0] == verdict


def test_intervals_are_students() -> None:
    estimate = import_module("claims.analysis").estimate
    found = estimate([1.0, 2.0, 4.0, 5.0, 8.0])
    # Mean 4, standard deviation sqrt(7.5), quantile of t with 4 degrees of freedom from a printed table.
    assert found.mean == pytest.approx(4.0)
    assert found.half_width == pytest.approx(2.7764451 * math.sqrt(7.5 / 5), rel=1e-6)
    assert estimate([]) is None


@pytest.mark.parametrize("module", ["data", "analysis", "report"])
def test_examples_in_docstrings(module: str) -> None:
    failed, tried = doctest.testmod(import_module(f"claims.{module}"))
    assert tried > 0
    assert failed == 0


def test_the_page_is_what_the_results_say(checkout: Path) -> None:
    results, report = import_module("claims.results"), import_module("claims.report")
    rows = results.read(checkout / "docs" / "claims" / "results.csv")
    assert set(results.plan()) <= {row.key for row in rows}
    page = (checkout / "docs" / "claims.md").read_text(encoding="utf-8")
    assert report.fill(page, report.parts_of_page(rows)) == page


def test_the_plan_of_groups_spans_everything_seed_by_seed() -> None:
    plan = import_module("claims.groups").plan()
    assert len(plan) == len(set(plan)) == (5 + 5 + 3) * 3 * 5
    assert [key.seed for key in plan] == sorted(key.seed for key in plan)
    assert {(key.task, key.group_size) for key in plan if key.seed == 0} == {
        (task, size) for task in ("cnn", "vit", "gpt") for size in (1, 2, 4, 8, 16)
    }
    few = import_module("claims.groups").plan(["gpt"], [0.9, 0.98], [1, 4], 2, 0.01)
    assert [(key.seed, key.sparsity, key.group_size, key.steps) for key in few] == [
        (0, 0.9, 1, 10),
        (0, 0.9, 4, 10),
        (1, 0.9, 1, 10),
        (1, 0.9, 4, 10),
    ]


@pytest.mark.long
def test_groups_run_resume_and_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, groups = tmp_path / "claims", import_module("claims.groups")
    grid = ("--only", "groups", "--tasks", "cnn", "--seeds", "1", "--sparsities", "0.9", "--steps-scale", "0.02")
    _run(folder, *grid, "--group-sizes", "1", "4")
    table, page = folder / "groups.csv", tmp_path / "group-size.md"
    finished = table.read_bytes()
    assert [(row.key.group_size, row.key.steps) for row in groups.read(table)] == [(1, 5), (4, 5)]
    assert all(0.88 < row.sparsity_all < 0.91 for row in groups.read(table))
    assert page.read_text().startswith("<!-- group_progress -->\n\n0 of 195 runs are in")
    assert sorted(path.name for path in folder.iterdir()) == ["groups.csv", "groups.svg"]

    table.write_bytes(finished[:-5])  # killed while it wrote its last line
    capsys.readouterr()
    _run(folder, *grid, "--group-sizes", "1", "4", "8")
    assert "3/3" in capsys.readouterr().err
    seconds = groups.COLUMNS.index("train_cpu_seconds")
    again, before = table.read_text().splitlines(), finished.decode().splitlines()
    assert again[:2] == before[:2]
    assert _without(again[2], seconds) == _without(before[2], seconds)
    assert len(again) == 4


@pytest.mark.long
def test_groups_of_one_are_the_run_of_the_claims() -> None:
    runs, groups = import_module("claims.runs"), import_module("claims.groups")
    alone = runs.execute(runs.Key(0, "cnn", groups.METHOD, 0.9, 4))
    grouped = groups.execute(groups.Key(0, "cnn", 0.9, 1, 4))
    assert grouped["score"] == alone["score"]
    assert groups.execute(groups.Key(0, "cnn", 0.9, 8, 4))["score"] != alone["score"]


def _group_rows(task: str, scores: dict[int, Sequence[float]]) -> list[Any]:
    groups = import_module("claims.groups")
    return [
        groups.Row(groups.Key(seed, task, 0.9, size, 1), score, 0.9, 3600.0)
        for size, found in scores.items()
        for seed, score in enumerate(found)
    ]


@pytest.mark.parametrize(
    ("task", "scores", "largest"),
    [
        ("cnn", {1: (90, 91, 92), 2: (90, 91, 92.1), 4: (89.5, 90.5, 91.4), 8: (80, 81, 82), 16: (90, 91, 92)}, 4),
        ("cnn", {1: (90, 91, 92), 2: (95, 80, 92), 4: (90, 91, 92)}, 1),  # the seeds do not tell, of 2 already
        ("cnn", {1: (90, 91, 92), 2: (90, 91, 92)}, 2),  # the others are not in yet
        ("cnn", {1: (90,), 2: (90,)}, None),
        ("gpt", {1: (2.0, 2.1, 2.2), 2: (2.02, 2.12, 2.22), 4: (2.1, 2.2, 2.31)}, 2),  # more bits are worse
    ],
)
def test_the_largest_group_that_is_as_good(task: str, scores: dict[int, Sequence[float]], largest: int | None) -> None:
    rows = _group_rows(task, scores)
    assert import_module("claims.group_report").largest_as_good(rows, task, 0.9) == largest


def test_tables_of_groups_by_hand() -> None:
    report = import_module("claims.group_report")
    rows = _group_rows("cnn", {1: (90.0, 92.0), 4: (89.0, 92.0)})
    parts = report.parts_of_page(rows, {(0.9, 1): 4.0, (0.9, 4): 8.5})
    # Student's quantile with one degree of freedom is 12.706: 12.706 * sqrt(2 / 2) and 12.706 * sqrt(0.5 / 2).
    assert "| 1 | - | 91.0 ± 12.7 | - |" in parts["group_scores"]
    assert "| 4 | - | 0.5 ± 6.4 | - |" in parts["group_prices"]
    assert parts["group_speeds"].splitlines()[2:] == ["| 1 | - | 4.00x | - |", "| 4 | - | 8.50x | - |"]
    assert report.parts_of_page(rows, {})["group_speeds"] == "Not measured yet."
    assert parts["group_progress"] == "0 of 195 runs are in, 4.0 hours of one core."


def test_speeds_are_the_geometric_mean_over_layers(tmp_path: Path) -> None:
    speeds, file = import_module("claims.speeds"), tmp_path / "speeds.csv"
    assert speeds.read(file) == {}
    lines = ["a,0.9,64,0,80,x", "a,0.9,64,4,10,x", "b,0.9,64,0,90,x", "b,0.9,64,4,45,x", "b,0.9,16,4,1,x"]
    alone = "c,0.9,64,4,1,x"  # without a dense time, it says nothing
    file.write_text("\n".join(["layer,sparsity,batch,group_size,microseconds,note", *lines, alone, ""]))
    assert speeds.read(file) == {(0.9, 4): pytest.approx(4.0)}
    file.write_text("layer,sparsity\n")
    with pytest.raises(ValueError, match="has no column batch, group_size, microseconds: measure anew"):
        speeds.read(file)


@pytest.mark.parametrize("measured", [{}, {(0.9, 1): 4.0, (0.9, 4): 8.5}])
def test_the_figure_of_groups_has_what_there_is(measured: dict[tuple[float, int], float], tmp_path: Path) -> None:
    file = tmp_path / "groups.svg"
    import_module("claims.group_report").draw(_group_rows("cnn", {1: (90, 92), 4: (89, 92)}), measured, file)
    assert file.read_text().count("<use") > 10


def test_the_page_on_group_sizes_is_what_the_results_say(checkout: Path) -> None:
    groups, report, speeds = (import_module(f"claims.{name}") for name in ("groups", "group_report", "speeds"))
    rows = groups.read(checkout / "docs" / "claims" / "groups.csv")
    parts = report.parts_of_page(rows, speeds.read(checkout / report.SPEEDS))
    page = (checkout / "docs" / report.PAGE).read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in parts)
    assert import_module("claims.report").fill(page, parts) == page
