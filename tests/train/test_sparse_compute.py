"""Training from the kept weights gives what masked dense training gives, and leaves everything visible as it is."""

import copy
import io
import pickle
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srigl_fx import GMP, RigL, SRigL, Static, sparsify, verify
from srigl_fx.errors import TrainerError
from srigl_fx.masks import named_masks
from srigl_fx.train.base import Trainer
from srigl_fx.train.sparse_compute import SparseCompute, compute_sparse

Make = Callable[[nn.Module, torch.optim.Optimizer], Trainer]
Optimize = Callable[[Any], torch.optim.Optimizer]


def mlp(structure: Any = "constant_fan_in") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 130), nn.ReLU(), nn.Linear(130, 90, bias=False), nn.GELU(), nn.Linear(90, 40))
    sparsify(model, sparsity=0.9, distribution="uniform", structure=structure)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model


class Block(nn.Module):
    """A transformer's MLP block, with its normalisation and a residual connection, and an attention before it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return y


def block() -> nn.Module:
    torch.manual_seed(0)
    return sparsify(Block(), sparsity=0.9, distribution="uniform")


def srigl(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
    return SRigL(model, optimizer, total_steps=20, update_every=3, drop_fraction=0.5, ablation=0.5, grad_samples=2)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, micro_batches: int = 1) -> Tensor:
    optimizer.zero_grad()
    for part in x.chunk(micro_batches):
        loss: Tensor = (model(part) - part.mean()).square().mean()
        loss.backward()
    optimizer.step()
    return loss.detach()


def assert_equal_training(
    make: Callable[[], nn.Module],
    optimize: Optimize,
    train: Make,
    shape: tuple[int, ...],
    *,
    micro_batches: int = 1,
    steps: int = 11,
) -> SparseCompute:
    """Train twice, densely and from the kept weights, and compare all that can be seen."""
    dense = make()
    sparse = copy.deepcopy(dense)
    optimizers = [optimize(dense.parameters()), optimize(sparse.parameters())]
    trainers = [train(model, optimizer) for model, optimizer in zip((dense, sparse), optimizers, strict=True)]
    computing = compute_sparse(trainers[1])
    masks = {name: mask.clone() for name, mask in named_masks(dense)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(shape, generator=generator)
        losses = [step(m, o, x, micro_batches) for m, o in zip((dense, sparse), optimizers, strict=True)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
        verify(sparse, optimizers[1])
        for (name, one), (_, other) in zip(dense.named_parameters(), sparse.named_parameters(), strict=True):
            assert torch.allclose(other, one, rtol=1e-4, atol=1e-5), name
            if not any(trainer.last_update == trainer.steps for trainer in trainers):
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)
    for name, mask in named_masks(dense):
        assert torch.equal(mask, dict(named_masks(sparse))[name]), name
    changed = [name for name, mask in named_masks(sparse) if not torch.equal(mask, masks[name])]
    assert bool(changed) == (trainers[0].last_update is not None)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            torch.testing.assert_close(states[1][index][name], value, rtol=1e-4, atol=1e-5)
    return computing


OPTIMIZERS: dict[str, Optimize] = {
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "plain SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, fused=True),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, eps=1e-3),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_masked_dense_training(name: str) -> None:
    computing = assert_equal_training(mlp, OPTIMIZERS[name], srigl, (96, 70))
    assert computing.layers == ["0.weight", "2.weight", "4.weight"]
    assert computing.steps_kept == (name != "Adafactor")


def test_equals_masked_dense_training_of_a_transformer_block() -> None:
    computing = assert_equal_training(block, OPTIMIZERS["AdamW"], srigl, (4, 25, 32))
    assert computing.layers == ["up.weight", "down.weight"]
    assert set(computing.dense) == {"attention.in_proj_weight", "attention.out_proj.weight"}


def test_equals_masked_dense_training_without_a_constant_fan_in() -> None:
    assert_equal_training(
        lambda: mlp("unstructured"),
        OPTIMIZERS["AdamW"],
        lambda model, optimizer: RigL(model, optimizer, total_steps=20, update_every=3),
        (96, 70),
    )


@pytest.mark.slow
def test_equals_masked_dense_training_with_fixed_masks_and_micro_batches() -> None:
    assert_equal_training(mlp, OPTIMIZERS["SGD with momentum"], Static, (200, 70), micro_batches=2)
    assert_equal_training(mlp, OPTIMIZERS["SGD with momentum"], srigl, (200, 70), micro_batches=2)


def test_equals_masked_dense_training_of_small_batches() -> None:
    assert_equal_training(mlp, OPTIMIZERS["SGD with momentum"], srigl, (3, 70))


@pytest.mark.parametrize(
    "optimize",
    [
        OPTIMIZERS["SGD with momentum"],
        lambda parameters: torch.optim.Adagrad(parameters, lr=1e-2, initial_accumulator_value=0.1, weight_decay=1e-3),
    ],
)
def test_equals_masked_dense_training_while_fewer_and_fewer_weights_are_kept(optimize: Optimize) -> None:
    """What the optimizer steps has room for more than is kept, and that room is given back."""

    def gmp(model: nn.Module, optimizer: torch.optim.Optimizer) -> Trainer:
        return GMP(model, optimizer, total_steps=16, update_every=2)

    computing = assert_equal_training(mlp, optimize, gmp, (96, 70), steps=20)
    for kept in computing._kept:
        count = int(kept.handle.mask.sum())
        assert len(kept.values) == count < len(kept.stepped) <= 2 * count
        assert not kept.stepped[count:].any()


def test_a_step_between_forward_and_backward_is_refused() -> None:
    """By torch, as for a dense layer: the values that the gradient of the input needs have been written to."""
    model, optimizer, _ = trained()
    loss = model(torch.randn(96, 70)).square().mean()
    step(model, optimizer, torch.randn(96, 70))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def trained(make: Callable[[], nn.Module] = mlp) -> tuple[nn.Module, torch.optim.Optimizer, SparseCompute]:
    """A model after two steps with momentum."""
    model = make()
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    computing = compute_sparse(Static(model, optimizer))
    for _ in range(2):
        step(model, optimizer, torch.randn(96, 70))
    return model, optimizer, computing


def weight_of(model: nn.Module) -> nn.Parameter:
    return model.get_parameter("0.weight")


def test_clipping_changes_the_step() -> None:
    def clip(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def before_step(*_: object) -> None:
            nn.utils.clip_grad_norm_(held, 1e-3)

        optimizer.register_step_pre_hook(before_step)
        return optimizer

    assert_equal_training(mlp, clip, srigl, (96, 70))


def test_gradients_that_somebody_keeps_are_not_written_again() -> None:
    model, optimizer, _ = trained()
    weight = weight_of(model)
    assert weight.grad is not None
    kept, view = weight.grad, weight.grad.view(-1)[:5]
    before, seen = kept.clone(), view.clone()
    step(model, optimizer, torch.randn(96, 70))
    assert torch.equal(kept, before)
    del kept
    step(model, optimizer, torch.randn(96, 70))
    assert torch.equal(view, seen)


def test_the_memory_of_gradients_is_used_again() -> None:
    model, optimizer, _ = trained()
    addresses = []
    for _ in range(3):
        step(model, optimizer, torch.randn(96, 70))
        grad = weight_of(model).grad
        assert grad is not None
        addresses.append(grad.data_ptr())
        del grad
    assert len(set(addresses)) == 1


def test_a_gradient_that_was_written_to_leaves_no_trace() -> None:
    model, optimizer, _ = trained()
    grad = weight_of(model).grad
    assert grad is not None
    grad.add_(1.0)
    del grad
    optimizer.zero_grad()
    model(torch.randn(96, 70)).sum().backward()
    grad, mask = weight_of(model).grad, dict(named_masks(model))["0.weight"]
    assert grad is not None
    assert not grad[~mask].any()


def test_a_layer_used_twice_sums_its_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(80, 80)
    model = sparsify(nn.Sequential(layer, nn.Tanh()), sparsity=0.9)
    x = torch.randn(70, 80)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Static(model, optimizer)
    gradients = []
    for computing in (None, compute_sparse(trainer)):
        optimizer.zero_grad()
        model(model(x)).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert computing is None or computing.layers == ["0.weight"]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


def test_autograd_grad_changes_nothing() -> None:
    model, _, _ = trained()
    weight = weight_of(model)
    assert weight.grad is not None
    before = weight.grad.clone()
    (grad,) = torch.autograd.grad(model(torch.randn(96, 70)).sum(), weight)
    assert not torch.equal(grad, before)
    assert torch.equal(weight.grad, before)


def test_weights_written_by_others_are_seen() -> None:
    model, _, computing = trained()
    x = torch.randn(96, 70)
    with torch.no_grad():
        weight_of(model).mul_(3.0)
    other = mlp()
    got = [model(x)]
    model.load_state_dict(other.state_dict())
    got.append(model(x))
    torch.testing.assert_close(got[1], other(x))
    functional = {name: parameter * 2 for name, parameter in model.named_parameters()}
    got.append(torch.func.functional_call(model, functional, (x,)))
    computing.detach()
    torch.testing.assert_close(got[2], torch.func.functional_call(model, functional, (x,)))
    torch.testing.assert_close(got[1], model(x))
    assert not torch.equal(got[0], got[1])


def test_optimizer_state_is_dense_in_a_state_dict_and_resumes() -> None:
    model, optimizer, _ = trained()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1]["state"][0]["momentum_buffer"].shape == weight_of(model).shape
    x = torch.randn(96, 70)
    step(model, optimizer, x)
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer, torch.randn(96, 70))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    step(model, optimizer, x)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


def test_a_failing_step_loses_nothing() -> None:
    model, optimizer, _ = trained()
    before = copy.deepcopy(optimizer.state_dict())
    group = optimizer.param_groups[0]
    parameters = list(group["params"])
    group["lr"] = "fast"
    with pytest.raises(TypeError):
        optimizer.step()
    group["lr"] = 0.1
    after = optimizer.state_dict()
    assert all(one is other for one, other in zip(group["params"], parameters, strict=True))
    assert after["state"].keys() == before["state"].keys()
    step(model, optimizer, torch.randn(96, 70))
    verify(model, optimizer)


def test_optimizer_state_follows_an_update_at_the_last_step() -> None:
    model = mlp()
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    trainer = srigl(model, optimizer)
    with compute_sparse(trainer):
        for _ in range(trainer.update_every):
            step(model, optimizer, torch.randn(96, 70))
        assert trainer.last_update == trainer.steps
    assert optimizer.state[weight_of(model)]["momentum_buffer"].any()
    verify(model, optimizer)


def test_closures_are_stepped_densely() -> None:
    models = [mlp(), mlp()]
    x = torch.randn(96, 70)
    for number, model in enumerate(models):
        optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
        trainer = srigl(model, optimizer)
        if number:
            compute_sparse(trainer)
        step(model, optimizer, x)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().mean()
            loss.backward()
            return loss.item()

        for _ in range(5):
            optimizer.step(closure)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_copies_and_files_compute_densely() -> None:
    model, _, computing = trained()
    x = torch.randn(96, 70)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        with torch.no_grad():
            torch.testing.assert_close(other(x), model(x))
            weight_of(other).zero_()
            assert not torch.equal(other(x), model(x))
    computing.detach()


def test_detach_leaves_an_ordinary_model() -> None:
    model, optimizer, computing = trained()
    computing.detach()
    computing.detach()
    assert all("forward" not in vars(module) for module in model.modules())
    assert optimizer.state[weight_of(model)]["momentum_buffer"].shape == weight_of(model).shape
    x = torch.randn(96, 70)
    expected = copy.deepcopy(model)
    step(model, optimizer, x)
    verify(model, optimizer)
    assert not torch.equal(expected(x), model(x))


def test_autocast_and_other_dtypes_compute_densely() -> None:
    model, _, computing = trained()
    x = torch.randn(96, 70)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(x)
    doubled = copy.deepcopy(model).double()(x.double())
    computing.detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(got, model(x))
    torch.testing.assert_close(doubled.float(), model(x))


def test_second_derivatives_are_refused() -> None:
    model, _, _ = trained()
    x = torch.randn(96, 70, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|differentiate twice"):
        grad.sum().backward()


def test_a_wrong_input_fails_as_a_dense_layer_does() -> None:
    model, _, _ = trained()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(torch.randn(96, 71))


def test_refusals() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Static(model, optimizer)
    trainer.detach()
    with pytest.raises(TrainerError, match="detached"):
        compute_sparse(trainer)
    half = sparsify(nn.Sequential(nn.Linear(40, 40)), sparsity=0.3)
    with pytest.raises(TrainerError, match="keeps 70% of its weights"):
        compute_sparse(Static(half, torch.optim.SGD(half.parameters(), lr=0.1)))
    trainer = Static(model, optimizer)
    compute_sparse(trainer)
    with pytest.raises(TrainerError, match="already"):
        compute_sparse(trainer)


def test_convolutions_step_their_kept_values() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 70))
        return sparsify(layers, sparsity=0.9, distribution="uniform")

    computing = assert_equal_training(make, OPTIMIZERS["AdamW"], srigl, (64, 3, 8, 8))
    assert computing.layers == ["4.weight"]
    assert "conv2d" in computing.dense["2.weight"]


def test_transformers_conv1d_computes_sparsely() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")

    def make() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(pytorch_utils.Conv1D(96, 70), nn.GELU(), pytorch_utils.Conv1D(70, 96))
        return sparsify(layers, sparsity=0.9, distribution="uniform")

    computing = assert_equal_training(make, OPTIMIZERS["AdamW"], srigl, (5, 20, 70))
    assert computing.layers == ["0.weight", "2.weight"]


def test_the_example_runs(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(checkout / "examples"))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert import_module("sparse_training_step").main(width=64, batch=96, steps=20) > 0.99
    assert capsys.readouterr().out.endswith("of the kept weights are the same\n")


Unseen = Callable[[nn.Module, torch.optim.Optimizer, Tensor], None]


def _fused_closure(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    optimizer.step(closure)


def _scaled(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)


def _by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    weight = model[0].weight  # type: ignore[index]
    weight.data.mul_(1.5)
    weight.detach().numpy()[:] *= 0.8
    optimizer.zero_grad()
    model(x).square().mean().backward()
    weight.grad.data.mul_(2)
    weight.grad.numpy()[:] *= 3
    optimizer.step()


@pytest.mark.parametrize("unseen", [_fused_closure, _scaled, _by_hand])
@pytest.mark.parametrize(
    "optimize",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    ],
)
def test_writes_that_pytorch_does_not_count(unseen: Unseen, optimize: Optimize) -> None:
    dense = mlp()
    sparse = copy.deepcopy(dense)
    optimizers = [optimize(dense.parameters()), optimize(sparse.parameters())]
    Static(dense, optimizers[0])
    compute_sparse(Static(sparse, optimizers[1]))
    for seed in range(4):
        x = torch.randn(64, 70, generator=torch.Generator().manual_seed(seed))
        unseen(dense, optimizers[0], x)
        unseen(sparse, optimizers[1], x)
    for expected, found in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
