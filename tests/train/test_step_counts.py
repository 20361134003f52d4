"""With a count of steps of its own, a weight that grows makes the steps of a parameter that was made when it grew."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from train_support import batches, loss_of, mlp, train
from train_support.cohorts import Cohorts, Make, both, follow, rmsprop

from srigl_fx import verify
from srigl_fx.errors import TrainerError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static, checkpoint, compute_sparse

OPTIMIZERS: dict[str, tuple[Make, Make]] = {
    "Adam": both(torch.optim.Adam, lr=0.003),
    "Adam, L2": both(torch.optim.Adam, lr=0.003, weight_decay=0.1),
    "Adam, one at a time": both(torch.optim.Adam, lr=0.003, foreach=False),
    "Adam, foreach": both(torch.optim.Adam, lr=0.003, foreach=True),
    "Adam, fused": both(torch.optim.Adam, lr=0.003, fused=True),
    "Adam, tensor as learning rate": both(torch.optim.Adam, lr=torch.tensor(0.003), foreach=False),
    "Adam, fused, tensor as learning rate": both(torch.optim.Adam, lr=torch.tensor(0.003), fused=True),
    "Adam, tensors as options": both(
        torch.optim.Adam, lr=torch.tensor(0.003), betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False
    ),
    "Adam, amsgrad": both(torch.optim.Adam, lr=0.003, amsgrad=True),
    "Adam, maximize": both(torch.optim.Adam, lr=0.003, maximize=True),
    "AdamW": both(torch.optim.AdamW, lr=0.003, weight_decay=0.1),
    "AdamW, fused amsgrad": both(torch.optim.AdamW, lr=0.003, fused=True, amsgrad=True),
    "AdamW, short memory": both(torch.optim.AdamW, lr=0.003, betas=(0.5, 0.6)),
    "AdamW, no momentum": both(torch.optim.AdamW, lr=0.003, betas=(0.0, 0.999)),
    "Adamax": both(torch.optim.Adamax, lr=0.003),
    "NAdam": both(torch.optim.NAdam, lr=0.003),
    "NAdam, L2": both(torch.optim.NAdam, lr=0.003, weight_decay=0.1, foreach=False),
    "NAdam, decoupled": both(torch.optim.NAdam, lr=0.003, weight_decay=0.1, decoupled_weight_decay=True, maximize=True),
    "RAdam": both(torch.optim.RAdam, lr=0.003),
    "RAdam, L2": both(torch.optim.RAdam, lr=0.003, weight_decay=0.1, foreach=False),
    "Adagrad": both(torch.optim.Adagrad, lr=0.01),
    "Adagrad, decay": both(torch.optim.Adagrad, lr=0.01, lr_decay=0.1, weight_decay=0.1),
    "Adagrad, fused": both(torch.optim.Adagrad, lr=0.01, lr_decay=0.1, fused=True),
    "Adadelta": both(torch.optim.Adadelta, lr=0.5),
    "Rprop": both(torch.optim.Rprop, lr=0.001),
    "SGD": both(torch.optim.SGD, lr=0.05, momentum=0.9),
    "RMSprop": rmsprop(),
    "RMSprop, L2": rmsprop(weight_decay=0.1),
    "RMSprop, maximize": rmsprop(weight_decay=0.1, maximize=True),
    "RMSprop, centred": rmsprop(centered=True),
    "RMSprop, momentum": rmsprop(momentum=0.9),
    "RMSprop, centred momentum": rmsprop(centered=True, momentum=0.9, weight_decay=0.1),
}


def begun(step_count: str, kind: Any, method: Any = SRigL, **options: Any) -> tuple[nn.Module, Any]:
    """The same model, whatever the option, with a trainer."""
    torch.manual_seed(0)
    model = mlp()
    optimizer = kind(model.parameters(), lr=0.003)
    method(model, optimizer, step_count=step_count, **options)
    return model, optimizer


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_grown_weight_steps_as_a_parameter_of_its_own(name: str) -> None:
    make, make_young = OPTIMIZERS[name]
    model = mlp()
    optimizer = make(model.parameters())
    SRigL(model, optimizer, total_steps=60, update_every=4, stop_at=0.5, step_count="weight")
    assert follow(model, optimizer, Cohorts(model, make, make_young), batches(40)) > 200
    verify(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    make, make_young = OPTIMIZERS["AdamW"]
    model = mlp().to(dtype)
    optimizer = make(model.parameters())
    RigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 0.05, "atol": 0.002}
    assert follow(model, optimizer, Cohorts(model, make, make_young), batches(20), **tolerance) > 100


def test_by_hand() -> None:
    """A weight that grows at step 100 takes one learning rate at its first step, where Adam alone takes 0.98 of one."""
    for step_count, first in (("tensor", 0.1 * (1 - 0.999**101) ** 0.5 / 0.001**0.5), ("weight", 1.0)):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-12)
        method: Any = RigL
        method(model, optimizer, total_steps=1000, update_every=100, step_count=step_count)
        train(model, optimizer, batches(99))
        before = {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}
        train(model, optimizer, batches(1, seed=1))
        train(model, optimizer, batches(1, seed=2))
        for handle in sparse_weights(model):
            grown = handle.mask & ~before[handle.fqn]
            assert grown.any()
            steps = handle.weight[grown].abs()
            moved = steps[handle.weight.grad[grown] != 0]  # type: ignore[index]
            torch.testing.assert_close(moved, torch.full_like(moved, 1e-4 * first), rtol=1e-3, atol=0.0)


def test_others_are_not_touched() -> None:
    """The option changes what a weight that has grown takes, and nothing before anything grows."""
    runs = [begun(count, torch.optim.AdamW, total_steps=60, update_every=5) for count in ("tensor", "weight")]
    for run in runs:
        train(*run, batches(5))
    (one, first), (other, second) = runs
    assert_same_weights(one, other)
    for run in runs:
        train(*run, batches(1, seed=1))
    handles = zip(sparse_weights(one), sparse_weights(other), strict=True)
    assert any(not torch.equal(mine.weight, theirs.weight) for mine, theirs in handles)
    assert torch.equal(one.get_parameter("0.bias"), other.get_parameter("0.bias"))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(first.state[mine]["step"], second.state[theirs]["step"])


@pytest.mark.parametrize("method", [SRigL, RigL, SET, SNFS, GMP, Static])
def test_every_method_takes_the_option(method: Any) -> None:
    model = mlp()
    optimizer = torch.optim.NAdam(model.parameters(), lr=0.003)
    trainer = method(model, optimizer, total_steps=20, update_every=3, step_count="weight")
    train(model, optimizer, batches(12), check=lambda: verify(model, optimizer))
    assert bool(trainer.state_dict().get("step_counts")) is (method not in (GMP, Static))


@pytest.mark.parametrize("kind", [torch.optim.ASGD, torch.optim.Adafactor, type("Own", (torch.optim.AdamW,), {})])
def test_an_optimizer_that_is_not_known_is_refused(kind: Any) -> None:
    model = mlp()
    optimizer = kind(model.parameters())
    with pytest.raises(TrainerError, match=rf'step_count="weight" knows .*: what {kind.__name__} makes of .*0\.weight'):
        SRigL(model, optimizer, total_steps=20, step_count="weight")
    SRigL(model, optimizer, total_steps=20)  # nothing was left behind


def test_another_choice_is_refused() -> None:
    model = mlp()
    with pytest.raises(TrainerError, match='step_count is \'neuron\'; choose "tensor" or "weight"'):
        SRigL(model, torch.optim.Adam(model.parameters()), total_steps=20, step_count="neuron")  # type: ignore[arg-type]


class Lookahead(Optimizer):
    """Moves the weights once more behind the inner step, when it is time."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.now = inner, False
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step(closure)
        if self.now:
            fast = (p for group in self.param_groups for p in group["params"])
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.copy_(parameter.lerp_(slow, 0.5))


@pytest.mark.slow
def test_inside_a_wrapper_the_step_itself_is_corrected() -> None:
    """Lookahead halves what the inner optimizer and the count of steps have made of the weight, all of it."""
    seen = []
    for wrap in (False, True):
        torch.manual_seed(0)
        model = mlp()
        inner = torch.optim.AdamW(model.parameters(), lr=0.003)
        optimizer: Any = Lookahead(inner) if wrap else inner
        SRigL(model, optimizer, total_steps=60, update_every=3, step_count="weight")
        train(model, optimizer, batches(3))
        handle = sparse_weights(model)[0]
        before = handle.weight.detach().clone()
        if wrap:
            optimizer.now = True
            optimizer.slow = [p.detach().clone() for p in model.parameters()]
        train(model, optimizer, batches(1, seed=3))
        seen.append(handle.weight.detach() - before)
    assert seen[0].any()
    torch.testing.assert_close(seen[1], seen[0] / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad])
def test_steps_that_a_gradient_scaler_skips_do_not_count(kind: Any, fused: bool) -> None:
    options = {"lr_decay": 0.1} if kind is torch.optim.Adagrad else {}
    make, make_young = both(kind, lr=0.003, fused=fused, weight_decay=0.1, **options)
    model = mlp()
    optimizer = make(model.parameters())
    trainer = RigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    cohorts, scaler = Cohorts(model, make, make_young), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number, x in enumerate(batches(24)):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        scaler.scale(loss).backward()
        skipped = number % 5 == 4
        clean = [None if p.grad is None else p.grad / scaler.get_scale() for p in model.parameters()]
        if skipped:
            next(model.parameters()).grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        if not skipped:
            for parameter, grad in zip(model.parameters(), clean, strict=True):
                parameter.grad = grad
            cohorts.step({})
        cohorts.follow()
        cohorts.check(1e-5, 2e-6)
    assert trainer.steps == 20


def test_a_step_without_a_gradient_does_not_count() -> None:
    make, make_young = OPTIMIZERS["RMSprop, momentum"]
    model = mlp()
    optimizer = make(model.parameters())
    SET(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    cohorts = Cohorts(model, make, make_young)
    follow(model, optimizer, cohorts, batches(8))
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.step()
        cohorts.check(1e-5, 2e-6)
        cohorts.follow()
    follow(model, optimizer, cohorts, batches(8, seed=1))


def test_a_closure_gives_the_gradients() -> None:
    models = []
    for closed in (False, True):
        model, optimizer = begun("weight", torch.optim.RMSprop, total_steps=60, update_every=4)
        for x in batches(14):

            def closure(x: Tensor = x, model: nn.Module = model, optimizer: Optimizer = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            if closed:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        models.append(model)
    assert_same_weights(*models)


@pytest.mark.parametrize("name", ["AdamW", "NAdam, L2", "RMSprop, centred momentum", "Adagrad, decay"])
def test_with_steps_of_the_kept_weights_alone(name: str) -> None:
    make, make_young = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = mlp(0.9)
    optimizer = make(model.parameters())
    trainer = SRigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    with compute_sparse(trainer) as sparse:
        assert sparse.steps_kept
        assert follow(model, optimizer, Cohorts(model, make, make_young), batches(20), rtol=1e-4, atol=1e-5) > 50
        optimizer.state_dict()
        verify(model, optimizer)
        train(model, optimizer, batches(4, seed=2))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("name", ["AdamW", "NAdam, L2", "RMSprop, momentum"])
def test_in_a_compiled_step(name: str) -> None:
    make, _ = OPTIMIZERS[name]
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = mlp()
        optimizer = make(model.parameters())
        SRigL(model, optimizer, total_steps=60, update_every=3, step_count="weight")

        def step(x: Tensor, model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()

        part = torch.compile(step, backend="aot_eager") if compiled else step
        for x in batches(14):
            part(x)
        verify(model, optimizer)
        models.append(model)
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        # The compiled optimizers themselves round another way.
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "NAdam, L2"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_run_resumes_exactly(tmp_path: Path, name: str, sparse: bool) -> None:
    def start(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = mlp(0.9)
        optimizer = OPTIMIZERS[name][0](model.parameters())
        trainer = SRigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
        if sparse:
            compute_sparse(trainer)
        return {"model": model, "optimizer": optimizer, "trainer": trainer}

    whole, resumed = start(0), start(1)
    train(resumed["model"], resumed["optimizer"], batches(6, seed=9))
    train(whole["model"], whole["optimizer"], batches(14))
    checkpoint.save(tmp_path / "last", **whole)
    checkpoint.load(tmp_path / "last", **resumed)
    for run in (whole, resumed):
        train(run["model"], run["optimizer"], batches(10, seed=1))
    assert_same_weights(whole["model"], resumed["model"])
    assert whole["trainer"].state_dict()["step_counts"]


def test_a_state_from_before_has_no_young_weights(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="srigl_fx")
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    trainer = SRigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    train(model, optimizer, batches(9))
    state = trainer.state_dict()
    former = {key: value for key, value in state.items() if key != "step_counts"}
    trainer.load_state_dict(former)
    assert "counted no steps of single weights" in caplog.text
    caplog.clear()
    assert trainer.state_dict()["step_counts"] == ()
    trainer.load_state_dict(state)
    assert len(trainer.state_dict()["step_counts"]) == len(state["step_counts"]) == 3
    assert not caplog.text
    trainer.detach()
    plain = SRigL(model, optimizer, total_steps=60, update_every=4)
    plain.load_state_dict(former)
    assert not caplog.text
    plain.load_state_dict(state)
    assert 'pass step_count="weight" to go on' in caplog.text
    assert "step_counts" not in plain.state_dict()


@pytest.mark.parametrize("what", ["name", "twice", "order", "range", "kind", "length", "born", "products"])
def test_a_damaged_state_is_refused(what: str) -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    trainer = SRigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    train(model, optimizer, batches(9))
    state = trainer.state_dict()
    name, positions, born, products = state["step_counts"][0]
    rows: dict[str, tuple[Any, ...]] = {
        "name": (("other", positions, born, products),),
        "twice": (state["step_counts"][0],) * 2,
        "order": ((name, positions.flip(0), born, products),),
        "range": ((name, positions + 10**6, born, products),),
        "kind": ((name, positions.float(), born, products),),
        "length": ((name, positions, born[1:], products),),
        "born": ((name, positions, -born, products),),
        "products": ((name, positions, born, products / 0),),
    }
    with pytest.raises(TrainerError, match=r"counts of steps that fit no weight|damaged at step_counts"):
        trainer.load_state_dict({**state, "step_counts": rows[what]})
    after = trainer.state_dict()["step_counts"]
    assert all(torch.equal(one[1], other[1]) for one, other in zip(state["step_counts"], after, strict=True))


@pytest.mark.slow
def test_weights_are_young_only_as_long_as_it_matters() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003, betas=(0.5, 0.5))
    trainer = SRigL(model, optimizer, total_steps=400, update_every=10, step_count="weight")
    train(model, optimizer, batches(200))
    # 0.5**age is a quarter of the smallest difference of float32 at an age of 25; that is asked when the mask changes.
    for _, _, born, _ in trainer.state_dict()["step_counts"]:
        assert born.max() - born.min() < 25
    assert any(len(set(born.tolist())) == 3 for _, _, born, _ in trainer.state_dict()["step_counts"])


def test_a_mask_that_somebody_loads_ends_the_youth_of_what_is_gone() -> None:
    model = mlp()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.003, weight_decay=0.1)
    SRigL(model, optimizer, total_steps=60, update_every=4, step_count="weight")
    first = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches(9))
    model.load_state_dict(first)
    train(model, optimizer, batches(2), check=lambda: verify(model, optimizer))


def test_an_optimizer_that_begins_anew_makes_its_own_steps() -> None:
    """Its state is dropped, or an earlier one loaded: the parameter is younger than what grew in it."""
    runs = [begun(count, torch.optim.Adam, total_steps=100, update_every=10) for count in ("tensor", "weight")]
    for model, optimizer in runs:
        train(model, optimizer, batches(10))
        optimizer.state.clear()
        train(model, optimizer, batches(9, seed=1))
    assert_same_weights(runs[0][0], runs[1][0])
