"""Models that something else made sparse: ``adopt``."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn
from torch.nn.utils import prune as untyped_prune

import srigl_fx as sx
from srigl_fx.errors import SparsifyError
from srigl_fx.masks.records import sparse_weights

prune: Any = untyped_prune  # its functions are not annotated


def perceptron() -> Any:
    return randomise(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40), nn.GELU(), nn.Linear(40, 6)))


def convolutions() -> Any:
    body = (nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2))
    return randomise(nn.Sequential(*body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 5)))


@torch.no_grad()
def cut(weight: Tensor, keep: Callable[[Tensor], Tensor]) -> None:
    """Zero what a boolean mask of the magnitudes (n, F) does not keep."""
    matrix = weight.reshape(weight.shape[0], -1)
    matrix *= keep(matrix.abs())


def largest_of_each_row(magnitudes: Tensor, density: float = 0.1) -> Tensor:
    """As Wanda leaves a weight: equally many in each row."""
    k = max(1, int(density * magnitudes.shape[1]))
    return torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, magnitudes.topk(k, dim=1).indices, True)


def two_of_four(magnitudes: Tensor) -> Tensor:
    fours = magnitudes.reshape(magnitudes.shape[0], -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(2, fours.topk(2, dim=2).indices, True)
    return kept.reshape(magnitudes.shape)


def largest_of_all(magnitudes: Tensor, density: float = 0.1) -> Tensor:
    return magnitudes >= magnitudes.flatten().sort(descending=True).values[int(density * magnitudes.numel())]


@pytest.mark.parametrize(
    ("keep", "structure"),
    [(largest_of_each_row, "constant_fan_in"), (two_of_four, "constant_fan_in"), (largest_of_all, "unstructured")],
)
def test_the_masks_are_the_zeros(keep: Callable[[Tensor], Tensor], structure: str) -> None:
    model = perceptron()
    for layer in (model[0], model[2]):
        cut(layer.weight, keep)
    before, names = copy.deepcopy(model), dict(model.named_parameters())
    assert sx.adopt(model) is model
    assert [handle.fqn for handle in sparse_weights(model)] == ["0.weight", "2.weight"]
    for handle in sparse_weights(model):
        assert handle.record.structure == structure
        assert torch.equal(handle.mask, before.get_parameter(handle.fqn) != 0)
        assert handle.record.budgets == (int(handle.mask.sum()),)
    assert all(names[name] is parameter for name, parameter in model.named_parameters())
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    sx.verify(model)
    assert "4.weight" in str(sx.summary(model))
    assert "nothing of it is zero, and min_sparsity is 50%" in str(sx.summary(model))


def test_rows_without_weights_are_ablated_neurons_of_a_constant_fan_in() -> None:
    model = perceptron()
    cut(model[0].weight, lambda magnitudes: largest_of_each_row(magnitudes))
    with torch.no_grad():
        model[0].weight[5:9] = 0
    sx.adopt(model)
    (handle,) = sparse_weights(model)
    assert handle.record.structure == "constant_fan_in"
    (row,) = (row for row in sx.summary(model).rows if row.name == "0.weight")
    assert (row.active_neurons, row.neurons) == (60, 64)
    sx.verify(model)


def test_blocks_of_a_packed_projection_may_keep_different_numbers() -> None:
    model: Any = randomise(nn.MultiheadAttention(16, 2))
    with torch.no_grad():
        rows = [
            largest_of_each_row(model.in_proj_weight[16 * i : 16 * i + 16].abs(), 0.125 * (i + 1)) for i in range(3)
        ]
        model.in_proj_weight *= torch.cat(rows)
    sx.adopt(model)
    (handle,) = sparse_weights(model)
    assert handle.record.structure == "constant_fan_in"
    assert handle.record.budgets == (16 * 2, 16 * 4, 16 * 6)
    sx.verify(model)


def test_a_nan_is_kept() -> None:
    """So that it is seen, and not zeroed."""
    model: Any = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[:, :2] = 1.0
        model.weight[1, 5] = torch.nan
    sx.adopt(model)
    assert model.weight_mask.sum(dim=1).tolist() == [2, 3, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("build", [perceptron, convolutions])
@pytest.mark.parametrize("method", [prune.l1_unstructured, prune.random_unstructured], ids=["magnitude", "random"])
def test_a_model_of_torch_prune_is_lowered_as_it_is(build: Callable[[], Any], method: Any) -> None:
    model = build().eval()
    torch.manual_seed(0)
    for layer in list(model)[:-1]:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            method(layer, "weight", amount=0.9)
            prune.l1_unstructured(layer, "bias", amount=3)
    x = torch.randn(5, 48) if build is perceptron else torch.randn(5, 3, 9, 9)
    expected = model(x)
    adopted = sx.adopt(model)
    assert "weight_orig" not in dict(adopted[0].named_parameters())
    assert int((adopted[0].bias == 0).sum()) == 3
    assert torch.equal(adopted(x), expected)
    lowered = sx.lower(adopted, (x,), min_speedup=0)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed", "condensed"]
    torch.testing.assert_close(lowered(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("value_dtype", [torch.float32, torch.int8])
def test_a_few_long_rows_do_not_keep_a_weight_dense(value_dtype: torch.dtype, tmp_path: Path) -> None:
    """They become an operator of their own, in PyTorch and in a file."""
    model: Any = randomise(nn.Sequential(nn.Linear(1024, 256), nn.GELU(), nn.Linear(256, 6))).eval()
    with torch.no_grad():
        kept = torch.arange(1024) < torch.where(torch.arange(256) % 8 == 0, 1024, 16)[:, None]
        model[0].weight *= kept
    x = torch.randn(7, 1024)
    expected = model(x)
    sx.adopt(model)
    lowered = sx.lower(model, (x,), min_speedup=0, value_dtype=value_dtype)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed"]
    names = [name for name, _ in lowered.named_buffers() if name.endswith("_values")]
    assert len(names) == 2
    assert all("_group" in name for name in names)
    within: Any = {"rtol": 1e-4, "atol": 1e-4} if value_dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    torch.testing.assert_close(lowered(x), expected, **within)
    sx.export_onnx(model, tmp_path / "a.onnx", (x,), min_speedup=0, value_dtype=value_dtype)
    session = sx.runtime.load(tmp_path / "a.onnx")
    got = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(got, lowered(x), rtol=1e-4, atol=1e-4)


def test_what_torch_prune_masks_is_as_before_where_nothing_is_sparse() -> None:
    model = perceptron()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    prune.random_unstructured(model[0], "weight", amount=0.1)
    prune.l1_unstructured(model[2], "bias", amount=0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters, hooks = dict(model.named_parameters()), [dict(module._forward_pre_hooks) for module in model.modules()]
    x = torch.randn(3, 48)
    expected = model(x)
    with pytest.raises(SparsifyError, match=r"no weight of this Sequential is sparse already: 0.weight: 37.0% of it"):
        sx.adopt(model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(x), expected)
    with torch.no_grad():  # the hooks still mask what is trained
        model[0].weight_orig += 1
    assert int((model[0](x) != 0).sum()) > 0
    assert int((model[0].weight == 0).sum()) == int((model[0].weight_mask == 0).sum())


def test_the_threshold_is_what_is_asked_for() -> None:
    model = perceptron()
    cut(model[0].weight, lambda magnitudes: largest_of_each_row(magnitudes, 0.25))
    cut(model[2].weight, lambda magnitudes: largest_of_each_row(magnitudes, 0.125))
    sx.adopt(model, min_sparsity=0.8)
    assert [handle.fqn for handle in sparse_weights(model)] == ["2.weight"]
    dense = next(row for row in sx.summary(model).rows if row.name == "0.weight")
    assert dense.reason == "75.0% of it is zero, and min_sparsity is 80%"


def test_a_weight_of_zeros_alone_stays_dense() -> None:
    """Such as the second factor of an adapter, before it was trained."""
    model = perceptron()
    cut(model[0].weight, largest_of_each_row)
    nn.init.zeros_(model[4].weight)
    sx.adopt(model)
    assert [handle.fqn for handle in sparse_weights(model)] == ["0.weight"]
    assert next(row for row in sx.summary(model).rows if row.name == "4.weight").reason == "all of it is zero"


@pytest.mark.parametrize("value", [0, 1.0, -0.5, True, "half", None])
def test_a_threshold_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(SparsifyError, match=r"min_sparsity must lie between 0 and 1, such as 0\.5, got"):
        sx.adopt(perceptron(), min_sparsity=value)  # type: ignore[arg-type]


def test_what_cannot_be_adopted_is_refused() -> None:
    with pytest.raises(SparsifyError, match=r"adopt takes a torch\.nn\.Module, got Tensor"):
        sx.adopt(torch.ones(3))  # type: ignore[type-var]
    with pytest.raises(SparsifyError, match=r"has masks already \('0\.weight' has one\)"):
        sx.adopt(sx.sparsify(perceptron()))
    with pytest.raises(SparsifyError, match="it has no weight matrix"):
        sx.adopt(nn.Sequential(nn.ReLU()))


@pytest.mark.slow
def test_an_adopted_model_trains_and_keeps_its_zeros() -> None:
    model = perceptron()
    for layer in (model[0], model[2]):
        cut(layer.weight, largest_of_all)
    sx.adopt(model)
    masks = [handle.mask.clone() for handle in sparse_weights(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sx.Static(model, optimizer, total_steps=5)
    before = model[0].weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(16, 48)).square().mean().backward()
        optimizer.step()
    sx.verify(model, optimizer)
    assert all(torch.equal(handle.mask, mask) for handle, mask in zip(sparse_weights(model), masks, strict=True))
    assert not torch.equal(model[0].weight, before)


def test_its_recipe_makes_masks_of_the_same_sizes() -> None:
    model = perceptron()
    for layer in (model[0], model[2]):
        cut(layer.weight, largest_of_all)
    recipe = sx.recipe(sx.adopt(model))
    assert recipe is not None
    again = sx.sparsify(perceptron(), recipe=recipe)
    assert [int(handle.mask.sum()) for handle in sparse_weights(again)] == [
        int(handle.mask.sum()) for handle in sparse_weights(model)
    ]
