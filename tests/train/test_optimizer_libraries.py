"""All optimizers of pytorch-optimizer and timm, as the committed table says; needs the extra ``optimizers``."""

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def test_each_optimizer_trains_as_with_masks_by_hand(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two to three minutes: one table, so that a row that is missing, or one too many, is seen."""
    pytest.importorskip("pytorch_optimizer")
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    script: Any = importlib.import_module("optimizers")
    page = (checkout / "benchmarks" / "results" / "optimizers.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    shown = {row[0]: row[2].partition(":")[0].partition(" by")[0] for row in rows[2:]}
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: script.compare(make)[1].partition(":")[0].partition(" by")[0] for name, make in script.makers()}
    assert found == shown
