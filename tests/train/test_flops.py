import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_support import SmallNet

from srigl_fx import sparsify
from srigl_fx.errors import TrainerError
from srigl_fx.masks.distributions import erk
from srigl_fx.train.flops import (
    Formula,
    LayerCost,
    inference_flops,
    layer_costs,
    measured_densities,
    training_flops,
)

# Published for ResNet-50 on ImageNet, 100 epochs: FLOPs of inference and their ratio, of training and their ratio.
PUBLISHED = {
    0.0: (8.189e9, "1", 3.148e18, "1"),
    0.75: (3.904e9, ".477", 1.516e18, ".482"),
    0.8: (3.395e9, ".415", 1.320e18, ".419"),
    0.9: (1.989e9, ".243", 7.774e17, ".247"),
    0.9375: (1.255e9, ".153", 4.943e17, ".157"),
    0.95: (1.006e9, ".123", 3.984e17, ".127"),
    0.99: (2.101e8, ".0257", 9.14e16, ".0290"),
}
# The same runs by the formula of the RigL paper, to three digits.
BY_RIGL = {0.75: ".478", 0.8: ".416", 0.9: ".245", 0.9375: ".156", 0.95: ".126", 0.99: ".0289"}


def _agree(value: float, printed: str) -> bool:
    return value == pytest.approx(float(printed), abs=0.5 * 10.0 ** -len(printed.partition(".")[2]))


@pytest.fixture
def example(checkout: Path) -> dict[str, Any]:
    return runpy.run_path(str(checkout / "examples" / "flops_resnet50.py"))


@pytest.mark.parametrize("sparsity", PUBLISHED)
def test_resnet50_from_shapes_alone(sparsity: float, example: dict[str, Any]) -> None:
    shapes, positions = example["resnet50"]()
    layers = {name: LayerCost.of(shape, positions[name]) for name, shape in shapes.items()}
    dense, sparse = inference_flops(layers), inference_flops(layers, erk(shapes, sparsity))
    inference, inference_ratio, training, training_ratio = PUBLISHED[sparsity]
    assert sparse == pytest.approx(inference, rel=3e-4)
    assert _agree(sparse / dense, inference_ratio)

    def ratio(formula: Formula) -> float:
        if not sparsity:
            return training_flops("dense", dense=dense, sparse=sparse) / (3 * dense)
        return training_flops("srigl", dense=dense, sparse=sparse, formula=formula) / (3 * dense)

    assert ratio("srigl_table") * 3 * dense * 1_281_167 * 100 == pytest.approx(training, rel=5e-4)
    assert _agree(ratio("srigl_table"), training_ratio)
    if sparsity:
        assert ratio("rigl_paper") == pytest.approx(float(BY_RIGL[sparsity]), rel=2e-3)
        assert ratio("rigl_paper") < ratio("srigl_table")


def test_the_table_on_the_page_is_the_one_that_is_printed(
    checkout: Path, example: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    example["main"]()
    page = (checkout / "docs" / "flops.md").read_text(encoding="utf-8")
    assert f"```text\n{capsys.readouterr().out}```" in page


def test_every_product_sum_bias_and_activation() -> None:
    """A 2 -> 3 convolution of 1 x 1 at 5 positions: per output 2 products, 1 sum, 1 bias, 1 activation."""
    assert LayerCost.of((3, 2, 1, 1), positions=5).flops() == 3 * 5 * (2 + 1 + 1 + 1)
    assert LayerCost.of((3, 2), positions=5).flops() == 3 * 5 * (2 + 1 + 1)
    assert LayerCost(products=6, outputs=3, bias=False).flops() == 3 * (2 + 1)
    assert LayerCost.of((4, 10)).flops(0.5) == 4 * (5 + 4 + 1)


def test_training_formulas() -> None:
    assert training_flops("dense", dense=10, sparse=2) == 30
    assert training_flops("static", dense=10, sparse=2) == training_flops("set", dense=10, sparse=2) == 6
    assert training_flops("snfs", dense=10, sparse=2) == 14
    assert training_flops("rigl", dense=10, sparse=2, update_every=1) == (6 + 4 + 10) / 2
    assert training_flops("srigl", dense=10, sparse=2, update_every=1, formula="srigl_table") == (6 + 8 + 10) / 2


def test_gradual_pruning_is_summed_over_its_schedule() -> None:
    """Updates at 4 and 8 of 16 steps: 1 - (1 - 4/8)**3 = 7/8 of the way, then all of it."""
    expected = 3 * (4 * 10.0 + 4 * (10.0 - 8.0 * 7 / 8) + 8 * 2.0) / 16
    assert training_flops("gmp", dense=10.0, sparse=2.0, update_every=4, total_steps=16) == pytest.approx(expected)


def test_the_sum_over_gradual_pruning_is_that_of_its_masks() -> None:
    from srigl_fx.train import GMP

    model = sparsify(nn.Sequential(nn.Linear(100, 10, bias=False)), sparsity=0.9, mask_init="dense")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    GMP(model, optimizer, total_steps=40, update_every=3)
    costs, total = layer_costs(model, (torch.ones(1, 100),)), 0.0
    for _ in range(40):
        total += 3 * inference_flops(costs, measured_densities(model))
        optimizer.zero_grad()
        model(torch.randn(4, 100)).square().sum().backward()
        optimizer.step()
    dense, sparse = inference_flops(costs), inference_flops(costs, measured_densities(model))
    expected = training_flops("gmp", dense=dense, sparse=sparse, total_steps=40, update_every=3)
    assert total / 40 == pytest.approx(expected, rel=0.02)  # fan-ins are whole numbers


class Functional(nn.Module):
    """Weights in plain functions, one of them used twice, on a sequence of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.tied = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 6))
        self.experts = nn.Parameter(torch.randn(2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.tied).relu()
        hidden = F.linear(torch.einsum("btf,fg->btg", x, self.tied), self.first)
        return torch.einsum("bti,eio->beto", hidden, self.experts)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_functions_and_weights_used_twice(device: str) -> None:
    with torch.device(device):
        costs = layer_costs(Functional(), (torch.ones(3, 5, 6),))
    assert costs["first"] == LayerCost.of((8, 6), positions=5)
    assert (costs["tied"].products, costs["tied"].outputs) == (2 * 5 * 36, 2 * 5 * 6)
    assert (costs["experts"].products, costs["experts"].outputs) == (5 * 64, 5 * 8)


def test_all_kinds_of_layer() -> None:
    model = SmallNet().train()
    statistics = model.norm.running_mean.clone() if model.norm.running_mean is not None else None
    costs = layer_costs(model, (torch.randn(2, 3, 4, 4),))
    tokens = 8 * 8 * 8 // 32
    assert costs["conv.weight"] == LayerCost.of((16, 3, 3, 3), positions=16)
    assert costs["grouped.weight"] == LayerCost.of((16, 8, 3, 3), positions=16)
    assert (costs["up.weight"].products, costs["up.weight"].outputs) == (16 * 16 * 8 * 4, 8 * 64)
    assert costs["attention.in_proj_weight"] == LayerCost.of((96, 32), positions=tokens)
    assert costs["attention.out_proj.weight"] == LayerCost.of((32, 32), positions=tokens)
    assert costs["mlp.0.weight"] == LayerCost.of((160, 32), positions=tokens)
    assert costs["head.weight"] == LayerCost.of((4, 32))
    assert statistics is not None
    assert model.norm.running_mean is not None
    assert torch.equal(model.norm.running_mean, statistics)


def test_autocast_copies_are_recognised() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        costs = layer_costs(model, (torch.randn(3, 6),))
    assert costs == layer_costs(model, (torch.randn(3, 6),))


def test_attention_outside_training() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    costs = layer_costs(layer, (torch.randn(2, 5, 16),))
    assert costs["self_attn.in_proj_weight"] == LayerCost.of((48, 16), positions=5)
    assert costs["linear2.weight"] == LayerCost.of((16, 24), positions=5)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_sparsified_model_by_distribution_and_by_its_masks() -> None:
    model = SmallNet()
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.ndim > 1}
    sparsify(model, sparsity=0.8, rules={"head": None})
    costs = layer_costs(model, (torch.randn(1, 3, 4, 4),))
    assert costs == layer_costs(SmallNet(), (torch.randn(1, 3, 4, 4),))
    measured = measured_densities(model)
    assert "head.weight" not in measured
    planned = erk(shapes, 0.8, dense=["head.weight"])
    # Whole fan-ins take a little off the densities of the distribution, never add to them.
    assert 0.9 * inference_flops(costs, planned) < inference_flops(costs, measured) <= inference_flops(costs, planned)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerCost.of((3,)), r"shape \(3,\)"),
        (lambda: LayerCost.of((3, 2), positions=0), "at 0 positions"),
        (lambda: LayerCost.of((3, 2)).flops(1.5), "density is 1.5"),
        (lambda: inference_flops({}, {"a": 0.5}), "unknown: a"),
        (lambda: training_flops("static", dense=1, sparse=2), "sparse is 2 and dense 1"),
        (lambda: training_flops("static", dense=2, sparse=1, update_every=0), "update_every"),
        (lambda: training_flops("adam", dense=2, sparse=1), "method is 'adam'"),  # type: ignore[arg-type]
        (lambda: training_flops("rigl", dense=2, sparse=1, formula="x"), "formula is 'x'"),  # type: ignore[arg-type]
        (lambda: training_flops("gmp", dense=2, sparse=1), "give total_steps"),
        (lambda: training_flops("gmp", dense=2, sparse=1, total_steps=100), "lower update_every"),
        (lambda: layer_costs(nn.Linear(2, 2), (3,)), "no tensor"),
    ],
)
def test_wrong_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TrainerError, match=message):
        call()
