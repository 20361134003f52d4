import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from train_support import batches, hook_count, loss_of, mask_copies, mlp, same, train

from srigl_fx import masks, sparsify
from srigl_fx.errors import InvariantError
from srigl_fx.masks import verify
from srigl_fx.masks.records import SparseWeight, sparse_weights
from srigl_fx.train import SRigL, Static, detach_from
from srigl_fx.train.engine import MaskEngine


def _engine(model: nn.Module, optimizer: torch.optim.Optimizer) -> MaskEngine:
    engine = MaskEngine(model, optimizer, lambda _: None)
    engine.window.capturing = True
    return engine


def _dense_gradients(model: nn.Module, data: list[Tensor]) -> dict[str, Tensor]:
    """The gradients a copy without a trainer accumulates: nothing masks them."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for x in data:
        torch.autograd.backward(loss_of(twin, x))
    return {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}


def _assert_captured(engine: MaskEngine, expected: dict[str, Tensor]) -> None:
    for handle in engine.weights:
        captured = engine.window.gradient(handle)
        assert captured is not None
        torch.testing.assert_close(captured, expected[handle.fqn], rtol=1e-6, atol=1e-7)
        assert handle.weight.grad is not None
        torch.testing.assert_close(handle.weight.grad, expected[handle.fqn] * handle.mask, rtol=1e-6, atol=1e-7)
        assert expected[handle.fqn][~handle.mask].any()


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
def test_captures_the_dense_gradient_under_accumulation(micro_batches: int) -> None:
    model = mlp()
    engine = _engine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = list(batches(micro_batches))
    for x in data:
        torch.autograd.backward(loss_of(model, x))
    _assert_captured(engine, _dense_gradients(model, data))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("by", ["model", "optimizer", "foreach optimizer"])
def test_starts_anew_after_zero_grad_without_a_step(set_to_none: bool, by: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=by == "foreach optimizer")
    engine = _engine(model, optimizer)
    abandoned, data = list(batches(2)), list(batches(3, seed=1))
    for x in abandoned:
        torch.autograd.backward(loss_of(model, x))
    (model if by == "model" else optimizer).zero_grad(set_to_none=set_to_none)
    for x in data:
        torch.autograd.backward(loss_of(model, x))
    _assert_captured(engine, _dense_gradients(model, data))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_starts_anew_after_a_step(set_to_none: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = _engine(model, optimizer)
    for x in batches(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        expected = _dense_gradients(model, [x])
        torch.autograd.backward(loss_of(model, x))
        _assert_captured(engine, expected)
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_off_the_mask_becomes_zero(bad: float) -> None:
    model = sparsify(nn.Sequential(nn.Linear(6, 4, bias=False)), sparsity=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Static(model, optimizer)
    handle = sparse_weights(model)[0]
    x = torch.randn(3, 6)
    column = int((~handle.mask).any(0).nonzero()[0])
    mask = handle.mask.clone()
    x[:, column] = bad
    handle.mask[:, column] = False  # no weight reads the column, so that the outputs stay finite
    handle.weight.data[:, column] = 0
    with torch.no_grad():
        handle.weight.grad = None
    torch.autograd.backward(torch.nn.functional.linear(x, handle.weight).nan_to_num(0.0).sum())
    assert handle.weight.grad is not None
    assert torch.equal(handle.weight.grad[:, column], torch.zeros(4))
    assert mask.any()


def test_clipping_sees_masked_gradients() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Static(model, optimizer)
    x = next(batches(1))
    dense = _dense_gradients(model, [x])
    torch.autograd.backward(loss_of(model, x))
    masked = {name: dense[name] * mask for name, mask in masks.named_masks(model)}
    expected = torch.stack([g.norm() for g in {**dense, **masked}.values()]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), expected)


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stays_sparse_with_every_optimizer(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    trainer = SRigL(model, optimizer, total_steps=40, update_every=4, ablation=0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = mask_copies(model)

    def check() -> None:
        verify(model, optimizer)
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())

    train(model, optimizer, batches(20), check)
    assert trainer.last_update == 20
    assert not same(start, mask_copies(model))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_optimizer_that_writes_off_the_mask() -> None:
    model = sparsify(nn.Sequential(nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False)))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.01)
    Static(model, optimizer)
    train(model, optimizer, batches(3), lambda: verify(model))


def test_state_that_is_loaded_is_masked() -> None:
    dense = mlp()
    dense_optimizer = torch.optim.Adam(dense.parameters())
    torch.autograd.backward(loss_of(dense, next(batches(1))))
    dense_optimizer.step()  # without a trainer: dense state
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    Static(model, optimizer)
    train(model, optimizer, batches(2))
    optimizer.load_state_dict(copy.deepcopy(dense_optimizer.state_dict()))
    train(model, optimizer, batches(1), lambda: verify(model, optimizer))


def test_gradients_and_state_of_earlier_dense_training_are_masked() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(2))
    torch.autograd.backward(loss_of(model, next(batches(1))))
    with pytest.raises(InvariantError, match="weights off the mask are not zero"):
        Static(model, optimizer)
    assert hook_count(model, optimizer) == 0
    masks.apply(model)
    Static(model, optimizer)
    verify(model, optimizer)
    for handle in sparse_weights(model):
        assert handle.weight.grad is not None
        assert not handle.weight.grad[~handle.mask].any()
        assert handle.weight.grad[handle.mask].any()


def test_masks_are_updated_in_place() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    buffers = [handle.mask for handle in sparse_weights(model)]
    start = mask_copies(model)
    SRigL(model, optimizer, total_steps=20, update_every=2)
    train(model, optimizer, batches(6))
    assert all(handle.mask is buffer for handle, buffer in zip(sparse_weights(model), buffers, strict=True))
    assert not same(start, mask_copies(model))


class _HostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that make the host wait for the device."""

    waiting = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "index.Tensor", "isfinite")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(str(func).startswith((f"aten.{name}.", f"aten.{name}")) for name in self.waiting):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_ordinary_steps_do_not_wait_for_the_device() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=5)
    data = list(batches(5))
    train(model, optimizer, data[:1])
    with _HostReads() as reads:
        train(model, optimizer, data[1:4])
    assert (reads.seen, trainer.last_update) == ([], None)
    with _HostReads() as reads:
        train(model, optimizer, data[4:])
    assert trainer.last_update == 5
    assert reads.seen


def test_parameters_replaced_by_assignment_are_hooked_again() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SRigL(model, optimizer, total_steps=40, update_every=2)
    train(model, optimizer, batches(3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, batches(5), lambda: verify(model, optimizer))
    assert (trainer.steps, trainer.last_update) == (8, 8)
    assert hook_count(model, optimizer) == 5


def test_parameters_replaced_behind_the_optimizers_back_are_an_error() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Static(model, optimizer)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    torch.autograd.backward(loss_of(model, next(batches(1))))
    with pytest.raises(ValueError, match=r"does not hold 0\.weight, 2\.weight, 4\.weight: create it"):
        optimizer.step()


def test_frozen_weights_keep_their_masks_until_they_train() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = mask_copies(model)
    SRigL(model, optimizer, total_steps=100, update_every=2)
    train(model, optimizer, batches(6))
    now = mask_copies(model)
    assert torch.equal(now["0.weight"], start["0.weight"])
    assert not torch.equal(now["2.weight"], start["2.weight"])
    model[0].requires_grad_(True)
    train(model, optimizer, batches(6), lambda: verify(model, optimizer))
    assert not torch.equal(mask_copies(model)["0.weight"], start["0.weight"])


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
            self.second.weight = self.first.weight
            self.head = nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x)))))
            return logits

    model = sparsify(Tied(), sparsity=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = mask_copies(model)
    assert list(start) == ["first.weight", "head.weight"]
    engine_check = _dense_gradients(model, list(batches(1)))
    SRigL(model, optimizer, total_steps=40, update_every=2)
    train(model, optimizer, batches(6), lambda: verify(model, optimizer))
    assert model.second.weight is model.first.weight
    assert engine_check["first.weight"].any()
    assert not torch.equal(start["first.weight"], mask_copies(model)["first.weight"])


@pytest.mark.parametrize("way", ["deepcopy", "save"])
def test_a_copy_has_masks_and_no_trainer(way: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SRigL(model, optimizer, total_steps=100, update_every=2)
    train(model, optimizer, batches(3))
    if way == "deepcopy":
        clone = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    assert same(mask_copies(model), mask_copies(clone))
    assert hook_count(clone, optimizer) == 2  # the optimizer's own; none on the copy
    clone_optimizer = torch.optim.SGD(clone.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    SRigL(clone, clone_optimizer, total_steps=100, update_every=2)
    train(clone, clone_optimizer, batches(4), lambda: verify(clone, clone_optimizer))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_detach_and_detach_from() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Static(model, optimizer)
    assert hook_count(model, optimizer) == 5
    trainer.detach()
    trainer.detach()
    assert hook_count(model, optimizer) == 0
    SRigL(model, optimizer, total_steps=100)
    detach_from(model)
    assert hook_count(model, optimizer) == 0
    Static(model, optimizer)


@pytest.mark.long
def test_the_engine_dies_with_the_optimizer() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dead = weakref.ref(SRigL(model, optimizer, total_steps=100))
    gc.collect()
    assert dead() is not None
    del optimizer
    gc.collect()
    assert dead() is None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Static(model, optimizer)
    train(model, optimizer, batches(2), lambda: verify(model, optimizer))


@pytest.mark.slow
def test_compiled_models_train_without_recompiling() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = mlp()
    compiled = torch.compile(model, backend=counter)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)  # type: ignore[attr-defined]
    trainer = SRigL(compiled, optimizer, total_steps=40, update_every=2)  # type: ignore[arg-type]
    start = mask_copies(model)
    train(compiled, optimizer, batches(10), lambda: verify(model, optimizer))  # type: ignore[arg-type]
    assert trainer.last_update == 10
    assert not same(start, mask_copies(model))
    assert counter.frame_count == 1


def test_the_handles_of_the_engine_are_live() -> None:
    model = mlp()
    engine = MaskEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda _: None)
    handles: list[SparseWeight] = engine.weights
    assert [handle.fqn for handle in handles] == ["0.weight", "2.weight", "4.weight"]
    model.double()
    assert all(handle.weight.dtype == torch.float64 and handle.mask.dtype == torch.bool for handle in handles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = mask_copies(model)
    SRigL(model, optimizer, total_steps=40, update_every=2)
    train(model, optimizer, (x.to(dtype) for x in batches(8)), lambda: verify(model, optimizer))
    assert not same(start, mask_copies(model))


def test_the_whole_graph_of_a_model_trains() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 4)))
    sparsify(model, sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = mask_copies(model)
    SRigL(model, optimizer, total_steps=40, update_every=2)
    train(model, optimizer, batches(8), lambda: verify(model, optimizer))
    assert not same(start, mask_copies(model))
    detach_from(model)
    assert hook_count(copy.deepcopy(model), optimizer) == 0
