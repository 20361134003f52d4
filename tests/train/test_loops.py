"""Training loops as people write them: each works, and gives what the same loop without its extras gives."""

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint
from train_support import SmallNet, batches, dense_gradient_sums, hook_count, loss_of, mask_copies, mlp, same, train

from srigl_fx import SriglError, masks, sparsify
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import SNFS, RigL, SRigL, Static
from srigl_fx.train.base import Trainer


def _pair(model: nn.Module, **options: Any) -> list[tuple[nn.Module, torch.optim.Optimizer, Trainer]]:
    """The same model twice, each with an optimizer and a trainer of its own."""
    found: list[tuple[nn.Module, torch.optim.Optimizer, Trainer]] = []
    for module in (model, copy.deepcopy(model)):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
        trainer = SRigL(module, optimizer, **{"total_steps": 100, "update_every": 2, "drop_fraction": 0.5, **options})
        found.append((module, optimizer, trainer))
    return found


def _assert_equal(first: nn.Module, second: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert same(mask_copies(first), mask_copies(second))
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


# Several micro-batches a step


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_micro_batches_equal_the_joint_batch(set_to_none: bool) -> None:
    (first, one, trainer), (second, other, _) = _pair(mlp().double())
    start = mask_copies(first)
    for x in batches(7, (16, 24)):
        x = x.double()
        one.zero_grad(set_to_none=set_to_none)
        for part in x.chunk(4):
            torch.autograd.backward(loss_of(first, part) / 4)
        one.step()
        verify(first, one)
        other.zero_grad()
        torch.autograd.backward(loss_of(second, x))
        other.step()
    assert (trainer.steps, trainer.last_update) == (7, 6)
    assert not same(start, mask_copies(first))
    _assert_equal(first, second, rtol=1e-9, atol=1e-12)


def test_clipping_changes_the_step_and_not_the_growth() -> None:
    """With a rate of 0 weights stay, so that only the gradients' order matters, which clipping leaves as it is."""
    model = mlp()
    found: list[nn.Module] = []
    for clip in (False, True):
        module: nn.Module = copy.deepcopy(model)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        RigL(module, optimizer, total_steps=100, update_every=1, drop_fraction=0.5)
        for x in batches(3):
            optimizer.zero_grad()
            torch.autograd.backward(loss_of(module, x))
            if clip:
                norm = nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
                squares = [p.grad.square().sum() for p in module.parameters() if p.grad is not None]
                assert torch.stack(squares).sum().sqrt() == pytest.approx(1e-3, rel=1e-2)
                assert norm > 1e-3
            optimizer.step()
            verify(module, optimizer)
        found.append(module)
    assert not same(mask_copies(model), mask_copies(found[0]))
    _assert_equal(found[0], found[1])


def test_a_learning_rate_schedule() -> None:
    (first, one, trainer), (second, other, _) = _pair(mlp())
    start = mask_copies(first)
    schedule = torch.optim.lr_scheduler.OneCycleLR(one, max_lr=0.02, total_steps=9, cycle_momentum=False)
    rates = []
    for x in batches(8):
        rates.append(one.param_groups[0]["lr"])
        train(first, one, [x])
        schedule.step()
    for x, rate in zip(batches(8), rates, strict=True):
        other.param_groups[0]["lr"] = rate
        train(second, other, [x])
    assert len(set(rates)) == 8
    assert not same(start, mask_copies(first))
    assert trainer.last_update == 8
    _assert_equal(first, second)
    verify(first, one)


# Mixed precision


def _scaled(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, x: Tensor, *, clip: bool = False
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(scaler.scale(loss_of(model, x)))
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_skipped_changes_nothing(fused: bool, clip: bool) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    data = list(batches(6))
    _scaled(model, optimizer, scaler, data[0], clip=clip)
    before, weights = mask_copies(model), [p.detach().clone() for p in model.parameters()]
    for _ in range(2):  # the step of an update, skipped twice
        _scaled(model, optimizer, scaler, data[1] * torch.inf, clip=clip)
        assert (trainer.steps, trainer.last_update, trainer.step()) == (1, None, False)
        assert same(before, mask_copies(model))
        assert all(torch.equal(old, new) for old, new in zip(weights, model.parameters(), strict=True))
        verify(model, optimizer)
    assert scaler.get_scale() == 2.0**8
    _scaled(model, optimizer, scaler, data[2], clip=clip)
    assert (trainer.steps, trainer.last_update, trainer.step()) == (2, 2, True)
    assert not same(before, mask_copies(model))
    verify(model, optimizer)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_run_equals_an_unscaled_one(fused: bool) -> None:
    """Scales are powers of two, so that nothing is rounded, and steps that are skipped leave no trace."""
    model = mlp()
    plain = copy.deepcopy(model)
    one, other = (torch.optim.AdamW(module.parameters(), lr=0.01, fused=fused) for module in (model, plain))
    options: dict[str, Any] = {"total_steps": 100, "update_every": 3, "grad_samples": 2, "drop_fraction": 0.5}
    trainers = SRigL(model, one, **options), SRigL(plain, other, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for t, x in enumerate(batches(10)):
        if t % 4 == 1:
            _scaled(model, one, scaler, x * torch.inf)
        _scaled(model, one, scaler, x)
    train(plain, other, batches(10))
    assert [trainer.steps for trainer in trainers] == [10, 10]
    assert [trainer.last_update for trainer in trainers] == [9, 9]
    _assert_equal(model, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["window", "momentum"])
def test_gradients_of_a_window_count_alike_whatever_their_scale(method: str, fused: bool, unscale: bool) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, fused=fused)
    seen: list[dict[str, Tensor]] = []
    base: type[Trainer] = RigL if method == "window" else SNFS

    class Spy(base):  # type: ignore[misc, valid-type]
        def _new_masks(self, step: int, gradients: dict[str, Tensor]) -> Any:
            seen.append({name: gradient.clone() for name, gradient in gradients.items()})
            return super()._new_masks(step, gradients)

    options = {"grad_samples": 3} if method == "window" else {}
    Spy(model, optimizer, total_steps=100, update_every=3, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_factor=2.0**6, growth_interval=1)
    weights = [1.0, 1.0, 1.0] if method == "window" else [0.81, 0.9, 1.0]
    expected: dict[str, Tensor] = {}
    for weight, x in zip(weights, batches(3), strict=True):
        twin = copy.deepcopy(model)
        sums = dense_gradient_sums(twin)
        torch.autograd.backward(loss_of(twin, x))
        for name, gradient in sums.items():
            expected[name] = expected.get(name, torch.zeros(())) + weight * gradient
        _scaled(model, optimizer, scaler, x, clip=unscale)
    assert scaler.get_scale() == 2.0**22
    for name, gradient in expected.items():
        ratio = seen[0][name].norm() / gradient.norm()
        torch.testing.assert_close(seen[0][name] / ratio, gradient, rtol=1e-4, atol=1e-6)


def test_bfloat16_autocast() -> None:
    model = SmallNet()
    sparsify(model, sparsity=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    start = mask_copies(model)
    for x in batches(5, (8, 3, 4, 4)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, x)
        torch.autograd.backward(loss)
        optimizer.step()
        verify(model, optimizer)
    assert trainer.last_update == 4
    assert not same(start, mask_copies(model))
    assert all(p.dtype == torch.float32 for p in model.parameters())


# Less memory, more speed


class Checkpointed(nn.Module):
    """Runs a model's layers two at a time, and computes what is inside anew for the gradient."""

    def __init__(self, layers: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for first, second in itertools.pairwise([*self.layers, nn.Identity()]):
            if isinstance(first, nn.Linear):
                x = checkpoint(nn.Sequential(first, second), x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    plain = mlp()
    layers = copy.deepcopy(plain)
    for model, module in ((plain, plain), (layers, Checkpointed(layers, reentrant))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = SRigL(module, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
        start = mask_copies(model)
        train(module, optimizer, batches(7), lambda module=module, optimizer=optimizer: verify(module, optimizer))  # type: ignore[misc]
        assert trainer.last_update == 6
        assert not same(start, mask_copies(model))
    _assert_equal(plain, layers)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["compile", "trainer"])
def test_compiled_models_keep_their_code_through_accumulation_and_ablation(first: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = mlp()
    plain = copy.deepcopy(model)
    optimizer, other = (torch.optim.AdamW(module.parameters(), lr=0.01) for module in (model, plain))
    options: dict[str, Any] = {"total_steps": 100, "update_every": 2, "drop_fraction": 0.5, "ablation": 0.9}
    SRigL(plain, other, **options)
    if first == "trainer":
        SRigL(model, optimizer, **options)
    compiled: nn.Module = torch.compile(model, backend=counter, fullgraph=True)  # type: ignore[assignment]
    if first == "compile":
        SRigL(compiled, optimizer, **options)
    start = mask_copies(model)
    train(compiled, optimizer, batches(2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in batches(8):
            optimizer.zero_grad()
            for part in (x, x):
                torch.autograd.backward(loss_of(compiled, part) / 2)
            optimizer.step()
            verify(compiled, optimizer)
    assert counter.frame_count == 1
    assert not same(start, mask_copies(model))
    train(plain, other, batches(2))
    train(plain, other, batches(8))
    for mine, theirs in zip(mask_copies(model).values(), mask_copies(plain).values(), strict=True):
        assert (mine ^ theirs).float().mean() < 0.05  # sums are rounded otherwise, so a tie may fall otherwise


# Copies


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_weights_is_sparse_once_masked(use_buffers: bool) -> None:
    model = SmallNet()
    sparsify(model, sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    SRigL(model, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    keep = get_ema_multi_avg_fn(0.5)  # type: ignore[no-untyped-call]
    average = AveragedModel(model, multi_avg_fn=keep, use_buffers=use_buffers)
    assert hook_count(average, optimizer) == 2  # the optimizer's own
    data = list(batches(7, (8, 3, 4, 4)))
    for x in data:
        train(model, optimizer, [x])
        average.update_parameters(model)
    with pytest.raises(SriglError, match=r"budget|off the mask"):
        verify(average)  # it holds what the masks of earlier steps kept
    if use_buffers:  # averages of masks, too: whatever any of them kept
        average.module.load_state_dict({f"{name}_mask": m for name, m in masks.named_masks(model)}, strict=False)
    masks.apply(average)
    verify(average)
    assert same({name.removeprefix("module."): mask for name, mask in mask_copies(average).items()}, mask_copies(model))
    for mine, theirs in zip(sparse_weights(average), sparse_weights(model), strict=True):
        assert mine.weight.any()
        assert not torch.equal(mine.weight, theirs.weight)
    update_bn(data, average)
    assert average(data[0]).isfinite().all()
    verify(model, optimizer)


def test_an_average_that_is_masked_all_along() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    SRigL(model, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))  # type: ignore[no-untyped-call]
    for x in batches(7):
        train(model, optimizer, [x])
        average.update_parameters(model)
        masks.apply(average)
        verify(average)


def _copied(model: nn.Module, way: str) -> nn.Module:
    if way == "deepcopy":
        return copy.deepcopy(model)
    if way == "pickle":
        clone: nn.Module = pickle.loads(pickle.dumps(model))
        return clone
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    clone = torch.load(file, weights_only=False)
    return clone


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_amid_a_step_has_masks_and_no_trainer(way: str) -> None:
    model = SmallNet()
    sparsify(model, sparsity=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=4, drop_fraction=0.5)
    data = list(batches(8, (8, 3, 4, 4)))
    train(model, optimizer, data[:3])
    torch.autograd.backward(loss_of(model, data[3]))  # a dense gradient is captured
    clone = _copied(model, way)
    assert hook_count(clone, optimizer) == 2
    _assert_equal(model, clone)
    verify(clone)
    optimizer.step()
    assert trainer.last_update == 4
    clone_optimizer = torch.optim.AdamW(clone.parameters(), lr=0.01)
    train(clone, clone_optimizer, data[:2])
    with pytest.raises(SriglError, match="weights off the mask are not zero"):
        verify(clone)  # nothing kept it sparse
    masks.apply(clone)
    again = SRigL(clone, clone_optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    before = mask_copies(clone)
    train(clone, clone_optimizer, data[4:], lambda: verify(clone, clone_optimizer))
    assert again.last_update == 4
    assert not same(before, mask_copies(clone))
    verify(model, optimizer)


# Other ways to call


def test_functional_calls_with_the_models_own_parameters_train_it() -> None:
    (first, one, trainer), (second, other, _) = _pair(mlp())
    for x in batches(5):
        one.zero_grad()
        y = torch.func.functional_call(first, dict(first.named_parameters()), (x,))
        torch.autograd.backward(loss_of(_Constant(y), x))
        one.step()
        verify(first, one)
        train(second, other, [x])
    assert trainer.last_update == 4
    _assert_equal(first, second)


class _Constant(nn.Module):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


def test_gradients_by_torch_func_are_dense_until_the_step() -> None:
    """They never pass through ``.grad`` hooks: written there by hand, the step masks them."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    Static(model, optimizer)
    for x in batches(3):
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return loss_of(_Constant(torch.func.functional_call(model, parameters, (x,))), x)

        gradients = torch.func.grad(loss)(parameters)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        assert all(gradients[name][~mask].any() for name, mask in masks.named_masks(model))
        optimizer.step()
        verify(model, optimizer)


def test_gradients_by_autograd_grad_leave_everything_alone() -> None:
    """A gradient penalty or an analysis that asks autograd directly gets dense gradients, and no trainer sees them."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = SRigL(model, optimizer, total_steps=100, update_every=2, drop_fraction=0.5)
    (plain, other, _) = _pair(copy.deepcopy(model))[0]
    for x in batches(5):
        found = torch.autograd.grad(loss_of(model, x), [handle.weight for handle in sparse_weights(model)])
        assert all(g[~h.mask].any() for g, h in zip(found, sparse_weights(model), strict=True))
        train(model, optimizer, [x])
        train(plain, other, [x])
    assert trainer.last_update == 4
    _assert_equal(model, plain)
