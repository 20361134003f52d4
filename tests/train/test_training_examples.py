"""The examples on training methods run, shortened."""

from importlib import import_module
from pathlib import Path

import pytest
import torch


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
