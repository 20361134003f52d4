"""The accuracy of eight bits on real tasks: a run of the script, its file, its tables by hand and those of the page."""

import doctest
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.comparison import signal_to_noise


@pytest.fixture(autouse=True)
def _benchmarks(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests of this process keep theirs


def _script() -> Any:
    return import_module("int8_accuracy")


@pytest.mark.long
@pytest.mark.parametrize("task", ["cnn", "vit", "gpt"])
def test_a_short_run_is_stored_resumed_and_shown(
    task: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, file = _script(), tmp_path / "made" / "rows.csv"
    options = ["--tasks", task, "--seeds", "1", "--steps-scale", "0.01", "--sparsities", "0.9"]
    script.main([*options, "--out", str(file)])
    found = script.read(file)
    assert [key.form for key in found] == ["float32", "bfloat16", "int8", "int8_given", "int8_ort", "dense_int8"]
    sparse = {key.form: row for key, row in found.items()}
    assert sparse["float32"].snr > 90
    assert min(sparse["int8"].snr, sparse["int8_given"].snr) > 25
    assert sparse["int8"].score == pytest.approx(sparse["int8_ort"].score, abs=0.5)
    assert 0.05 < sparse["int8"].bytes_share < sparse["bfloat16"].bytes_share < sparse["float32"].bytes_share < 0.2
    assert any(dtype == "int8" and ratio > 25 for ratio, dtype, _ in sparse["int8"].layers.values())
    assert all(reason for _, dtype, reason in sparse["int8"].layers.values() if dtype != "int8")

    if task != "cnn":  # what is made anew, below, is made in the same way of any network
        return
    # Killed while it wrote its last line: the network is trained again, and all of its rows are made anew.
    finished = file.read_bytes()
    file.write_bytes(finished[:-6].replace(b"float32,", b"float32,1", 1))
    script.main([*options, "--out", str(file)])
    assert file.read_bytes() == finished
    monkeypatch.setattr(script, "execute", lambda keys: pytest.fail(f"{keys} are measured again"))
    script.main([*options, "--out", str(file)])
    assert _cells(script.parts(found)["accuracy"])[0] in _cells(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int8_given", "int8_ort", "dense_int8"])
def test_every_form_of_a_network_gives_its_outputs(form: str, library: Path) -> None:
    forms = import_module("harness.forms")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))
    model, examples = sx.sparsify(network, sparsity=0.5).eval(), torch.randn(8, 32)
    outputs, lowering = forms.form(form, model, (examples,), calibration=[(torch.randn(64, 32),)])
    x = torch.randn(5, 32)  # another batch size than the examples'
    with torch.no_grad():
        ratio = signal_to_noise(model(x), outputs(x))
    # Rounding is seen: 4.9e-3 of a value in bfloat16, half a step of 127 in int8.
    least, most = {"float32": (100, math.inf), "bfloat16": (45, 65)}.get(form, (30, 50))
    assert least < ratio <= most
    assert (lowering is None) is (form == "dense_int8")
    if lowering is not None:
        assert [layer.calibrated for layer in lowering.layers] == 2 * [form == "int8_given"]
    share = forms.bytes_share(lowering)
    assert math.isnan(share) if lowering is None else 0.2 < share < 1


@pytest.mark.slow
def test_the_careful_form_leaves_noisy_layers_in_float32() -> None:
    forms = import_module("harness.forms")
    torch.manual_seed(0)
    model = sx.sparsify(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)), sparsity=0.5).eval()
    weight = model.get_parameter("0.weight")
    with torch.no_grad():
        weight[:, 0] = 0
        examples = torch.randn(8, 32)
        examples[:, 0] = 12  # nobody reads the largest number of each sample, which its scale is made from
    found = {form: forms.layers(forms.form(form, model, (examples,))[1]) for form in ("int8", "int8_careful")}
    ratio, dtype, _ = found["int8"]["0.weight"]
    assert 25 < ratio < forms.CAREFUL_SNR
    assert dtype == "int8"
    _, dtype, reason = found["int8_careful"]["0.weight"]
    assert dtype == "float32"
    assert "at least 36 dB are asked for" in reason
    ratio, dtype, _ = found["int8_careful"]["2.weight"]
    assert ratio > forms.CAREFUL_SNR
    assert dtype == "int8"


@pytest.mark.slow
def test_what_becomes_of_layers_is_kept() -> None:
    forms = import_module("harness.forms")
    model = sx.sparsify(nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)), sparsity=0.5, rules={"1": None}).eval()
    lowering = sx.lower(model, (torch.randn(4, 16),), min_speedup=0, value_dtype=torch.int8).report
    (ratio, dtype, reason), dense = forms.layers(lowering).values()
    snr = lowering.layers[0].snr
    assert snr is not None
    assert (ratio, dtype, reason) == (round(snr, 2), "int8", "")
    assert dense == (None, "dense", "the rule '1' leaves it dense")


def _cells(table: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in table.splitlines() if "| --- |" not in line]
    return [[cell.strip() for cell in line] for line in lines]


def test_the_tables_by_hand() -> None:
    script = _script()

    def key(task: str, seed: int, form: str, sparsity: float = 0.9) -> Any:
        return script.Key(task, sparsity, seed, 4, form)

    def row(score: float, bits: float, layers: dict[str, Any] | None = None, **more: float) -> Any:
        return script.Row(score, bits, **{"changed": 0.0, "snr": 40.0, "bytes_share": 0.1} | more, layers=layers or {})

    rounded = {"a.weight": (41.0, "int8", ""), "b.weight": (44.0, "int8", ""), "c": (None, "dense", "a rule")}
    kept = {"a.weight": (20.0, "float32", "too noisy"), "b.weight": (46.0, "int8", ""), "c": (None, "dense", "a rule")}
    found = {
        key("cnn", 0, "float32"): row(98.0, 0.1, bytes_share=0.14),
        key("cnn", 1, "float32"): row(97.0, 0.2, bytes_share=0.14),
        key("cnn", 0, "int8"): row(97.9, 0.101, rounded, changed=0.2, snr=39.0),
        key("cnn", 1, "int8"): row(97.0, 0.203, kept, changed=0.4, snr=41.0),
        key("cnn", 0, "int8_ort"): row(97.9, 0.101),
        key("cnn", 0, "dense_int8", 0.8): row(90.0, 0.5, bytes_share=math.nan),  # nothing to compare with
        key("gpt", 0, "float32"): row(2.5, 2.5),
        key("gpt", 0, "dense_int8"): row(2.6, 2.6, bytes_share=math.nan, snr=9.0),
    }
    made = script.parts(found)
    cnn, gpt = "digits, CNN with BatchNorm", "Python sources, character GPT"
    dense_int8 = "dense int8 of ONNX Runtime"
    # Of two seeds, the interval is 12.706 times half the difference: 12.706 * 0.05 = 0.64 and 12.706 * 0.001 = 0.0127.
    assert _cells(made["accuracy"])[1:] == [
        [cnn, "80%", dense_int8, "90.00 %", "", "", "0.00", "40.0", "", "1", ""],
        [cnn, "90%", "float32", "97.50 ± 6.35 %", "", "", "", "", "14.0 %", "2", ""],
        [
            *(cnn, "90%", "int8", "97.45 ± 5.72 %", "0.05 ± 0.64", "0.0020 ± 0.0127"),
            *("0.30", "39.0", "10.0 %", "2", "the seeds do not tell"),
        ],
        [gpt, "90%", "float32", "2.500 bits", "", "", "", "", "10.0 %", "1", ""],
        [gpt, "90%", dense_int8, "2.600 bits", "0.1000", "0.1000", "0.00", "9.0", "", "1", "one seed"],
    ]
    # Four steps are not what is planned.
    assert made["progress"] == "0 of 13 networks are in; the script trains those that are missing."
    assert _cells(made["rounding"])[1:] == [
        [cnn, "90%", "1 to 2", "41.0", "44.0", "46.0", "`c`: a rule; `a.weight`: too noisy"]
    ]
    assert _cells(made["same_numbers"])[1:] == [[cnn, "90%", "98.00", "97.90", "97.90"]]


def test_rows_of_a_network_that_is_trained_again_are_forgotten(tmp_path: Path) -> None:
    script, file = _script(), tmp_path / "rows.csv"
    keys = [script.Key(task, 0.9, 0, 4, form) for task in ("cnn", "vit") for form in ("float32", "int8")]
    for key in keys:
        script.append(file, key, script.Row(97.5, 0.1, 0.0, 40.0, 0.1, {"a": (41.0, "int8", "")}))
    before = script.read(file)
    script._forget(file, [script.Key("gpt", 0.9, 0, 4, "int8")])
    assert script.read(file) == before
    script._forget(file, keys[:2])
    assert script.read(file) == {key: before[key] for key in keys[2:]}
    script._forget(file, keys)
    assert script.read(file) == {}
    assert not [*tmp_path.iterdir()]


def test_speeds_by_hand(tmp_path: Path) -> None:
    cells, guide = import_module("harness.cells"), import_module("harness.guide")

    def records(section: str, layer: str, batch: int, times: dict[str, float]) -> list[Any]:
        where = {"section": section, "layer": layer, "sparsity": 0.9, "batch": batch, "threads": 1}
        return [cells.Record(**where, contender=name, microseconds=time) for name, time in times.items()]

    linear = {cells.ORT_DENSE: 90.0, cells.ORT_INT8: 40.0, cells.OURS_ORT: 20.0, cells.OURS_TORCH: 30.0}
    written = {
        "int8": [
            *records("int8", "a", 1, linear | {cells.OURS_ORT_INT8: 10.0, cells.OURS_TORCH_INT8: 15.0}),
            *records("int8", "b", 1, linear | {cells.OURS_ORT_INT8: 2.5}),  # 2 and 8 times: 4 in the mean
        ],
        "int8_conv": records("int8_conv", "3x3 8 -> 8", 16, {cells.OURS_ORT: 5.0, cells.OURS_TORCH_INT8: 10.0}),
        "bf16": records("bf16", "a", 1, {cells.OURS_ORT: 30.0, cells.OURS_TORCH: 9.0, cells.OURS_ORT_BF16: 20.0}),
    }
    for section, found in written.items():
        cells.write_csv(tmp_path / f"peers_{section}.csv", found)
    assert guide.speeds(tmp_path) == [
        [
            *("linear", "90%", "1", "2.00x, 4.00x, 8.00x", "4.00x, 8.00x, 16.00x"),
            *("9.00x, 18.00x, 36.00x", "1.50x, 1.50x, 1.50x"),
        ],
        ["convolution, 3x3", "90%", "16", "0.50x, 0.50x, 0.50x", "", "", ""],
    ]


def test_instruction_sets_are_those_of_the_cost_model() -> None:
    lines = import_module("harness.guide").instruction_sets()
    assert lines[0] == ["`x86-64`", "1.50x", "1.10x", "1.30x"]
    assert lines[-1] == ["`x86-64-v4+avx512vnni+avx512vbmi`", "2.60x", "1.35x", "2.70x"]
    assert len(lines) == 6


def test_examples_in_docstrings() -> None:
    failed, tried = doctest.testmod(import_module("harness.losses"))
    assert tried > 0
    assert failed == 0


def test_the_plan_names_each_row_once() -> None:
    script = _script()
    plan = script.plan(("cnn", "gpt"), (0.9, 0.95))
    assert len(plan) == len(set(plan)) == 2 * ((5 + 3) * 5 + 2)
    assert {key.seed for key in plan if key.form == "int8_ort"} == {0}
    assert {key.run.method for key in plan} == {"srigl"}


def test_the_page_is_what_the_results_say(checkout: Path) -> None:
    script = _script()
    found = script.read(script.OUT)
    assert found.keys() <= {*script.plan(("cnn", "vit", "gpt"), script.SPARSITIES)}
    page, made = script.PAGE.read_text(encoding="utf-8"), script.parts(found)
    assert all(f"<!-- {name} -->" in page for name in made)
    assert script.report.fill(page, made) == page
