"""The operators with epilogues, layouts and 16-bit values in files, as the operator library runs them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from export_support import CASES, MODULES, captured, inputs_for, network

import srigl_fx as sx
from srigl_fx.onnx_export.model import build_model, functions_for
from srigl_fx.passes.sizes import Sizes
from srigl_fx.runtime.ort import abi

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def by_library(model: bytes | str, save_to: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(save_to)
    sx.runtime.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.long
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_every_operator(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """The file without fallback functions, and with them: ONNX Runtime must take the library's operators then, too."""
    make, shape = MODULES[name]
    module = make(dtype)
    inputs = inputs_for(module, shape, 3)
    model = build_model(captured(module, inputs), inputs, {}, Sizes.of_batch((True,) * len(inputs)))
    ours = {node.op_type for node in model.graph.node if node.domain == abi.DOMAIN}
    for functions in (False, True):
        if functions:
            model.functions.extend(functions_for(model))
        session = by_library(model.SerializeToString(), tmp_path / "optimized.onnx")
        names = [item.name for item in session.get_inputs()]
        for batch in (1, 3, 17, 70):
            given = inputs_for(module, shape, batch)
            got = session.run(None, dict(zip(names, (tensor.numpy() for tensor in given), strict=True)))
            for one, other in zip(got, module(*given), strict=True):
                np.testing.assert_allclose(one, other.numpy(), rtol=1e-5, atol=2e-5)
        nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
        assert {node.op_type for node in nodes if node.domain == abi.DOMAIN} == ours


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 4)
    report = sx.export_onnx(network(), tmp_path / "model.onnx", (x,), value_dtype=dtype, min_speedup=0)
    assert report.library_error is not None
    assert report.library_error < 1e-4
    assert report.fallback_error is not None
    assert report.fallback_error < 1e-4
