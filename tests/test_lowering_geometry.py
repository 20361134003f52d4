"""Convolutions of any geometry through ``lower`` and through the exported file, against PyTorch's own in float64."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from geometry_support import Layer, layers, shifting
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.lowering.lowered import LoweredModule

# An example takes a second or more: what fails is shown as it was drawn.
QUIET: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],
}


class Layers(nn.Module):
    """Each layer on an input of its own: many geometries in one graph."""

    def __init__(self, drawn: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.make() for layer in drawn)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def masked(drawn: Sequence[Layer], density: float, ablated: int, seed: int) -> nn.Module:
    model = randomise(Layers(drawn), seed)
    rows = {f"layers.{i}.weight": layer.groups * layer.filters for i, layer in enumerate(drawn)}
    dead = {name: min(ablated, n - 1) for name, n in rows.items()}
    return mask_by_hand(model, density, ablated=dead, seed=seed).eval()


def compare(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def lowered(
    drawn: Sequence[Layer], density: float, ablated: int, seed: int
) -> tuple[LoweredModule, tuple[Tensor, ...], list[Tensor]]:
    """The layers lowered, their inputs, and what PyTorch makes of those; compared with each other already."""
    torch.manual_seed(seed)
    model = masked(drawn, density, ablated, seed)
    inputs = tuple(layer.input(2) for layer in drawn)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        result = sx.lower(model, inputs, min_speedup=0, verify=False)
        compare(result(*inputs), expected)
    assert isinstance(result, LoweredModule)
    assert {layer.decision for layer in result.report.layers} == {"condensed"}
    return result, inputs, expected


def exported(folder: Path, result: LoweredModule, inputs: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Write the file, and compare what it gives with and without the library."""
    path = folder / "model.onnx"
    sx.export_onnx(result, path, tuple(inputs), verify=False, min_speedup=0)
    feeds = [x.numpy() for x in inputs]
    for session in (sx.runtime.load(path), onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])):
        names = [entry.name for entry in session.get_inputs()]
        got: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = session.run(
            None, dict(zip(names, feeds, strict=True))
        )
        compare([torch.from_numpy(y) for y in got], expected)


@pytest.mark.long  # opens the file with the library
def test_a_transposed_convolution_that_keeps_the_size_is_not_taken_for_a_pointwise_one(tmp_path: Path) -> None:
    drawn = [shifting(9), shifting(16, filters=16), shifting(4, rank=2, filters=17), shifting(5, rank=3, padding=2)]
    exported(tmp_path, *lowered(drawn, 0.5, 1, 0))


SEVERAL = st.lists(layers(), min_size=4, max_size=8)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=4, **QUIET)
@given(SEVERAL, st.floats(0.1, 1), st.integers(0, 3), st.integers(0, 99))
def test_lowered(drawn: list[Layer], density: float, ablated: int, seed: int) -> None:
    lowered(drawn, density, ablated, seed)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=10, **QUIET)
@given(SEVERAL, st.floats(0.1, 1), st.integers(0, 3), st.integers(0, 99))
def test_exported(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Layer], density: float, ablated: int, seed: int
) -> None:
    exported(tmp_path_factory.mktemp("file"), *lowered(drawn, density, ablated, seed))
