"""Hosts of JavaScript, which cannot be given an operator library: they run the fallback that is in the file.

``make node-test`` installs both packages with npm and names their folder.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import nn

import srigl_fx as sx

FOLDER = os.environ.get("SRIGL_FX_NODE_MODULES")
NODE = shutil.which("node")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(FOLDER is None, reason="SRIGL_FX_NODE_MODULES names no folder: make node-test"),
    pytest.mark.skipif(NODE is None, reason="no Node.js"),
]

SERVE = """
import { createRequire } from 'module';
import fs from 'fs';
const [folder, host, file, shape, data] = process.argv.slice(2);
const ort = createRequire(folder + '/')(host);
const provider = host.endsWith('node') ? 'cpu' : 'wasm';
const bytes = new Uint8Array(fs.readFileSync(file));
const session = await ort.InferenceSession.create(bytes, { executionProviders: [provider] });
const raw = fs.readFileSync(data);
const x = new Float32Array(raw.buffer, raw.byteOffset, raw.length / 4);
const feeds = { [session.inputNames[0]]: new ort.Tensor('float32', x, shape.split('x').map(Number)) };
const y = (await session.run(feeds))[session.outputNames[0]];
console.log(JSON.stringify({ dims: y.dims, data: Array.from(y.data) }));
process.exit(0);
"""


class Network(nn.Module):
    """Each kind of condensed operator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fc1, self.fc2 = nn.Linear(128, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(nn.functional.relu(self.conv(x))).flatten(1)
        x = nn.functional.gelu(self.fc1(x))
        return x + nn.functional.silu(self.fc2(x))


@pytest.mark.parametrize("host", ["onnxruntime-node", "onnxruntime-web"])
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_the_fallback_runs(tmp_path: Path, host: str, value_dtype: torch.dtype) -> None:
    model = Network()
    randomise(model)
    for layer in model.children():
        mask_by_hand(layer, 0.25)
    x = torch.randn(3, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"min_speedup": 0, "value_dtype": value_dtype}
    report = sx.export_onnx(model.eval(), tmp_path / "a.onnx", (x[:2],), **options)
    assert report.condensed_layers == 4
    with torch.no_grad():
        expected = sx.lower(model, (x[:2],), **options)(x).numpy()
    x.numpy().tofile(tmp_path / "x.bin")
    (tmp_path / "serve.mjs").write_text(SERVE)
    command = [NODE, tmp_path / "serve.mjs", FOLDER, host, report.path, "3x3x2x2", tmp_path / "x.bin"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    got = np.array(found["data"], np.float32).reshape(found["dims"])
    assert got.shape == expected.shape
    allowed = 1e-2 if value_dtype == torch.int8 else 1e-4  # a sum next to the border between two steps may round apart
    assert np.abs(got - expected).max() <= allowed * np.abs(expected).max()
