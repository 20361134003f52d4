"""The examples on training methods run, shortened."""

from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import pytest
import torch

import srigl_fx as sx
from srigl_fx.train.protect import protected_weights


@pytest.fixture(autouse=True)
def _examples(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the extra [demo] is not installed")
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # other tests of this process keep theirs


def test_a_method_of_ones_own_trains(capsys: pytest.CaptureFixture[str]) -> None:
    means = import_module("custom_update").main(seeds=2, steps=60)
    assert list(means) == ["SampledRigL", "RigL", "SET"]
    assert all(mean > 40 for mean in means.values())
    assert capsys.readouterr().out.startswith("SampledRigL")


@pytest.mark.slow
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


@pytest.mark.slow
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
