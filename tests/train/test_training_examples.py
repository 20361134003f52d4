"""The examples on training methods run, shortened."""

import dataclasses
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import srigl_fx as sx
from srigl_fx.train.protect import protected_weights


@pytest.fixture(autouse=True)
def _examples(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests of this process keep theirs


@pytest.mark.long
def test_a_method_of_ones_own_trains(capsys: pytest.CaptureFixture[str]) -> None:
    means = import_module("custom_update").main(seeds=2, steps=60)
    assert list(means) == ["SampledRigL", "RigL", "SET"]
    assert all(mean > 40 for mean in means.values())
    assert capsys.readouterr().out.startswith("SampledRigL")


@pytest.mark.long
def test_fewer_neurons_come_back_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    rows = import_module("batchnorm_revival").main(seeds=2, steps=160)
    revivals = {(case, norm, treatment): int(count) for case, norm, treatment, count, *_ in rows}
    for case in ("digits, MLP", "digits, CNN", "toy, MLP"):
        assert revivals[case, "yes", "scaled"] <= revivals[case, "yes", "reference"] / 2
        assert revivals[case, "yes", "permanent"] == 0
    assert "| digits, MLP | yes | scaled |" in capsys.readouterr().out


def test_the_table_in_the_documentation_names_every_treatment(checkout: Path) -> None:
    page = (checkout / "docs" / "methods.md").read_text(encoding="utf-8")
    module = import_module("batchnorm_revival")
    for case in module.CASES:
        for norm in ("yes", "no"):
            for treatment in module.TREATMENTS:
                assert f"| {case} | {norm} | {treatment} |" in page


@pytest.mark.slow
@pytest.mark.parametrize("task", ["plain vit", "vit", "cnn", "gpt"])
def test_the_layers_that_the_experiment_protects_are_those_that_the_library_finds(task: str) -> None:
    module = import_module("ablation_protection")
    case = module.CASES[task]
    model = case.recipe.build()
    sx.sparsify(model, sparsity=0.9, rules=dict.fromkeys(case.recipe.dense, None))
    protected = protected_weights(model)
    masked = {name for name, _ in sx.masks.named_masks(model)}
    named = {
        name
        for name in masked
        for pattern in (*case.writers, *case.attention, "head")
        if fnmatchcase(name.removesuffix(".weight"), pattern)
    }
    assert {name for name in protected if name in masked and not name.endswith("in_proj_weight")} == named


@pytest.mark.long
def test_a_high_threshold_wrecks_no_vision_transformer() -> None:
    module = import_module("ablation_protection")
    outputs, everything = (
        float(module.execute("plain vit", variant, seed=0)["score"]) for variant in ("outputs", "streams and attention")
    )
    assert everything > outputs + 5


def test_the_tables_of_the_experiment_are_those_in_the_documentation(checkout: Path) -> None:
    module = import_module("ablation_protection")
    page = (checkout / "docs" / "methods.md").read_text(encoding="utf-8")
    assert module.table(checkout / module.OUT) in page


def test_finished_runs_of_the_experiment_are_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module("ablation_protection")
    table = tmp_path / "rows.csv"
    for task, variant, seed in module.plan(2):
        if task == "cnn" and variant in ("outputs", "none"):
            row = {"score": 90 + seed + (variant == "none"), "active_share": 0.5, "narrowest": "stem", "cpu_seconds": 1}
            module.append(table, {"task": task, "variant": variant, "seed": seed, **row, "narrowest_share": 0.25})
    before = table.read_bytes()
    arguments = ["--tasks", "cnn", "--variants", "outputs", "none", "--seeds", "2", "--out", str(table)]
    module.main(arguments)
    assert table.read_bytes() == before
    assert "| no ablation | 91.5 ± 6.4 | 1.0 ± 0.0 | 50 | stem: 25 % | 2 |" in capsys.readouterr().out


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("task", "optimizer"),
    [
        pytest.param("cnn", "AdamW", marks=pytest.mark.slow),
        pytest.param("cnn", "RMSprop", marks=pytest.mark.long),
        pytest.param("cnn", "NAdam", marks=pytest.mark.long),
        pytest.param("vit", "AdamW", marks=pytest.mark.long),
        pytest.param("gpt", "AdamW", marks=pytest.mark.long),
    ],
)
def test_the_experiment_on_first_steps_runs(
    task: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, runs = import_module("first_steps"), import_module("claims.runs")
    monkeypatch.setitem(runs.TASKS, task, dataclasses.replace(runs.TASKS[task], steps=16, batch=8, update_every=4))
    file = tmp_path / "made" / "rows.csv"
    arguments = ["--tasks", task, "--seeds", "1", "--out", str(file), "--optimizers", optimizer]
    module.main(arguments)
    rows = [line.split(",") for line in file.read_text().replace('"weight, scaled"', "weight; scaled").splitlines()]
    assert rows[0] == ["task", "method", "optimizer", "treatment", "seed", "score", "cpu_seconds"]
    titles = {"tensor": 'step_count="tensor"', "weight": 'step_count="weight"'}
    if optimizer == "AdamW" and task != "gpt":
        titles["weight; scaled"] = 'step_count="weight", scaled learning rate'
    assert [row[:5] for row in rows[1:]] == [
        [task, method, optimizer, treatment, "0"] for method in ("RigL", "SRigL") for treatment in titles
    ]

    # The table says what the file says.
    scores = {(method, treatment): float(score) for _, method, _, treatment, _, score, _ in rows[1:]}
    sign, digits = (-1, 3) if task == "gpt" else (1, 2)
    lines = _cells(capsys.readouterr().out)
    for line, ((method, treatment), score) in zip(lines, scores.items(), strict=True):
        assert line[1:4] == [optimizer, method, titles[treatment]]
        assert float(line[4]) == pytest.approx(score, abs=0.51 * 10**-digits)
        gain = sign * (score - scores[method, "tensor"])
        assert treatment == "tensor" or float(line[5]) == pytest.approx(gain, abs=0.51 * 10**-digits)
        assert (line[5] == "") is (treatment == "tensor")
        assert line[6:] == ["1", ""]

    # Killed while it wrote its last line, which it then trains again, and that alone.
    finished = file.read_bytes()
    file.write_bytes(finished[:-6])
    module.main(arguments)
    again = file.read_bytes()
    assert again.splitlines()[:-1] == finished.splitlines()[:-1]
    assert again.splitlines()[-1].rpartition(b",")[0] == finished.splitlines()[-1].rpartition(b",")[0]
    assert "1/1" in capsys.readouterr().err
    monkeypatch.setattr(module, "execute", lambda key: pytest.fail(f"{key} is trained again"))
    module.main(arguments)
    module.main(["--table-only", "--out", str(file)])
    assert file.read_bytes() == again


@pytest.mark.long
def test_the_treatments_do_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    module, runs = import_module("first_steps"), import_module("claims.runs")
    monkeypatch.setitem(runs.TASKS, "cnn", dataclasses.replace(runs.TASKS["cnn"], steps=20, update_every=4))
    made: list[tuple[Any, torch.optim.Optimizer, dict[str, Any]]] = []

    class Noted(sx.RigL):
        def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
            super().__init__(model, optimizer, **options)
            rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
            masks = dict(sx.masks.named_masks(model))
            found = {
                name: (rates[id(one)], float(masks[name].float().mean()) if name in masks else 1.0)
                for name, one in model.named_parameters()
            }
            made.append((self, optimizer, found))

    monkeypatch.setattr(sx, "RigL", Noted)
    for treatment in module.TREATMENTS:
        module.execute(module.Key("cnn", "RigL", "AdamW", treatment, 0))
    for (trainer, optimizer, rates), (weight, scaled) in zip(made, ((0, 0), (1, 0), (1, 1)), strict=True):
        assert bool(trainer.state_dict().get("step_counts")) is bool(weight)
        assert trainer.steps == 20
        for name, (rate, density) in rates.items():
            assert rate == pytest.approx(5e-3 / density**0.5 if scaled else 5e-3), name
        assert any(density < 0.2 for _, density in rates.values())
        # OneCycleLR ends each group at the same share of its own rate.
        assert len({round(group["lr"] / group["max_lr"], 12) for group in optimizer.param_groups}) == 1


def test_the_table_of_first_steps_by_hand() -> None:
    module = import_module("first_steps")
    scores = {
        ("vit", "RigL", "AdamW", "tensor"): (90.0, 92.0, 94.0),  # 92 +- 2 / sqrt(3)
        ("vit", "RigL", "AdamW", "weight"): (91.0, 93.5, 95.0),  # 1, 1.5 and 1 more: 1.17 +- 0.17
        ("vit", "RigL", "AdamW", "weight, scaled"): (90.0, 91.0),  # 0 and -1
        ("gpt", "SRigL", "AdamW", "tensor"): (3.0, 3.2),
        ("gpt", "SRigL", "AdamW", "weight"): (3.1, 3.31),  # fewer bits are better
        ("cnn", "SRigL", "NAdam", "weight"): (80.0,),  # nothing to compare with
    }
    keyed = {module.Key(*run, seed): score for run, found in scores.items() for seed, score in enumerate(found)}
    vit, gpt = "digits, vision transformer, %", "Python sources, character GPT, bits"
    weight, tensor = 'step_count="weight"', 'step_count="tensor"'
    assert _cells(module.table(keyed)) == [
        [vit, "AdamW", "RigL", tensor, "92.00 ± 1.15", "", "3", ""],
        [vit, "AdamW", "RigL", weight, "93.17 ± 1.17", "1.17 ± 0.17", "3", "better"],
        [vit, "AdamW", "RigL", f"{weight}, scaled learning rate", "90.50 ± 0.50", "-0.50 ± 0.50", "2", ""],
        [gpt, "AdamW", "SRigL", tensor, "3.100 ± 0.100", "", "2", ""],
        [gpt, "AdamW", "SRigL", weight, "3.205 ± 0.105", "-0.105 ± 0.005", "2", "worse"],
        ["digits, CNN with BatchNorm, %", "NAdam", "SRigL", weight, "80.00", "", "1", ""],
    ]


def test_the_table_of_first_steps_in_the_documentation_is_what_the_results_say(checkout: Path) -> None:
    module, report = import_module("first_steps"), import_module("claims.report")
    scores = module.read(checkout / module.OUT)
    planned = module.plan(import_module("claims.runs").TASKS, module.OPTIMIZERS, None)
    assert len(planned) == len(set(planned))
    assert set(scores) == set(planned)
    page = (checkout / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "<!-- first_steps -->" in page
    assert report.fill(page, {"first_steps": module.table(scores)}) == page


@pytest.mark.long
def test_the_experiment_on_reordering_runs_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, file = import_module("reorder_groups"), tmp_path / "reordering.csv"
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(module, "SPARSITIES", (0.5,))
    monkeypatch.setattr(module, "GROUP_SIZES", (1, 4))
    options = ["--tasks", "cnn", "--seeds", "1", "--steps-scale", "0.02", "--out", str(file)]
    module.main(options)
    rows = module.read(file)
    assert [(key.group_size, key.order) for key in rows] == [(1, "as trained"), (4, "as trained"), (4, "similar")]
    alone, trained, similar = (kept for kept, _ in rows.values())
    assert 0.5 < trained < similar < alone < 1
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])  # killed while it wrote its last line
    module.main(options)
    assert file.read_bytes() == whole
    assert "| digits, CNN with BatchNorm | 50% | 4 | similar |" in capsys.readouterr().out


def test_the_table_of_reordering_in_the_documentation_is_what_the_results_say(checkout: Path) -> None:
    module, report = import_module("reorder_groups"), import_module("claims.report")
    page = (checkout / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "<!-- reordering -->" in page
    made = module.table(module.read(checkout / module.OUT))
    assert report.fill(page, {"reordering": made}) == page


def _read_claims(file: Path) -> int:
    return len(import_module("claims.results").read(file))


def _read_protection(file: Path) -> int:
    return len(import_module("ablation_protection").read(file))


def _read_first_steps(file: Path) -> int:
    return len(import_module("first_steps").read(file))


def _read_reordering(file: Path) -> int:
    return len(import_module("reorder_groups").read(file))


RESULTS = {
    "results": _read_claims,
    "protection": _read_protection,
    "first_steps": _read_first_steps,
    "reordering": _read_reordering,
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_damaged_file_of_results_is_refused(name: str, checkout: Path, tmp_path: Path) -> None:
    whole = (checkout / "docs" / "claims" / f"{name}.csv").read_bytes()
    lines, file, read = whole.splitlines(keepends=True), tmp_path / "rows.csv", RESULTS[name]
    number = len(lines) - 1

    def read_of(content: bytes) -> int:
        file.write_bytes(content)
        return read(file)

    assert read(file) == read_of(b"") == read_of(lines[0]) == read_of(lines[0][:-1]) == 0
    assert read_of(whole) == number
    assert read_of(whole[:-1]) == read_of(whole[:-20]) == number - 1
    first, second, *rest = lines
    cells = second.split(b",")
    seed = next(place for place, column in enumerate(first.strip().split(b",")) if column == b"seed")
    damages: dict[bytes, tuple[str, bytes]] = {
        b",".join(cells[:-2]) + b"\n": ("line 2 is damaged: .* cells for .* columns; delete the line", first),
        b",".join([*cells[:seed], b"x", *cells[seed + 1 :]]): ("line 2 is damaged: invalid literal", first),
        second + second: ("line 3 is damaged: this run has a row before", first),
        b"\x00" * 40 + b"\n": ("line 2 is damaged", first),
        b"\xff" + second: ("line 2 is damaged: .* codec can't decode", first),
        b'"' + second.replace(b'"', b""): (r"line \d+ is damaged", first),
        second: (r"line 1 is damaged: the columns are .*, not .*; take the file from its history", b"seed,score\n"),
    }
    for damaged, (message, header) in damages.items():
        content = header + damaged + b"".join(rest)
        with pytest.raises(ValueError, match=message) as caught:
            read_of(content)
        assert str(caught.value).startswith(str(file))
        assert file.read_bytes() == content


def test_a_run_that_is_not_of_the_experiment_is_refused(tmp_path: Path) -> None:
    for module in map(import_module, ("first_steps", "ablation_protection", "reorder_groups")):
        file = tmp_path / f"{module.__name__}.csv"
        values = dict.fromkeys(module.COLUMNS, 0) | {"task": "digits"}
        file.write_text(",".join(module.COLUMNS) + "\n" + ",".join(map(str, values.values())) + "\n")
        with pytest.raises(ValueError, match="line 2 is damaged: no task is called 'digits'"):
            module.read(file)
