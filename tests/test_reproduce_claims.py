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


SHORT = ("--seeds", "1", "--sparsities", "0.9", "--steps-scale")


@pytest.mark.slow
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
    _run(folder, "--figure-only")
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
