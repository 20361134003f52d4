"""``adopt`` and ``condense_onnx`` on models of pruning libraries: torch, and those of the extra ``pruning``."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn
from torch.nn.utils import prune as untyped_prune

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.runtime import load

pytestmark = pytest.mark.long  # each lowers and exports a network
prune: Any = untyped_prune  # its functions are not annotated


class Network(nn.Module):
    """A residual block, whose additions tie channels to each other, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.two(torch.relu(self.one(x)))))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> Network:
    model = Network()
    randomise(model)
    return model.eval()


def assert_served(model: nn.Module, folder: Path, layers: int) -> None:
    """Adopted and lowered, in a file of ours, and from a plain file of PyTorch's exporter: all give the same."""
    expected = model(X).detach()
    plain = folder / "plain.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is an old one, as such files are
        torch.onnx.export(model, (X,), plain, dynamo=False, opset_version=13, input_names=["x"])
    report = sx.condense_onnx(plain, folder / "condensed.onnx", min_speedup=0)
    assert report.condensed_layers == layers
    sx.adopt(model)
    lowered = sx.lower(model, (X,), min_speedup=0)
    assert [one.decision for one in lowered.report.layers] == ["condensed"] * layers
    torch.testing.assert_close(lowered(X), expected, rtol=1e-4, atol=1e-4)
    sx.export_onnx(model, folder / "adopted.onnx", (X,), min_speedup=0)
    for path in (folder / "adopted.onnx", folder / "condensed.onnx"):
        session = load(path)
        (got,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_torch_prunes_as_a_whole() -> None:
    """Layers have as many weights as are large, over the whole model; masks are still attached when it is adopted."""
    model = network()
    layers = [(module, "weight") for module in (model.stem, model.one, model.two)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.9)
    kept = {name: getattr(model, name).weight_mask.bool() for name in ("stem", "one", "two")}
    sx.adopt(model)
    for name, mask in kept.items():
        assert torch.equal(getattr(model, name).weight_mask, mask & (getattr(model, name).weight != 0))


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured", "ln_structured"])
def test_methods_of_torch(tmp_path: Path, method: str) -> None:
    model = network()
    more = {"n": 2, "dim": 0} if method == "ln_structured" else {}
    for module in (model.one, model.two):
        getattr(prune, method)(module, "weight", amount=0.75, **more)
        prune.remove(module, "weight")
    assert_served(model, tmp_path, 2)


def test_torch_pruning_leaves_a_smaller_model_that_can_be_pruned_on(tmp_path: Path) -> None:
    """It removes whole channels, so that nothing is left to adopt; what is pruned on behind it is."""
    pruning = pytest.importorskip("torch_pruning")
    model = network()
    pruning.pruner.MetaPruner(
        model,
        X,
        importance=pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.head],
    ).step()
    assert model.one.weight.shape[:2] == (16, 16)
    with pytest.raises(SparsifyError, match=r"stem\.weight: nothing of it is zero"):
        sx.adopt(model)
    for module in (model.one, model.two):
        prune.l1_unstructured(module, "weight", amount=0.8)
        prune.remove(module, "weight")
    assert_served(model, tmp_path, 2)
