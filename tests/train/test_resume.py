import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from train_support import batches, loss_of, mask_copies, mlp, same, srigl_run, through_a_file, train

from srigl_fx import sparsify
from srigl_fx.errors import InvariantError, StructureError, TrainerError
from srigl_fx.masks import verify
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static, checkpoint
from srigl_fx.train.base import Trainer

OPTIONS: dict[str, Any] = {"total_steps": 60, "update_every": 5, "ablation": 0.9, "drop_fraction": 0.5}


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, trainer: SRigL, gradients: bool = False) -> Any:
    return through_a_file((model.state_dict(), optimizer.state_dict(), trainer.state_dict(include_gradients=gradients)))


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
    model, optimizer, trainer = srigl_run(**options)
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
    model, optimizer, trainer = srigl_run()
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
    model, optimizer, trainer = srigl_run(auto=False)
    train(model, optimizer, data)
    state = _state(model, optimizer, trainer, gradients=True)
    other, _, other_trainer = _resume(state, auto=False)
    assert trainer.step()
    assert other_trainer.step()
    _assert_same(model, other)


def test_resuming_inside_a_wrapper() -> None:
    model, optimizer, trainer = srigl_run()
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
    model, optimizer, trainer = srigl_run()
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
    wrong = {**saved, "gradients": (("0.weight", torch.ones(3)),)}
    refused(TrainerError, r"fit no parameter of the model: 0\.weight", mlp(), wrong)


def test_a_dense_checkpoint_keeps_the_masks() -> None:
    model, optimizer, _ = srigl_run()
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
    state = through_a_file(trainer.state_dict())
    trainer.detach()
    resumed = Static(model, optimizer)
    resumed.load_state_dict(state)
    assert resumed.steps == 3


LATER = 26  # steps in all
METHODS: dict[str, Callable[..., Trainer]] = {
    "srigl": lambda m, o, **k: SRigL(m, o, ablation=0.9, **k),
    "srigl permanent": lambda m, o, **k: SRigL(m, o, ablation=0.9, permanent_ablation=True, **k),
    "rigl": RigL,
    "set": SET,
    "snfs": SNFS,
    "gmp": GMP,
    "static": lambda m, o, **_: Static(m, o),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.002, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
}


class _Session:
    """A run with dropout, a schedule and accumulation of two micro-batches a step, which can be saved anywhere."""

    def __init__(self, method: str, optimizer: str, seed: int = 0, **options: Any) -> None:
        torch.manual_seed(seed)
        layers = nn.Linear(24, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
        self.model = sparsify(nn.Sequential(*layers), sparsity=0.75, distribution="uniform", seed=seed)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        settings = {"total_steps": 40, "update_every": 5, "drop_fraction": 0.5, **options}
        self.trainer = METHODS[method](self.model, self.optimizer, **settings)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, [7, 18], gamma=0.5)
        self.generator = torch.Generator().manual_seed(seed)
        self.micro = 0

    def go(self, micro_batches: int) -> None:
        while self.micro < micro_batches:
            self.micro += 1
            torch.autograd.backward(loss_of(self.model, torch.randn(16, 24, generator=self.generator)) / 2)
            if self.micro % 2 == 0:
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        extra = {"scheduler": self.scheduler.state_dict(), "micro": self.micro, "rng": torch.get_rng_state()}
        extra["generator"] = self.generator.get_state()
        parts: Any = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        checkpoint.save(path, **parts, extra=extra, include_gradients=True)

    def load(self, path: Path) -> None:
        parts: Any = {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}
        extra = checkpoint.load(path, **parts)
        self.scheduler.load_state_dict(extra["scheduler"])
        self.micro = extra["micro"]
        torch.set_rng_state(extra["rng"])
        self.generator.set_state(extra["generator"])


POINTS = {
    "start": 0,
    "before the window": 6,
    "mid-accumulation": 13,
    "before": 18,
    "inside": 19,
    "after": 20,
    "late": 31,
}


def _resumes(tmp_path: Path, method: str, optimizer: str, micro: int, **options: Any) -> None:
    whole = _Session(method, optimizer, **options)
    whole.go(micro)
    whole.save(tmp_path / "last")
    at_cut = mask_copies(whole.model)
    whole.go(2 * LATER)
    resumed = _Session(method, optimizer, seed=1, **options)
    resumed.go(3)  # what it did before does not matter
    resumed.load(tmp_path / "last")
    verify(resumed.model, resumed.optimizer)
    resumed.go(2 * LATER)
    _assert_same(whole.model, resumed.model)
    assert whole.trainer.state_dict()["last_update"] == resumed.trainer.state_dict()["last_update"]
    assert same(at_cut, mask_copies(whole.model)) is (method == "static")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_at_every_point(tmp_path: Path, method: str, point: str) -> None:
    _resumes(tmp_path, method, "adamw", POINTS[point], **({} if method in ("static", "gmp") else {"grad_samples": 3}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["srigl", "snfs"])
def test_every_optimizer_resumes(tmp_path: Path, method: str, optimizer: str) -> None:
    _resumes(tmp_path, method, optimizer, POINTS["mid-accumulation"])


@pytest.mark.parametrize("gradients", [True, False])
def test_a_postponed_update_is_resumed(gradients: bool) -> None:
    data = list(batches(16))

    def spoiled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(model, data[4]) * torch.inf)
        for parameter in model.parameters():
            parameter.grad = None  # as a scaler that skips would, but the dense gradient was seen

    model, optimizer, trainer = srigl_run()
    train(model, optimizer, data[:4])
    spoiled(model, optimizer)
    optimizer.step()  # due, without a finite gradient
    assert trainer.state_dict()["update_due"]
    state = _state(model, optimizer, trainer, gradients=gradients)
    train(model, optimizer, data[5:])
    other, other_optimizer, other_trainer = _resume(state)
    assert other_trainer.state_dict()["update_due"]
    train(other, other_optimizer, data[5:])
    _assert_same(model, other)
    assert trainer.last_update == other_trainer.last_update == 15


@pytest.mark.parametrize("gradients", [True, False])
def test_a_pending_manual_update_needs_no_gradients(gradients: bool) -> None:
    data = list(batches(12))
    model, optimizer, trainer = srigl_run(auto=False)
    train(model, optimizer, data[:5])
    state = _state(model, optimizer, trainer, gradients=gradients)
    other, other_optimizer, other_trainer = _resume(state, auto=False)
    assert trainer.step()
    assert other_trainer.step()
    _assert_same(model, other)
    for net, stepping, update in ((model, optimizer, trainer.step), (other, other_optimizer, other_trainer.step)):
        for x in data[5:]:
            train(net, stepping, [x])
            update()
    _assert_same(model, other)


@pytest.mark.parametrize("cut", [4, 5, 7])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler(cut: int, fused: bool) -> None:
    data = list(batches(24))

    def start() -> tuple[nn.Module, torch.optim.Optimizer, SRigL, torch.amp.GradScaler]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
        return model, optimizer, SRigL(model, optimizer, **OPTIONS), scaler

    def go(run: tuple[nn.Module, torch.optim.Optimizer, SRigL, torch.amp.GradScaler], first: int, last: int) -> None:
        model, optimizer, _, scaler = run
        for i in range(first, last):
            optimizer.zero_grad()
            loss = loss_of(model, data[i]) * (torch.inf if i in (3, 9, 10) else 1.0)
            torch.autograd.backward(scaler.scale(loss))
            scaler.step(optimizer)
            scaler.update()

    torch.manual_seed(0)
    run = start()
    go(run, 0, cut)
    state = through_a_file((*(part.state_dict() for part in run[:3]), run[3].state_dict()))
    go(run, cut, 24)
    other = start()
    parts: tuple[Any, ...] = other
    for part, saved in zip(parts, state, strict=True):
        part.load_state_dict(saved)
    go(other, cut, 24)
    _assert_same(run[0], other[0])
    assert run[2].steps == other[2].steps == 21
    assert run[3].get_scale() == other[3].get_scale()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("cut", [7, 8])
@pytest.mark.parametrize("method", ["srigl", "snfs"])
def test_through_torch_distributed_checkpoint(tmp_path: Path, method: str, cut: int) -> None:
    whole = _Session(method, "adamw", grad_samples=3)
    whole.go(2 * cut + 1)

    def parts(session: _Session) -> dict[str, Any]:
        model, optimizer = get_state_dict(session.model, session.optimizer)
        return {"model": model, "optimizer": optimizer, "trainer": session.trainer.state_dict(include_gradients=True)}

    dcp_save(parts(whole), checkpoint_id=tmp_path, no_dist=True)
    rng, generator, scheduler = torch.get_rng_state(), whole.generator.get_state(), whole.scheduler.state_dict()
    whole.go(2 * LATER)
    resumed = _Session(method, "adamw", seed=1, grad_samples=3)
    state = parts(resumed)
    dcp_load(state, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        resumed.model, resumed.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    resumed.trainer.load_state_dict(state["trainer"])
    resumed.scheduler.load_state_dict(scheduler)
    resumed.micro = 2 * cut + 1
    torch.set_rng_state(rng)
    resumed.generator.set_state(generator)
    resumed.go(2 * LATER)
    _assert_same(whole.model, resumed.model)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("more", [{}, {"recipes": "{}"}], ids=["without a recipe", "with a recipe"])
def test_folders_of_torch_distributed_checkpoint_load_with_a_trainers_recipe_and_without(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    """A key that a folder lacks is refused by torch: a trainer asks for those alone that were always written."""
    always = {"threads", "version", "method", "steps", "last_update", "update_due", "weights", "captured"}
    session = _Session("srigl", "adamw")
    session.go(14)
    state = session.trainer.state_dict()
    assert state.keys() == always
    dcp_save({"trainer": {**state, **more}}, checkpoint_id=tmp_path, no_dist=True)
    resumed = _Session("srigl", "adamw")
    loaded = {"trainer": resumed.trainer.state_dict()}
    dcp_load(loaded, checkpoint_id=tmp_path, no_dist=True)
    resumed.trainer.load_state_dict(loaded["trainer"])
    assert resumed.trainer.steps == session.trainer.steps == 7


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_model_state_before_and_after_attaching(attached: bool, assign: bool) -> None:
    data = list(batches(24))
    model, optimizer, trainer = srigl_run()
    train(model, optimizer, data[:7])
    state = _state(model, optimizer, trainer)
    train(model, optimizer, data[7:])
    other = mlp()
    if not attached:
        other.load_state_dict(state[0], assign=assign)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    resumed = SRigL(other, other_optimizer, **OPTIONS)
    if attached:
        other.load_state_dict(state[0], assign=assign)
        if assign:  # the optimizer must hold the new parameters
            other_optimizer.param_groups[0]["params"] = list(other.parameters())
    other_optimizer.load_state_dict(state[1])
    resumed.load_state_dict(state[2])
    train(other, other_optimizer, data[7:], lambda: verify(other, other_optimizer))
    _assert_same(model, other)


def test_model_state_of_another_sparsity_is_found_by_the_trainer() -> None:
    model, optimizer, trainer = srigl_run()
    saved = trainer.state_dict()
    for foreign in (mlp(0.5), mlp(0.9), mlp(structure="unstructured")):
        model.load_state_dict(foreign.state_dict())
        with pytest.raises(InvariantError, match=r"0\.weight"):
            trainer.load_state_dict(saved)
        with pytest.raises(InvariantError, match=r"0\.weight"):
            verify(model, optimizer)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(32, 24), r"must be a bool tensor \(32, 24\), not torch.float32 \(32, 24\)"),
        (torch.ones(24, 32, dtype=torch.bool), r"must be a bool tensor \(32, 24\), not torch.bool \(24, 32\)"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_what_cannot_be_a_mask(mask: Tensor, message: str, assign: bool, traced: bool) -> None:
    model: nn.Module = mlp()
    if traced:
        net = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
        model = sparsify(torch.fx.symbolic_trace(net), sparsity=0.75, distribution="uniform")
    state = {**{name: torch.randn_like(v) if v.is_floating_point() else v for name, v in model.state_dict().items()}}
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("0.weight")}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({**state, "0.weight_mask": mask}, assign=assign)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    verify(model)


@pytest.mark.parametrize("key", ["steps", "last_update", "update_due", "weights", "captured"])
@pytest.mark.parametrize("value", ["missing", "x", -5])
def test_a_damaged_state_changes_nothing(key: str, value: Any) -> None:
    _, _, trainer = srigl_run()
    state = {**trainer.state_dict(), "steps": 17, key: value}
    if value == "missing":
        del state[key]
    with pytest.raises(TrainerError, match=f"damaged at .*{key}"):
        trainer.load_state_dict(state)
    assert trainer.steps == 0


@pytest.mark.parametrize("key", ["version", "method"])
@pytest.mark.parametrize("value", [torch.tensor([1, 1]), torch.tensor(1), None, [1]], ids=str)
def test_a_state_that_says_not_whose_it_is_changes_nothing(key: str, value: Any) -> None:
    _, _, trainer = srigl_run()
    with pytest.raises(TrainerError, match="this is no state of SRigL"):
        trainer.load_state_dict({**trainer.state_dict(), "steps": 17, key: value})
    assert trainer.steps == 0


def test_another_number_of_threads_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    _, _, trainer = srigl_run()
    state, threads = trainer.state_dict(), torch.get_num_threads()
    assert state["threads"] == threads
    trainer.load_state_dict(state)
    del state["threads"]  # as states were written before
    trainer.load_state_dict(state)
    assert not caplog.messages
    trainer.load_state_dict({**state, "threads": threads + 7, "steps": 17})
    assert trainer.steps == 17
    (message,) = caplog.messages
    assert f"saved with {threads + 7} threads and goes on with {threads}" in message
    with pytest.raises(TrainerError, match="damaged at threads"):
        trainer.load_state_dict({**state, "threads": "all"})
