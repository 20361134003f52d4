"""Models whose neurons share their inputs, lowered, saved and exported: indices are stored once a group."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from lowering_support import randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx import onnx_tools, runtime
from srigl_fx.lowering.file import condensed_weights
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.lowering.pipeline import lower
from srigl_fx.masks.records import sparse_weights
from srigl_fx.onnx_export.file import inspect_file
from srigl_fx.passes.condensed_nodes import settled_padding
from srigl_fx.runtime.format import CondensedWeight, is_padding


class Net(nn.Module):
    """A convolution, one in groups, and two linear layers; the rows of some are no multiple of four."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 3, padding=1)
        self.grouped = nn.Conv2d(24, 36, 3, groups=2)
        self.hidden = nn.Linear(36, 50)
        self.head = nn.Linear(50, 23)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.grouped(torch.relu(self.conv(x)))).mean((2, 3))
        y = self.head(torch.relu(self.hidden(y)))
        assert isinstance(y, Tensor)
        return y


# Of each weight its rows and their groups: of four, within a group of a convolution.
ROWS = {"conv": (24, 6), "grouped": (36, 10), "hidden": (50, 13), "head": (23, 6)}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = sx.sparsify(
        Net(),
        sparsity=0.7,
        distribution="uniform",
        mask_init="random",
        group_size=4,
        rules={"head": sx.LayerSpec(sparsity=0.3)},  # so that each hidden neuron is read: others would leave the graph
    )
    randomise(net)
    with torch.no_grad():
        for handle in sparse_weights(net):
            handle.weight.mul_(handle.mask)
    return net.eval()


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def weights_of(lowered: nn.Module) -> dict[str, CondensedWeight]:
    """By the module that it was the weight of."""
    assert isinstance(lowered, LoweredModule)
    return {
        str(node.all_input_nodes[1].target).split(".")[0].split("_")[0]: weight
        for node, weight in condensed_weights(lowered)
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_indices_are_stored_once_a_group(model: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    lowered = lower(model, (image(),), min_speedup=0, value_dtype=dtype)
    weights = weights_of(lowered)
    for name, (rows, groups) in ROWS.items():
        assert weights[name].indices.shape == (groups, weights[name].k), name
        assert weights[name].active.shape == (2, rows), name
    stored = {layer.fqn.split(".")[0]: layer.bytes_after for layer in lowered.report.layers}
    assert stored == {name: weight.nbytes - weight.bias.nbytes for name, weight in weights.items()}
    x = image(5)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(lowered(x), model(x), rtol=tolerance, atol=tolerance)
    path = tmp_path / "model.srigl"
    lowered.save(path)
    again = load_lowered(path)
    assert torch.equal(again(x), lowered(x))
    assert [weight.active.tolist() for weight in weights_of(again).values()] == [
        weight.active.tolist() for weight in weights.values()
    ]


@pytest.mark.slow
def test_ablated_neurons_leave_the_others_together(model: nn.Module) -> None:
    handle = next(handle for handle in sparse_weights(model) if handle.fqn == "head.weight")
    with torch.no_grad():
        handle.mask[[1, *range(8, 12)]] = False
        handle.weight.mul_(handle.mask)
    lowered = lower(model, (image(),), min_speedup=0)
    weight = weights_of(lowered)["head"]
    rows = [row for row in range(23) if row != 1 and not 8 <= row < 12]
    assert weight.active.tolist() == [rows, [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 3]
    x = image(5)
    torch.testing.assert_close(lowered(x), model(x))


@pytest.mark.slow
def test_gradients_of_a_lowered_model(model: nn.Module) -> None:
    lowered, x = lower(model, (image(),), min_speedup=0), image(5)
    grads = []
    for module in (lowered, model):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_padding_that_rows_share_is_settled() -> None:
    """What an optimizer that looks at whole matrices leaves in it."""
    mask = torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = mask[::4].repeat_interleave(4, 0)
    weight = CondensedWeight.from_dense(torch.randn(24, 40).numpy(), mask.numpy(), pad=True)
    values = torch.from_numpy(weight.values)
    values[values == 0] = 5.0
    root, graph = nn.Module(), fx.Graph()
    x = graph.placeholder("x")
    for name in ("values", "indices", "active", "bias"):
        root.register_buffer(name, torch.from_numpy(getattr(weight, name)))
    parts = [graph.get_attr(name) for name in ("values", "indices", "active", "bias")]
    graph.output(graph.call_function(torch.ops.srigl_fx.condensed_linear.default, (x, *parts, 40)))
    ((_, settled),) = settled_padding(fx.GraphModule(root, graph))
    padding = torch.from_numpy(is_padding(weight.row_indices))
    assert padding.any()
    assert torch.equal(settled, values.masked_fill(padding, 0))


@pytest.mark.long
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_exported(model: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    """By the library and by the fallback, which the export compares with the model, and as a dense file."""
    path, dense = tmp_path / "model.onnx", tmp_path / "dense.onnx"
    report = sx.export_onnx(model, path, (image(),), min_speedup=0, value_dtype=dtype)
    assert report.library_error is not None
    assert report.fallback_error is not None
    fan_ins = {node.name.split(".")[0].split("_")[0]: node.active_neurons for node in inspect_file(path).nodes}
    assert fan_ins == {name: rows for name, (rows, _) in ROWS.items()}
    rows = {
        tensor.name.split(".")[0].split("_")[0]: tuple(tensor.dims)
        for tensor in onnx.load(path).graph.initializer
        if tensor.name.endswith("_active")
    }
    assert rows == {name: (2, rows) for name, (rows, _) in ROWS.items()}
    x = image(5).numpy()
    (y,) = runtime.load(path).run(None, {"x": x})
    onnx_tools.densify(path, dense)
    (other,) = runtime.load(dense).run(None, {"x": x})
    np.testing.assert_allclose(y, other, rtol=0.1, atol=0.05 if dtype is torch.int8 else 1e-4)
