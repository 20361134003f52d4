"""Masks stay with their weights when torch takes transforms of them off again."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import (
    parametrizations,
    parametrize,
    remove_spectral_norm,
    remove_weight_norm,
    spectral_norm,
    weight_norm,
)

import srigl_fx as sx
from srigl_fx.errors import InvariantError
from srigl_fx.masks.records import sparse_weights

IN, OUT = 16, 24

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")


class Standardisation(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        centred: Tensor = w - w.mean(1, keepdim=True)
        return centred / w.std(1, keepdim=True)


class Doubled(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


def linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def conv() -> nn.Module:
    return nn.Conv1d(IN, OUT, 1)


def transposed() -> nn.Module:
    return nn.ConvTranspose1d(IN, OUT, 1)


def parametrised(layer: nn.Module, parametrization: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", parametrization)


def unparametrised(layer: nn.Module) -> nn.Module:
    return parametrize.remove_parametrizations(layer, "weight")


Change = Callable[[nn.Module], nn.Module]

# name -> (put the transform on, take it off)
TRANSFORMS: dict[str, tuple[Change, Change]] = {
    "old weight_norm": (weight_norm, remove_weight_norm),
    "old weight_norm over inputs": (lambda layer: weight_norm(layer, dim=1), remove_weight_norm),
    "old spectral_norm": (spectral_norm, remove_spectral_norm),
    "weight_norm": (parametrizations.weight_norm, unparametrised),
    "weight_norm of all": (lambda layer: parametrizations.weight_norm(layer, dim=None), unparametrised),  # type: ignore[arg-type]
    "spectral_norm": (parametrizations.spectral_norm, unparametrised),
    "weight_norm, then spectral_norm": (
        lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
        unparametrised,
    ),
    "standardisation": (lambda layer: parametrised(layer, Standardisation()), unparametrised),
}


def build(change: Change, make: Callable[[], nn.Module] = linear) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(change(make()), nn.Flatten(), nn.ReLU(), nn.Linear(OUT, 4))
    return sx.sparsify(layers, sparsity=0.7, distribution="uniform")


def batch(make: Callable[[], nn.Module] = linear, rows: int = 8) -> Tensor:
    return torch.randn(rows, IN) if make is linear else torch.randn(rows, IN, 1)


def train(model: nn.Module, make: Callable[[], nn.Module] = linear, steps: int = 6) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = sx.SRigL(model, optimizer, total_steps=20, update_every=2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch(make)).square().mean().backward()
        optimizer.step()
    assert trainer.last_update == steps
    sx.verify(model, optimizer)
    trainer.detach()


@pytest.mark.parametrize("make", [linear, conv, transposed])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_mask_is_that_of_the_weight_afterwards(name: str, make: Callable[[], nn.Module]) -> None:
    if name == "standardisation" and make is not linear:
        make = linear
    put_on, take_off = TRANSFORMS[name]
    model = build(put_on, make)
    train(model, make)
    model.eval()
    x, mask = batch(make), sparse_weights(model)[0].mask.clone()
    expected = model(x)
    take_off(model[0])

    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    handle = sparse_weights(model)[0]
    assert handle.fqn == handle.key == "0.weight"
    assert torch.equal(handle.mask, mask)
    assert set(model.state_dict()) == {"0.weight", "0.weight_mask", "0.bias", "3.weight", "3.weight_mask", "3.bias"}
    sx.verify(model)
    assert [row.status for row in sx.summary(model).rows] == ["masked (dense compute)"] * 2
    assert "fan_in=" in repr(model[0])
    twin = copy.deepcopy(model)
    if name != "old spectral_norm":  # torch forgets to remove its hook on loading, with or without masks
        twin.load_state_dict(model.state_dict())
        dense = torch.ones_like(handle.weight)
        twin.load_state_dict({"0.weight": dense}, strict=False)
        assert torch.equal(twin.get_parameter("0.weight"), dense * mask)
    train(model, make)
    model.eval()
    expected = model(x)
    sx.finalize(model)
    assert torch.equal(model(x), expected)
    assert type(model[0]) is type(make())
    assert not any("srigl" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("name", ["old weight_norm", "weight_norm", "spectral_norm"])
def test_neurons_without_weights_stay_without(name: str) -> None:
    put_on, take_off = TRANSFORMS[name]
    model = build(put_on)
    handle = sparse_weights(model)[0]
    with torch.no_grad():
        handle.mask[3] = False
        handle.weight.mul_(handle.mask)
    model.eval()
    expected = model(x := batch())
    take_off(model[0])
    assert not model.get_parameter("0.weight")[3].any()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_what_is_left_unparametrised_keeps_the_mask_too() -> None:
    model = build(TRANSFORMS["standardisation"][0])
    stored = model.get_parameter("0.parametrizations.weight.original")
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert model.get_parameter("0.weight") is stored
    sx.verify(model)
    assert [name for name, _ in sx.masks.named_masks(model)] == ["0.weight", "3.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["old weight_norm", "weight_norm"])
def test_a_vocoder_layer_is_lowered_after_its_norm_is_removed(name: str) -> None:
    put_on, take_off = TRANSFORMS[name]
    model = build(put_on, conv).eval()
    take_off(model[0])
    lowered = sx.lower(model, (batch(conv),), min_speedup=0)
    assert [layer.decision for layer in lowered.report.layers] == ["condensed"] * 2


@pytest.mark.parametrize("name", ["spectral_norm", "standardisation"])
def test_a_trainer_goes_on_with_a_parameter_that_stays(name: str) -> None:
    put_on, take_off = TRANSFORMS[name]
    model = build(put_on)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = sx.SRigL(model, optimizer, total_steps=20, update_every=2)
    for i in range(12):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()
        if i == 4:
            take_off(model[0])
            before = dict(sx.masks.named_masks(model))["0.weight"].clone()
        sx.verify(model, optimizer)
    assert trainer.last_update == 12
    assert not torch.equal(dict(sx.masks.named_masks(model))["0.weight"], before)


@pytest.mark.parametrize("name", ["old weight_norm", "old spectral_norm", "weight_norm"])
def test_a_trainer_that_is_attached_says_so_at_its_next_step(name: str) -> None:
    put_on, take_off = TRANSFORMS[name]
    model = build(put_on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = sx.Static(model, optimizer)
    take_off(model[0])
    model(batch()).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvariantError, match=r"that of '0\.weight' now.*anew"):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trainer.detach()
    train(model)


def test_the_transform_of_another_tensor_comes_and_goes() -> None:
    def with_bias(layer: nn.Module) -> nn.Module:
        return parametrize.register_parametrization(layer, "bias", Doubled())

    model = build(with_bias)
    parametrize.register_parametrization(model[3], "bias", Doubled())
    model.eval()
    expected = model(x := batch())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    sx.verify(twin)
    sx.finalize(twin)
    assert torch.equal(twin(x), expected)
    assert [type(twin[i]).__name__ for i in (0, 3)] == ["ParametrizedLinear"] * 2
    for i in (0, 3):
        parametrize.remove_parametrizations(model[i], "bias")
    assert [type(model[i]).__name__ for i in (0, 3)] == ["SparseLinear"] * 2
    assert torch.equal(model(x), expected)
    sx.verify(model)
    sx.finalize(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)


def test_a_transform_put_on_and_taken_off_leaves_a_sound_model() -> None:
    for name, (put_on, take_off) in TRANSFORMS.items():
        model = build(lambda layer: layer)
        put_on(model[0])
        with pytest.raises(InvariantError, match=r"0\.weight: .* was put on it after sparsify"):
            sx.verify(model)
        take_off(model[0])
        if name == "standardisation":  # fills pruned weights
            with pytest.raises(InvariantError, match=r"0\.weight: \d+ weights off the mask"):
                sx.verify(model)
            sx.masks.apply(model)
        sx.verify(model)
        train(model)
