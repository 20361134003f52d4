"""A row of the table of activations: all that one takes which only limits its input, and refused where it is wrong."""

import ast
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from srigl_fx.errors import SriglError
from srigl_fx.runtime.activations import ACTIVATIONS, NAMES, checked
from srigl_fx.runtime.cpu.kernels import activations as kernels
from srigl_fx.runtime.dense import function_of

RELU6, SIGMOID = (row for row in ACTIVATIONS if row.name in ("relu6", "sigmoid"))
# Lowers layers before hardtanh with the new row's limits and with others, and exports them for a stock host.
PROGRAM = """
import sys, numpy as np, onnxruntime, torch, srigl_fx as sx
from torch import nn
from srigl_fx.passes.condensed_nodes import condensed_nodes
from srigl_fx.passes.program import arguments
layers = [nn.Linear(40, 33), nn.Hardtanh(), nn.Linear(33, 33), nn.Hardtanh(0.0, 6.0), nn.Linear(33, 33)]
layers += [nn.Hardtanh(-2.0, 3.0), nn.Linear(33, 20), nn.Hardtanh()]
model = sx.sparsify(nn.Sequential(*layers), sparsity=0.8, distribution="uniform").eval()
with torch.no_grad():
    for layer in layers[::2]:
        layer.weight *= 9
x = 3 * torch.randn(50, 40)
lowered = sx.lower(model, (x,), min_speedup=0)
print([arguments(node)["activation"] for node in condensed_nodes(lowered.graph)])
for batch in (1, 3, 50):
    torch.testing.assert_close(lowered(x[:batch]), model(x[:batch]), rtol=1e-5, atol=2e-5)
sx.export_onnx(model, sys.argv[1], (x,), min_speedup=0, verify=False)
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
(y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-5, atol=2e-5)
print((abs(y) == 1).any(), (abs(y) < 1).any())
"""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "relu 6"}, "name and suffix must be of letters"),
        ({"suffix": ""}, "name and suffix must be of letters"),
        ({"aten": ""}, "aten must name an ATen operator"),
        ({"limits": (6.0, 0.0)}, "limits must be the least and the greatest"),
        ({"limits": (math.nan, 0.0)}, "limits must be the least and the greatest"),
        ({"onnx": ""}, "nodes from {x} to {y}"),
        ({"onnx": "{y} = Relu (x)"}, "nodes from {x} to {y}"),
        ({"onnx": "y = Relu ({x})"}, "nodes from {x} to {y}"),
        ({"onnx": "{y} = Relu ({z})"}, "onnx must have {x}, {y}"),
        ({"onnx": "low = Constant <value: tensor = float {0.0}> ()\n{y} = Max ({x}, low)"}, "{{ and }}"),
    ],
)
def test_a_malformed_row_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SriglError, match=f"the activation '.*{re.escape(words)}"):
        replace(RELU6, **changes)


@pytest.mark.parametrize("what", ["name", "suffix"])
def test_two_rows_of_one_name_are_refused(what: str) -> None:
    other = replace(RELU6, **{"name": "other", "suffix": "Other", what: getattr(SIGMOID, what)})
    with pytest.raises(SriglError, match=f"two activations have the {what} '{getattr(SIGMOID, what)}'"):
        checked((*ACTIVATIONS, other))


@pytest.mark.parametrize(
    ("aten", "settings", "words"),
    [
        ("softsign", {}, "'softsign' is no ATen operator of one tensor"),
        ("Hardtanh", {}, "is no ATen operator of one tensor"),
        ("softmax", {"dim": 1}, "is no ATen operator of one tensor"),  # torch calls it with integers alone
        ("hardtanh", {}, "settings must say min_val, max_val of aten.hardtanh"),
        ("hardtanh", {"max_val": 1.0}, "settings must say min_val of aten.hardtanh"),
        ("gelu", {}, "settings must say approximate"),
        ("add", {}, "is no ATen operator of one tensor"),
        ("relu", {"inplace": False}, "aten.relu takes ['self'], not inplace"),
    ],
)
def test_a_row_that_is_no_operator_of_torch_is_refused(aten: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SriglError, match=f"the activation 'relu6': .*{re.escape(words)}"):
        function_of(replace(RELU6, aten=aten, settings=settings))


@pytest.mark.parametrize("limits", [(-1.0, 1.0), (0.5, math.inf), (-math.inf, -0.25), (0.0, 6.0)])
def test_limits_need_no_function(limits: tuple[float, float]) -> None:
    limit = kernels.function_of(replace(RELU6, name="nowhere", limits=limits))
    low, high = map(np.float32, limits)
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, *limits, 1e-40, 3e38]
    for x in [*special, *np.random.default_rng(0).standard_normal(100)]:
        np.testing.assert_array_equal(limit(np.float32(x)), np.clip(np.float32(x), low, high))


def test_without_limits_a_function_is_needed() -> None:
    with pytest.raises(SriglError, match=r"'nowhere' has no limits, and .*activations no function of that name"):
        kernels.function_of(replace(SIGMOID, name="nowhere"))


def test_functions_of_torch_have_the_settings_of_their_row() -> None:
    row = replace(RELU6, aten="elu", settings={"alpha": 2.0, "scale": 3.0, "input_scale": 0.5})
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 3 * torch.where(x > 0, x, 2 * torch.expm1(0.5 * x))
    torch.testing.assert_close(function_of(row)(x), expected)


def _row_of_the_page(checkout: Path) -> str:
    """The row of hardtanh, as docs/adding-a-kernel.md writes it."""
    page = (checkout / "docs" / "adding-a-kernel.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if 'name="hardtanh"' in code]
    (row,) = [node.value for node in ast.parse(block).body if isinstance(node, ast.Assign)]
    return ast.unparse(row)


@pytest.mark.long
def test_a_row_with_limits_is_all_that_an_activation_takes(checkout: Path, tmp_path: Path) -> None:
    """In a copy of the sources, to whose table the page's row is added and nothing else."""
    copy = tmp_path / "copy"
    for folder in ("srigl_fx", "passes", "runtime"):
        shutil.copytree(checkout / folder, copy / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    table = copy / "runtime" / "activations.py"
    source = table.read_text(encoding="utf-8")
    assert "hardtanh" not in NAMES
    added = source.replace("\n)\nNAMES", f"\n    {_row_of_the_page(checkout)},\n)\nNAMES")
    assert added != source
    table.write_text(added, encoding="utf-8")
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "model.onnx")]
    environment = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "SRIGL_FX_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['hardtanh', 'relu6', 'none', 'hardtanh']", "True True"]
