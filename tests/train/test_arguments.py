"""The arguments that all methods share: one schedule in two spellings, exchangeable decays, honest signatures."""

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from functools import partial
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import nn
from train_support import batches, mask_copies, mlp, same, train

from srigl_fx.errors import TrainerError
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, SET, SNFS, RigL, Schedule, SRigL, Static
from srigl_fx.train.arguments import DEFAULTS, TrainerOptions
from srigl_fx.train.attach import check_attachable
from srigl_fx.train.base import Trainer
from srigl_fx.train.dynamic import DynamicTrainer, Layer
from srigl_fx.train.schedules import DropSchedule, constant, cosine, cosine_drop_fraction, inverse_power, linear

METHODS: tuple[type[Trainer], ...] = (SRigL, RigL, SET, SNFS, GMP, Static)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


# share of the drop fraction that is left after 0, 1/4, 1/2 and 3/4 of the time, worked out by hand
DECAYS: list[tuple[DropSchedule, tuple[float, ...]]] = [
    (cosine, (1.0, 0.8535533905932737, 0.5, 0.1464466094067262)),
    ("cosine", (1.0, 0.8535533905932737, 0.5, 0.1464466094067262)),
    (constant, (1.0, 1.0, 1.0, 1.0)),
    ("constant", (1.0, 1.0, 1.0, 1.0)),
    (linear, (1.0, 0.75, 0.5, 0.25)),
    ("linear", (1.0, 0.75, 0.5, 0.25)),
    (inverse_power, (1.0, 0.421875, 0.125, 0.015625)),
    ("inverse_power", (1.0, 0.421875, 0.125, 0.015625)),
    (partial(inverse_power, power=2), (1.0, 0.5625, 0.25, 0.0625)),
    (lambda progress: 1.0 if progress < 0.5 else 0.0, (1.0, 1.0, 0.0, 0.0)),
]
DECAY_IDS = [
    *(spelling for name in ("cosine", "constant", "linear", "inverse power") for spelling in (name, f"{name} by name")),
    *("inverse square", "a step of one's own"),
]


@pytest.mark.parametrize(("decay", "shares"), DECAYS, ids=DECAY_IDS)
def test_the_drop_fraction_falls_as_the_drop_schedule_says(decay: DropSchedule, shares: tuple[float, ...]) -> None:
    schedule = Schedule(drop_fraction=0.4, drop_schedule=decay)
    assert [schedule.drop_fraction_at(step, end=80) for step in (0, 20, 40, 60)] == pytest.approx(
        [0.4 * share for share in shares]
    )
    assert schedule.drop_fraction_at(80, end=80) == 0.0


@pytest.mark.parametrize(("decay", "shares"), [entry for entry in DECAYS if isinstance(entry[0], str)])
def test_a_trainer_replaces_what_its_drop_schedule_says(decay: DropSchedule, shares: tuple[float, ...]) -> None:
    model = mlp(structure="unstructured")
    for handle in sparse_weights(model):  # values that tell which weights an update dropped
        handle.weight.data.copy_(handle.mask * (1.0 + torch.arange(handle.mask.numel()).reshape(handle.mask.shape)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    class GrowElsewhere(RigL):
        def growth(self, layer: Layer) -> torch.Tensor:
            return (~layer.mask).double()

    trainer = GrowElsewhere(
        model, optimizer, total_steps=80, update_every=20, stop_at=1.0, drop_fraction=0.5, drop_schedule=decay
    )
    assert [trainer.drop_fraction_at(step) for step in (0, 20, 40, 60)] == pytest.approx(
        [0.5 * share for share in shares]
    )
    for share in shares[1:]:
        before = mask_copies(model)
        train(model, optimizer, batches(20))
        for name, mask in mask_copies(model).items():
            kept = int(before[name].sum())
            assert int((before[name] & ~mask).sum()) == int(kept * 0.5 * share + 1e-9)
    verify(model, optimizer)


def test_the_cosine_has_the_bits_it_always_had() -> None:
    schedule = Schedule(drop_fraction=0.3)
    for end in (75, 749, 1000, 24_000):
        for step in range(0, end + 2, max(1, end // 97)):
            assert schedule.drop_fraction_at(step, end=end) == cosine_drop_fraction(step, initial=0.3, end=end)


def test_a_schedule_is_one_frozen_object_for_runs_of_any_length() -> None:
    schedule = Schedule(update_every=4, drop_fraction=0.5, stop_at=0.5, grad_samples=2, drop_schedule="linear")
    assert schedule == Schedule(update_every=4, drop_fraction=0.5, stop_at=0.5, grad_samples=2, drop_schedule=linear)
    assert len({schedule, replace(schedule, drop_schedule=linear)}) == 1
    with pytest.raises(FrozenInstanceError):
        schedule.stop_at = 0.75  # type: ignore[misc]
    for total, end in ((40, 20), (1000, 500)):
        model = mlp()
        trainer = RigL(model, sgd(model), total_steps=total, schedule=schedule)
        assert (trainer.schedule, trainer.update_every, trainer.end) == (schedule, 4, end)
        assert (trainer.drop_fraction, trainer.grad_samples) == (0.5, 2)


@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_trains_as_its_arguments_do(method: Callable[..., Trainer]) -> None:
    arguments = {"update_every": 4, "drop_fraction": 0.5, "stop_at": 0.8, "grad_samples": 2, "drop_schedule": linear}
    ends = []
    for options in (arguments, {"schedule": Schedule(**arguments)}):  # type: ignore[arg-type]
        torch.manual_seed(0)
        model = mlp()
        optimizer = sgd(model)
        trainer = method(model, optimizer, total_steps=20, **options)
        train(model, optimizer, batches(20))
        ends.append((mask_copies(model), trainer.update_every, trainer.end, trainer.grad_samples))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_schedule": "cosin"}, "drop_schedule is 'cosin'; choose one of 'cosine', 'constant', 'linear'"),
        ({"drop_schedule": None}, "drop_schedule is None; choose one of"),
        ({"drop_schedule": 0.3}, "drop_schedule is 0.3; choose one of"),
        ({"drop_schedule": lambda progress: 1 + progress}, r"drop_schedule\(0.25\) is 1.25, but must be a number in"),
        ({"drop_schedule": lambda progress: None}, r"drop_schedule\(0\) is None, but must be a number"),
        ({"schedule": "cosine"}, "schedule is 'cosine', but must be a srigl_fx.train.Schedule"),
        (
            {"schedule": Schedule(), "stop_at": 0.75},
            r"schedule and stop_at are given.*replace\(schedule, stop_at=",
        ),
        ({"schedule": Schedule(update_every=99)}, "the masks would never change"),
        ({"schedule": Schedule(update_every=5, grad_samples=6)}, "only 5 steps lie between two updates"),
    ],
    ids=[
        *("a misspelt decay", "no decay", "a number for a decay", "a decay that rises", "a decay that returns nothing"),
        *("no schedule", "a schedule and a part of it", "a schedule without an update", "more gradients than steps"),
    ],
)
def test_a_schedule_that_is_none_is_refused(options: dict[str, Any], message: str) -> None:
    model = mlp()
    optimizer = sgd(model)
    with pytest.raises(TrainerError, match=message):
        SRigL(model, optimizer, total_steps=100, **options)
    Static(model, optimizer)


def test_a_decay_that_goes_astray_later_changes_no_mask() -> None:
    model = mlp()
    optimizer = sgd(model)
    RigL(model, optimizer, total_steps=100, update_every=5, drop_schedule=lambda p: 2.0 if 0 < p < 0.1 else 1.0)
    before = mask_copies(model)
    with pytest.raises(TrainerError, match=r"drop_schedule\(0.0666667\) is 2.0, but must be a number in \[0, 1\]"):
        train(model, optimizer, batches(5))
    assert same(before, mask_copies(model))


def test_the_drop_fraction_can_be_set_while_training() -> None:
    model = mlp()
    trainer = RigL(model, sgd(model), total_steps=100, update_every=5)
    trainer.drop_fraction = 0.6
    assert trainer.drop_fraction_at(5) == cosine_drop_fraction(5, initial=0.6, end=75)
    with pytest.raises(TrainerError, match="drop_fraction is 2"):
        trainer.drop_fraction = 2


@pytest.mark.parametrize("method", [*METHODS, DynamicTrainer])
def test_the_signature_names_every_argument_with_its_default(method: type[Trainer]) -> None:
    parameters = inspect.signature(method).parameters
    assert list(TrainerOptions.__annotations__) == list(DEFAULTS)
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS
    assert list(parameters)[:3] == ["model", "optimizer", "total_steps"]
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize("method", METHODS)
def test_an_argument_that_there_is_not_is_a_type_error(method: Callable[..., Trainer]) -> None:
    model = mlp()
    optimizer = sgd(model)
    name = getattr(method, "__name__", "")
    with pytest.raises(TypeError, match=rf"^{name}.__init__\(\) got an unexpected keyword argument 'update_evry'$"):
        method(model, optimizer, total_steps=100, update_evry=5)
    if method not in (GMP, SNFS, Static):
        with pytest.raises(TypeError, match=rf"^{name}.__init__\(\) missing 1 required .*'total_steps'$"):
            method(model, optimizer)
    Static(model, optimizer)


def test_a_method_with_a_constructor_of_its_own_passes_the_rest_on() -> None:
    class Cautious(RigL):
        def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
            super().__init__(model, optimizer, total_steps=100, drop_fraction=0.1, **options)

    model = mlp()
    trainer = Cautious(model, sgd(model), update_every=7)
    assert (trainer.drop_fraction, trainer.update_every) == (0.1, 7)
    assert list(inspect.signature(Cautious).parameters) == ["model", "optimizer", "options"]


@pytest.mark.parametrize("method", METHODS)
def test_attaching_checks_the_model_once(method: Callable[..., Trainer]) -> None:
    model = mlp()
    optimizer = sgd(model)
    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        calls.update([frame.f_code] if event == "call" else [])

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        method(model, optimizer, total_steps=100)
    finally:
        sys.setprofile(before)
    assert calls[check_attachable.__code__] == 1
    # Once to attach; twice by the list that the model keeps of its masked weights, before and after processes agree;
    # GMP once more, to open the masks of weights that it has marked.
    assert calls[sparse_weights.__code__] <= 4
