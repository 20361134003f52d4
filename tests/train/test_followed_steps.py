"""What a trainer sees of steps and gradients: wrappers of optimizers, nested steps, swapped parameters."""

import copy
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from train_support import batches, hook_count, loss_of, mask_copies, mlp, same, train

from srigl_fx.errors import InvariantError, TrainerError
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import SET, RigL, SRigL, Static
from srigl_fx.train.base import Trainer

OPTIONS: dict[str, Any] = {"total_steps": 100, "update_every": 3, "drop_fraction": 0.5}


def _sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


def _backward(model: nn.Module, x: Tensor) -> None:
    torch.autograd.backward(loss_of(model, x))


def _assert_same(one: nn.Module, other: nn.Module) -> None:
    assert same(mask_copies(one), mask_copies(other))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# Wrappers of optimizers


class Passing(Optimizer):
    """Passes everything on, as the wrapper of accelerate does: it has no hooks of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class NoOptimizer:
    """As the wrapper of Lightning: an object with an optimizer inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        self._optimizer.step()


class Lookahead(Optimizer):
    """Moves the weights once more behind every second inner step, towards slow ones that it keeps."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            self.state[parameter].setdefault("slow", parameter.detach().clone())
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for parameter, kept in self.state.items():
                parameter.data.lerp_(kept["slow"], 0.5)
                kept["slow"].copy_(parameter)
        return loss


class SAM(Optimizer):
    """Two steps by other names, of which the second steps the inner optimizer (Foret et al., 2021)."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base_optimizer = SGD(self.param_groups, lr=0.05, momentum=0.9)

    @torch.no_grad()
    def first_step(self) -> None:
        found = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in found]).norm()
        for p in found:
            self.state[p]["old"] = p.detach().clone()
            p.add_(p.grad * (0.05 / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, kept in self.state.items():
            p.copy_(kept["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("wrap", [Passing, NoOptimizer, lambda inner: Passing(Passing(inner))])
@pytest.mark.parametrize("method", [SRigL, SET, Static])
def test_a_wrapper_that_passes_calls_on_is_looked_through(wrap: Callable[[Optimizer], Any], method: Any) -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    inner, other = _sgd(model), _sgd(plain)
    wrapped = wrap(inner)
    trainer: Trainer = method(model, wrapped, **OPTIONS)
    method(plain, other, **OPTIONS)
    train(model, wrapped, batches(7))
    train(plain, other, batches(7))
    assert trainer.steps == 7
    assert trainer.engine.optimizer is inner
    _assert_same(model, plain)
    verify(model, inner)


def test_the_optimizer_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = mlp()
    plain = copy.deepcopy(model)
    other = _sgd(plain)
    wrapped_model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, _sgd(model))
    trainer = SRigL(wrapped_model, optimizer, **OPTIONS)
    SRigL(plain, other, **OPTIONS)
    train(wrapped_model, optimizer, batches(7))
    train(plain, other, batches(7))
    assert (trainer.steps, trainer.last_update) == (7, 6)
    _assert_same(model, plain)


def test_a_wrapper_that_moves_weights_behind_the_inner_step_is_followed_itself() -> None:
    model = mlp()
    optimizer = Lookahead(_sgd(model))
    trainer = RigL(model, optimizer, **OPTIONS)
    start = mask_copies(model)

    def check() -> None:
        verify(model, optimizer)
        verify(model, optimizer.inner)

    train(model, optimizer, batches(12), check)
    assert (trainer.steps, trainer.last_update) == (12, 12)
    assert not same(start, mask_copies(model))


@pytest.mark.parametrize("method", [SRigL, SET])
@pytest.mark.parametrize("way", ["inner", "no hooks"])
def test_a_wrapper_that_moves_weights_unseen_is_said(way: str, method: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Hookless(Passing):
        def __init__(self, optimizer: Optimizer) -> None:
            super().__init__(optimizer)
            self.inner, self.count, self.slow = optimizer, 0, [p.detach().clone() for p in model.parameters()]

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            self.inner.step()
            self.count += 1
            if self.count % 2 == 0:
                for parameter, slow in zip(model.parameters(), self.slow, strict=True):
                    parameter.data.lerp_(slow, 0.5)
                    slow.copy_(parameter)

    model = mlp()
    optimizer: Any = Lookahead(_sgd(model)) if way == "inner" else Hookless(_sgd(model))
    method(model, optimizer.inner if way == "inner" else optimizer, **OPTIONS)
    train(model, optimizer, batches(4))
    assert not caplog.records
    with pytest.raises(InvariantError, match=r"0\.weight: \d+ weights off the mask are not zero"):
        verify(model)
    train(model, optimizer, batches(1))
    said = [record.message.partition(" were")[0] for record in caplog.records]
    assert said == ["weights of 0.weight"], "the next step says so"
    remedy = (
        "attach the trainer to the outermost" if way == "inner" else "The Hookless around the SGD takes no step hooks"
    )
    assert remedy in caplog.records[0].message
    train(model, optimizer, batches(6))
    assert [record.message.partition(" were")[0] for record in caplog.records] == ["weights of 0.weight"]
    optimizer.zero_grad()
    optimizer.inner.step()
    verify(model)


class ScheduleFree(Optimizer):
    """Steps weights that the model does not see, and averages them into those that it sees (Defazio et al., 2024)."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.inner = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        averages = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.copy_(self.state[parameter].setdefault("z", parameter.detach().clone()))
        self.inner.step()
        for parameter, average in zip(parameters, averages, strict=True):
            self.state[parameter]["z"].copy_(parameter)
            parameter.lerp_(average, 0.9)


@pytest.mark.parametrize("inner", [False, True])
def test_a_wrapper_that_shows_the_inner_optimizer_other_weights(inner: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = ScheduleFree(_sgd(model))
    SRigL(model, optimizer.inner if inner else optimizer, **OPTIONS)
    train(model, optimizer, batches(3))
    assert not caplog.records
    train(model, optimizer, batches(1))
    assert [record.message.partition(" were")[0] for record in caplog.records] == ["weights of 0.weight"] * inner
    if not inner:
        train(model, optimizer, batches(9), lambda: verify(model, optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_the_two_steps_of_sam_count_once(inner: bool, by_closure: bool) -> None:
    """Attached to either of the two: the same masks as those of the inner optimizer by hand."""
    models = [mlp()]
    models.append(copy.deepcopy(models[0]))
    for model, follow_inner in zip(models, (inner, True), strict=True):
        optimizer = SAM(model.parameters())
        trainer = SRigL(model, optimizer.base_optimizer if follow_inner else optimizer, **OPTIONS)
        for x in batches(7):
            if by_closure and model is models[0]:
                optimizer.step(lambda x=x, model=model: _backward(model, x))
            else:
                _backward(model, x)
                optimizer.first_step()
                _backward(model, x)
                optimizer.second_step()
            verify(model, optimizer.base_optimizer if follow_inner else optimizer)
        assert (trainer.steps, trainer.last_update) == (7, 6)
    _assert_same(*models)


def test_wrappers_that_cannot_be_followed_leave_nothing_behind() -> None:
    class Two(Passing):
        def __init__(self, *optimizers: Optimizer) -> None:
            self.first, self.second = optimizers

    class Hookless(SGD):
        def __init__(self, parameters: Any) -> None:
            self.param_groups = [{"params": list(parameters)}]

    model = mlp()
    first, second = SGD(model[0].parameters(), lr=0.1), SGD([*model[2:].parameters()], lr=0.1)
    for optimizer, message in (
        (Two(first, second), "Two holds 2 optimizers and takes no step hooks"),
        (Hookless(model.parameters()), r"Hookless takes no step hooks.*super\(\).__init__"),
        (Passing(torch.optim.LBFGS(model.parameters())), "LBFGS"),
        ([first, second], "one torch.optim.Optimizer, and the list holds several: pass the one that holds"),
        ({"a": first, "b": second}, "the dict holds several"),
        (SimpleNamespace(optimizers=(first, second)), "the SimpleNamespace holds several"),
        ([object()], "must be a torch.optim.Optimizer, or hold one, not list"),
        (NoOptimizer(object()), "must be a torch.optim.Optimizer, or hold one, not NoOptimizer"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TrainerError, match=message):
            Static(model, optimizer)  # type: ignore[arg-type]
        assert sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()) == 0
    assert hook_count(model, first) == 0
    Static(model, _sgd(model))


# Steps inside steps


def _classes() -> tuple[type[SGD], type[SGD], type[SGD]]:
    """Three new classes, each of whose ``step`` calls that of the one before."""

    class Base(SGD):
        def step(self, closure: Any = None) -> Any:
            if getattr(self, "fails", False):
                raise FloatingPointError("on purpose")
            return super().step(closure)

    class Middle(Base):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class Last(Middle):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for parameter in group["params"]:
                        parameter.mul_(0.999)
            return loss

    return Base, Middle, Last


def _used_before(kinds: tuple[type[SGD], ...]) -> type[SGD]:
    for kind in kinds:  # torch hooks the class's step when its first instance is made
        kind([torch.zeros(2)], lr=0.1)
    return kinds[-1]


@pytest.mark.slow
def test_a_step_that_calls_its_base_class_counts_once() -> None:
    found = []
    model = mlp()
    for kind in (_classes()[-1], _used_before(_classes())):
        module = copy.deepcopy(model)
        optimizer = kind(module.parameters(), lr=0.05, momentum=0.9)
        trainer = SRigL(module, optimizer, **OPTIONS)
        train(module, optimizer, batches(7), lambda: verify(module, optimizer))  # noqa: B023 - called at once
        assert (trainer.steps, trainer.last_update) == (7, 6)
        found.append(module)
    _assert_same(*found)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True])
def test_a_step_that_failed_is_not_taken_for_one_that_runs(kept: bool) -> None:
    """Also where the error is kept, and the frames of the failed step with it."""
    model = mlp()
    optimizer = _used_before(_classes())(model.parameters(), lr=0.05, momentum=0.9)
    trainer = SRigL(model, optimizer, **OPTIONS)
    errors = []
    for t, x in enumerate(batches(9)):
        optimizer.zero_grad()
        _backward(model, x)
        optimizer.fails = t in (1, 4)  # type: ignore[attr-defined]
        try:
            optimizer.step()
        except FloatingPointError as error:
            if kept:
                errors.append(error)
        verify(model, optimizer)
    assert (trainer.steps, trainer.last_update) == (7, 6)


@pytest.mark.slow
def test_steps_with_a_closure_inside_one_another_count_once() -> None:
    model = mlp()
    optimizer = _used_before(_classes())(model.parameters(), lr=0.05, momentum=0.9)
    trainer = SRigL(model, optimizer, **OPTIONS)
    for x in batches(7):

        def closure(x: Tensor = x) -> float:
            optimizer.zero_grad()
            _backward(model, x)
            return 1.0

        assert optimizer.step(closure) == 1.0
        verify(model, optimizer)
    assert (trainer.steps, trainer.last_update) == (7, 6)


@pytest.mark.long
def test_the_original_order_of_rigl_with_two_steps() -> None:
    model = mlp()
    optimizer = SAM(model.parameters())
    RigL(model, optimizer, replace_step=True, **OPTIONS)
    for t, x in enumerate(batches(6), start=1):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        _backward(model, x)
        optimizer.first_step()
        _backward(model, x)
        optimizer.second_step()
        held = [torch.equal(old, new) for old, new in zip(before[1::2], list(model.parameters())[1::2], strict=True)]
        assert held == [t % 3 == 0] * 3  # the biases, which no mask touches
        verify(model, optimizer)


# Backward passes without steps


def test_backward_passes_without_a_step_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    followed, stepped = _sgd(model), _sgd(model)
    trainer = SRigL(model, followed, **OPTIONS)
    train(model, stepped, batches(60))
    assert trainer.steps == 0
    assert [record.message for record in caplog.records] == [
        "20 backward passes and no step of SGD: masks are updated at its steps alone. Attach the trainer to the "
        "optimizer that steps"
    ]


@pytest.mark.parametrize("set_to_none", [False, True])
def test_many_micro_batches_are_not_backward_passes_without_a_step(
    set_to_none: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = mlp()
    optimizer = _sgd(model)
    SRigL(model, optimizer, **OPTIONS)
    for _ in range(4):
        optimizer.zero_grad(set_to_none)
        for x in batches(40):
            _backward(model, x)
        optimizer.step()
    assert not caplog.records


# Parameters whose content is swapped


@pytest.fixture
def swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def _reload(model: nn.Module) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})


def _convert(model: nn.Module) -> None:
    model.to(torch.float64).to(torch.float32)


def _swap(model: nn.Module) -> None:
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))  # type: ignore[no-untyped-call]


WAYS = {"load_state_dict": _reload, "to": _convert, "swap_tensors": _swap}


@pytest.mark.parametrize(
    ("way", "when"),
    [*itertools.product(WAYS, ["before the first step", "between steps", "while capturing"]), ("to", "with gradients")],
)
@pytest.mark.usefixtures("swapping")
def test_swapped_parameters_train_on(way: str, when: str) -> None:
    """Masks, weights and what clipping sees are those of a run in which nothing was swapped."""
    model = mlp()
    plain = copy.deepcopy(model)
    optimizer, other = _sgd(model), _sgd(plain)
    trainer = SRigL(model, optimizer, **OPTIONS)
    SRigL(plain, other, **OPTIONS)
    at = {"before the first step": 0, "between steps": 4, "while capturing": 5, "with gradients": 4}[when]
    for t, x in enumerate(batches(12)):
        if t == at and when != "with gradients":
            optimizer.zero_grad()
            WAYS[way](model)
        for module, steps in ((model, optimizer), (plain, other)):
            steps.zero_grad()
            _backward(module, x)
        if t == at and when == "with gradients":
            WAYS[way](model)
        if not (way == "swap_tensors" and t == at):  # nobody tells of that: the next step does
            for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert mine.grad is not None
                assert theirs.grad is not None
                assert torch.equal(mine.grad, theirs.grad)
        optimizer.step()
        other.step()
        verify(model, optimizer)
    assert (trainer.steps, trainer.last_update) == (12, 12)
    _assert_same(model, plain)


@pytest.mark.usefixtures("swapping")
def test_a_swap_that_nobody_tells_of_is_found(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = _sgd(model)
    trainer = SRigL(model, optimizer, **OPTIONS)
    train(model, optimizer, batches(1))
    optimizer.zero_grad()
    _swap(model)
    with pytest.raises(InvariantError, match=r"0\.weight: the parameter was given other content.*swap_tensors"):
        verify(model, optimizer)
    train(model, optimizer, batches(6), lambda: verify(model, optimizer))
    assert trainer.last_update == 6
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the gradient of 0.weight came past the trainer's hooks"
    ]


def test_the_tensor_that_was_swapped_away_is_left_alone() -> None:
    model = mlp()
    optimizer = _sgd(model)
    trainer = RigL(model, optimizer, **OPTIONS)
    weight = sparse_weights(model)[1].weight
    other = nn.Parameter(weight.detach().clone())
    torch.utils.swap_tensors(weight, other)  # type: ignore[no-untyped-call]
    trainer.engine.refresh()
    torch.autograd.backward((2 * other).sum())  # it still calls the hooks that it had
    assert other.grad is not None
    assert bool((other.grad == 2).all())
    train(model, optimizer, batches(7), lambda: verify(model, optimizer))
    assert trainer.last_update == 6


@pytest.mark.usefixtures("swapping")
def test_hooks_of_others_stay_and_can_be_removed() -> None:
    model = mlp()
    weight = sparse_weights(model)[0].weight
    calls: list[str] = []
    early = weight.register_hook(lambda _: calls.append("early"))  # type: ignore[no-untyped-call]
    late = weight.register_post_accumulate_grad_hook(lambda _: calls.append("late"))  # type: ignore[no-untyped-call]
    optimizer = _sgd(model)
    trainer = SRigL(model, optimizer, **OPTIONS)
    train(model, optimizer, batches(3))
    assert calls == ["early", "late"] * 3
    early.remove()
    late.remove()
    train(model, optimizer, batches(3))
    assert calls == ["early", "late"] * 3
    assert trainer.last_update == 6
    trainer.detach()
    assert hook_count(model, optimizer) == 0


@pytest.mark.usefixtures("swapping")
def test_a_new_trainer_after_a_swap_without_one() -> None:
    model = mlp()
    optimizer = _sgd(model)
    SRigL(model, optimizer, **OPTIONS).detach()
    _convert(model)
    optimizer = _sgd(model)
    trainer = SRigL(model, optimizer, **OPTIONS)
    train(model, optimizer, batches(4), lambda: verify(model, optimizer))
    assert trainer.last_update == 3


def test_marks_stay_with_the_model_that_trains() -> None:
    model = mlp()
    optimizer = _sgd(model)
    trainer = SRigL(model, optimizer, **OPTIONS)
    train(model, optimizer, batches(1))
    trainer.detach()
    assert not any(vars(parameter) for parameter in model.parameters())


# Gradients that come past the hooks


@pytest.mark.parametrize("method", [SRigL, SET])
def test_gradients_written_by_hand_count_for_growth(method: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    plain = copy.deepcopy(model)
    optimizer, other = _sgd(model), _sgd(plain)
    method(model, optimizer, **OPTIONS)
    method(plain, other, **OPTIONS)
    for x in batches(7):
        optimizer.zero_grad()
        found = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        verify(model, optimizer)
    train(plain, other, batches(7))
    _assert_same(model, plain)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the gradient of 0.weight came past the trainer's hooks"
    ]


def test_gradients_that_are_zeroed_are_no_gradients(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    optimizer = _sgd(model)
    SRigL(model, optimizer, **OPTIONS)
    train(model, optimizer, batches(2))
    start = mask_copies(model)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert same(start, mask_copies(model))
    assert [record.message for record in caplog.records] == ["update at step 3 postponed: no gradients"]


def test_a_mask_that_was_written_past_its_version_is_found() -> None:
    model = mlp()
    optimizer = _sgd(model)
    Static(model, optimizer)
    train(model, optimizer, batches(1))
    handle = sparse_weights(model)[0]
    handle.mask.data.copy_(handle.mask.roll(1, 1))
    with torch.no_grad():
        handle.weight.mul_(handle.mask)
    optimizer.state.clear()
    with pytest.raises(InvariantError, match=r"0\.weight: the trainer masks by another mask"):
        verify(model, optimizer)
