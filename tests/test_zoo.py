"""Every model of the zoo, from discovery to ONNX Runtime, against the committed coverage table.

``python -m zoo.table``, in this folder, makes the table anew.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from zoo import ZOO, coverage, journey
from zoo.table import TABLE

PACKAGES = ("torchvision", "timm", "transformers")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
NEEDS = {"torchvision": PACKAGES[:1], "timm": PACKAGES[:2], "transformers": PACKAGES[2:]}
# Whose way takes a second at most.
QUICK = {"nasty_tied", "nasty_varargs", "nasty_nested_seq", "nasty_groups", "nasty_fused_qkv"}
MODELS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in ZOO]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore")  # of the libraries that the models come from
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    if missing := [package for package in NEEDS.get(ZOO[name].family, ()) if package in MISSING]:
        pytest.skip(f"needs {' and '.join(missing)}: make test installs what the zoo needs")
    row, expected = journey.travel(ZOO[name], tmp_path), coverage.read()[name]
    assert replace(row, removed=0) == replace(expected, removed=0)
    # Which weights remain after training may depend on the processor, and with them what nothing reads any more.
    assert row.removed == pytest.approx(expected.removed, rel=0.02, abs=2)


def test_every_model_has_its_row() -> None:
    rows = coverage.read()
    assert list(rows) == list(ZOO)
    assert len(rows) == 72
    assert all(row.sparse > 0 for row in rows.values())
    print("\n" + coverage.text(list(rows.values())))


def test_the_documentation_shows_the_table(checkout: Path) -> None:
    page = (checkout / "docs" / "architectures.md").read_text(encoding="utf-8")
    found = TABLE.search(page)
    assert found is not None
    assert found[0].strip() == coverage.markdown(list(coverage.read().values()))


@pytest.mark.skipif(
    "SRIGL_FX_WHOLE_ZOO" not in os.environ, reason="set SRIGL_FX_WHOLE_ZOO where nothing may be left out"
)
def test_ci_has_all_packages() -> None:
    assert not MISSING


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason="make test installs what the zoo needs")
def test_the_libraries_work_in_a_process_of_their_own() -> None:
    code = """if True:
        import torch, torchvision, timm
        from transformers import Trainer

        boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
        print(torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist())
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 2]"
