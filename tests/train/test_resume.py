import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_support import batches, loss_of, mask_copies, mlp, same, train

from srigl_fx import sparsify
from srigl_fx.errors import StructureError, TrainerError
from srigl_fx.masks import verify
from srigl_fx.train import SRigL, Static

OPTIONS: dict[str, Any] = {"total_steps": 60, "update_every": 5, "ablation": 0.9, "drop_fraction": 0.5}


def _start(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, SRigL]:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, SRigL(model, optimizer, **{**OPTIONS, **options})


def _through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, trainer: SRigL, gradients: bool = False) -> Any:
    return _through_a_file(
        (model.state_dict(), optimizer.state_dict(), trainer.state_dict(include_gradients=gradients))
    )


def _resume(state: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, SRigL]:
    torch.manual_seed(99)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trainer = SRigL(model, optimizer, **{**OPTIONS, **options})
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    trainer.load_state_dict(state[2])
    verify(model, optimizer)
    return model, optimizer, trainer


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(
    ("cut", "options"), [(7, {}), (5, {}), (8, {"grad_samples": 4}), (9, {"permanent_ablation": True})]
)
def test_a_resumed_run_equals_an_uninterrupted_one(cut: int, options: dict[str, Any]) -> None:
    data = list(batches(30))
    model, optimizer, trainer = _start(**options)
    train(model, optimizer, data[:cut])
    at_cut = mask_copies(model)
    state = _state(model, optimizer, trainer)
    train(model, optimizer, data[cut:])
    other, other_optimizer, other_trainer = _resume(state, **options)
    assert (other_trainer.steps, other_trainer.last_update) == (cut, 5 if cut >= 5 else None)
    train(other, other_optimizer, data[cut:])
    _assert_same(model, other)
    assert not same(at_cut, mask_copies(model))
    assert (trainer.steps, trainer.last_update) == (other_trainer.steps, other_trainer.last_update) == (30, 30)


def _accumulate(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Tensor], first: int) -> None:
    """Four micro-batches a step; ``first`` micro-batches were done before."""
    for i, x in enumerate(data, start=first + 1):
        torch.autograd.backward(loss_of(model, x) / 4)
        if i % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("cut", [4 * 4 + 1, 4 * 4 + 3, 4 * 6 + 2])
def test_a_save_between_micro_batches(cut: int) -> None:
    data = list(batches(4 * 12))
    model, optimizer, trainer = _start()
    _accumulate(model, optimizer, data[:cut], 0)
    state = _state(model, optimizer, trainer, gradients=True)
    at_cut = mask_copies(model)
    _accumulate(model, optimizer, data[cut:], cut)
    other, other_optimizer, _ = _resume(state)
    _accumulate(other, other_optimizer, data[cut:], cut)
    _assert_same(model, other)
    assert not same(at_cut, mask_copies(model))


def test_a_pending_manual_update_is_resumed() -> None:
    data = list(batches(5))
    model, optimizer, trainer = _start(auto=False)
    train(model, optimizer, data)
    state = _state(model, optimizer, trainer, gradients=True)
    other, _, other_trainer = _resume(state, auto=False)
    assert trainer.step()
    assert other_trainer.step()
    _assert_same(model, other)


def test_resuming_inside_a_wrapper() -> None:
    model, optimizer, trainer = _start()
    data = list(batches(12))
    train(model, optimizer, data[:7])
    state = _state(model, optimizer, trainer, gradients=True)
    train(model, optimizer, data[7:])
    plain = mlp()
    compiled = torch.compile(plain, backend="eager")
    assert isinstance(compiled, nn.Module)
    other_optimizer = torch.optim.AdamW(compiled.parameters(), lr=0.01)
    resumed = SRigL(compiled, other_optimizer, **OPTIONS)
    plain.load_state_dict(state[0])
    other_optimizer.load_state_dict(state[1])
    resumed.load_state_dict(state[2])
    train(plain, other_optimizer, data[7:])
    _assert_same(model, plain)


def test_another_sparsity_structure_method_or_model_is_an_error() -> None:
    model, optimizer, trainer = _start()
    train(model, optimizer, batches(6))
    saved = trainer.state_dict()

    def refused(error: type[Exception], message: str, other: nn.Module, state: dict[str, Any] = saved) -> None:
        other_optimizer = torch.optim.AdamW(other.parameters())
        resumed = SRigL(other, other_optimizer, **OPTIONS)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(error, match=message):
            resumed.load_state_dict(state)
        assert resumed.steps == 0
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

    refused(StructureError, r"0\.weight: saved with .*budgets.*\[192\]", mlp(sparsity=0.5))
    refused(TrainerError, "only one of the two masks 2.weight", sparsify(nn.Sequential(nn.Linear(24, 32))))
    refused(TrainerError, r"no state of SRigL .* but of Static", mlp(), {**saved, "method": "Static"})
    refused(TrainerError, "version", mlp(), {**saved, "version": 99})
    wrong = {**saved, "gradients": {"0.weight": torch.ones(3)}}
    refused(TrainerError, r"fit no parameter of the model: 0\.weight", mlp(), wrong)


def test_a_dense_checkpoint_keeps_the_masks() -> None:
    model, optimizer, _ = _start()
    train(model, optimizer, batches(6))
    before = mask_copies(model)
    dense = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    model.load_state_dict(dense.state_dict(), strict=False)
    assert same(before, mask_copies(model))
    verify(model, optimizer)
    train(model, optimizer, batches(6), lambda: verify(model, optimizer))


def test_static_resumes() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Static(model, optimizer)
    train(model, optimizer, batches(3))
    state = _through_a_file(trainer.state_dict())
    trainer.detach()
    resumed = Static(model, optimizer)
    resumed.load_state_dict(state)
    assert resumed.steps == 3


@pytest.mark.parametrize("key", ["steps", "last_update", "update_due", "weights", "captured"])
@pytest.mark.parametrize("value", ["missing", "x", -5])
def test_a_damaged_state_changes_nothing(key: str, value: Any) -> None:
    _, _, trainer = _start()
    state = {**trainer.state_dict(), "steps": 17, key: value}
    if value == "missing":
        del state[key]
    with pytest.raises(TrainerError, match=f"damaged at .*{key}"):
        trainer.load_state_dict(state)
    assert trainer.steps == 0
