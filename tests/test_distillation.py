"""Students that are trained to give what their teachers give: ``distil`` and its loss."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn

import srigl_fx as sx
from srigl_fx.distillation import DistillationReport
from srigl_fx.distillation_loss import unexplained
from srigl_fx.errors import DistillationError, TrainerError
from srigl_fx.masks.attached import engines


def teacher() -> Any:
    return randomise(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20), nn.GELU(), nn.Linear(20, 6)))


def pair(sparsity: float = 0.75) -> tuple[Any, Any]:
    """A sparse student and its dense teacher."""
    dense = teacher()
    return sx.sparsify(copy.deepcopy(dense), sparsity=sparsity, distribution="uniform"), dense


def batches(count: int = 12, *, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 24, generator=draw) for _ in range(count)]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())


def share(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted) ** 2).sum() / ((wanted - wanted.mean(dim=0)) ** 2).sum())


class Reader(nn.Module):
    """States (N, L, D) of two layers, and the mean over the tokens of each text."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 7)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        states = self.second(torch.tanh(self.first(x)))
        weights = mask.unsqueeze(-1)
        return {"length": x.shape[1], "mean": (states * weights).sum(dim=1) / weights.sum(dim=1), "ids": mask.long()}


MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])


@torch.no_grad()
def test_the_loss_by_hand() -> None:
    models: list[Any] = [randomise(Reader(), seed=seed) for seed in (0, 1)]
    (student, dense), x = models, torch.randn(4, 7, 3)
    real = MASK.bool()  # as wide as the vectors: these are no positions
    seen = []
    for model in models:
        first = model.first(x)
        second = model.second(torch.tanh(first))
        means = torch.stack([second[row][real[row]].mean(dim=0) for row in range(4)])
        seen.append((first[real], second[real], means))
    shares = [share(*both) for both in zip(*seen, strict=True)]
    options: dict[str, Any] = {"states": ["first", "second"], "positions": lambda x, mask: mask.bool()}
    found = sx.DistillationLoss(dense, **options)(student, x, MASK)
    assert float(found) == pytest.approx((shares[0] + shares[1]) / 2 + shares[2], rel=1e-5)
    assert float(sx.DistillationLoss(dense)(student, x, mask=MASK)) == pytest.approx(shares[2], rel=1e-5)
    spoiled = x.masked_fill(~real.unsqueeze(2), 99.0)
    assert float(sx.DistillationLoss(dense, **options)(student, spoiled, MASK)) == pytest.approx(float(found), rel=1e-5)


def test_targets_that_do_not_vary_have_a_loss() -> None:
    same = torch.full((4, 2), 3.0)
    assert float(unexplained(same + 0.5, same)) == pytest.approx(2.0)
    alone = torch.tensor([[1.0, 3.0]])
    assert float(unexplained(torch.tensor([[1.0, 2.0]]), alone)) == pytest.approx(0.5)
    assert float(unexplained(torch.tensor(2.0), torch.tensor(1.0))) == 1.0


def test_steps_are_those_of_a_loop_by_hand() -> None:
    dense, given = teacher(), batches(7)
    student = randomise(copy.deepcopy(dense), seed=1)
    other = copy.deepcopy(student)
    report = sx.distil(student, dense, given, learning_rate=2e-3, warm_up=0.3)
    optimizer = torch.optim.AdamW(other.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=7, pct_start=0.3)
    losses = []
    for x in given:
        loss = unexplained(other(x), dense(x).detach())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert_same(student, values(other))
    assert report == DistillationReport(tuple(losses))
    assert str(report) == f"7 steps: loss {losses[0]:.4g} -> {losses[-1]:.4g}, means of 1"
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_sparse_student_comes_nearer_and_keeps_its_masks() -> None:
    student, dense = pair()
    frozen = student[2].bias.requires_grad_(False).clone()
    before, masks = values(dense), {name: mask.clone() for name, mask in sx.masks.named_masks(student)}
    seen = []
    report = sx.distil(
        student,
        dense,
        batches(2),
        states=["0", "2"],
        steps=60,
        learning_rate=5e-3,
        progress=lambda *now: seen.append(now),
    )
    assert report.steps == 60
    assert report.losses[-1] < 0.7 * report.losses[0]
    assert seen == [(step, 60) for step in range(1, 61)]
    assert all(torch.equal(mask, masks[name]) for name, mask in sx.masks.named_masks(student))
    assert torch.equal(student[2].bias, frozen)
    sx.verify(student)
    assert_same(dense, before)
    assert not engines(student)
    sx.Static(student, torch.optim.SGD(student.parameters(), lr=0.1))  # another one can be attached


def test_a_trainer_exchanges_weights_on_the_way() -> None:
    student, dense = pair()
    masks = {name: mask.clone() for name, mask in sx.masks.named_masks(student)}
    sx.distil(student, dense, batches(), trainer=functools.partial(sx.SRigL, update_every=3, ablation=0.3))
    assert any(not torch.equal(mask, masks[name]) for name, mask in sx.masks.named_masks(student))
    sx.verify(student)
    assert not engines(student)


def test_batches_begin_anew_and_may_be_keyword_arguments() -> None:
    student, dense = pair()
    twice, other = copy.deepcopy(student), copy.deepcopy(student)
    given = batches(3)
    sx.distil(student, dense, given, steps=5)
    sx.distil(twice, dense, [*given, *given[:2]])
    assert_same(student, values(twice))
    sx.distil(other, dense, (((), {"input": x}) for x in (*given, *given[:2], given[0])), steps=5)
    assert_same(other, values(twice))


def test_few_steps_have_a_rate() -> None:
    for count in (1, 2, 3):
        student, dense = pair()
        before = values(student)
        assert sx.distil(student, dense, batches(count)).steps == count
        assert not torch.equal(student[0].weight, before["0.weight"])


def test_outputs_are_picked_and_compared_as_asked() -> None:
    student, dense = pair()
    x = batches(1)[0]
    measure = sx.DistillationLoss(
        dense, outputs=lambda y: {"a": y[:, :2], "b": y[:, 4:]}, loss=lambda one, other: (one - other).abs().max()
    )
    gap = (student(x) - dense(x)).abs().detach()
    assert measure(student, x).item() == pytest.approx(float(gap[:, :2].max() + gap[:, 4:].max()) / 2)


def test_the_teacher_is_evaluated_and_keeps_its_mode() -> None:
    dense = nn.Sequential(teacher(), nn.Dropout(0.5), nn.BatchNorm1d(6)).train()
    dense[0].eval()
    before, x = values(dense), batches(1)[0]
    student = copy.deepcopy(dense).eval()
    assert sx.DistillationLoss(dense)(student, x).item() == 0
    assert [module.training for module in dense] == [False, True, True]
    assert_same(dense, before)


def test_states_are_found_in_a_wrapped_student() -> None:
    student, dense = pair()
    x = batches(1)[0]
    measure = sx.DistillationLoss(dense, states=["2"])
    assert measure(nn.DataParallel(student), x).item() == measure(student, x).item() > 0


def test_autocast_computes_both_models_shortly() -> None:
    student, dense = pair()
    given = batches(6)
    short = copy.deepcopy(student)
    seen = []
    dense[2].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    reports = [
        sx.distil(student, dense, given),
        sx.distil(short, dense, given, autocast=torch.bfloat16),
        sx.distil(short, dense, given[:1], autocast="auto"),
    ]
    assert seen[:12] == 6 * [torch.float32] + 6 * [torch.bfloat16]
    assert seen[12] in (torch.float32, torch.bfloat16)
    assert student[0].weight.dtype is short[0].weight.dtype is torch.float32
    first, second = (report.losses[0] for report in reports[:2])
    assert 0 < abs(first - second) < 0.02 * first


def test_autocast_of_the_caller_stays() -> None:
    student, dense = pair()
    seen = []
    for model in (student, dense):
        model[2].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        sx.DistillationLoss(dense)(student, batches(1)[0])
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_gradients_of_what_is_not_trained_count_for_nothing() -> None:
    student, dense = pair()
    student[4].requires_grad_(False)
    alike = copy.deepcopy(student)
    student[4].weight.grad = torch.full_like(student[4].weight, 1e6)
    for one in (student, alike):
        sx.distil(one, dense, batches(2))
    assert_same(student, values(alike))
    assert float(student[4].weight.grad.max()) == 1e6


class Stopped(KeyboardInterrupt):
    pass


def _stop(done: int, steps: int) -> None:
    if done == 7:
        raise Stopped("after 7 steps")


def _spoiled(given: list[Tensor]) -> list[Tensor]:
    return [*given[:6], given[6].log(), *given[7:]]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({}, DistillationError, r"the loss of step 7 is nan: take a learning_rate below 0\.0005"),
        ({"progress": _stop}, Stopped, "after 7 steps"),
        (
            {"batches": iter(batches(4)), "steps": 5},
            DistillationError,
            "the batches end after 4 of 5 steps: give a list",
        ),
        ({"batches": [*batches(4), "text"]}, DistillationError, "batch 4: example inputs must be a tuple"),
    ],
)
def test_a_failure_leaves_the_student_as_it_was(change: dict[str, Any], error: type[BaseException], words: str) -> None:
    dense = nn.Sequential(teacher(), nn.BatchNorm1d(6))
    student = sx.sparsify(copy.deepcopy(dense), sparsity=0.75, distribution="uniform").train()
    before, identities = values(student), [id(parameter) for parameter in student.parameters()]
    trainer = functools.partial(sx.SRigL, update_every=2, ablation=0.3)
    options: dict[str, Any] = {"batches": _spoiled(batches()), "trainer": trainer} | change
    if "progress" in change:
        options["batches"] = batches()
    with pytest.raises(error, match=words):
        sx.distil(student, dense, **options)
    assert_same(student, before)
    assert [id(parameter) for parameter in student.parameters()] == identities
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not engines(student)
    assert student.training
    sx.verify(student)


def _nothing() -> Iterator[Tensor]:
    yield from ()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "empty": ({"batches": []}, "the batches are empty"),
    "an empty iterator": ({"batches": _nothing(), "steps": 3}, "the batches are empty"),
    "of unknown number": ({"batches": _nothing()}, "generator does not say how many batches it has: give steps="),
    "one tensor": ({"batches": torch.ones(3, 24)}, "batches must be an iterable of inputs, not Tensor"),
    "a dict": ({"batches": [{"x": torch.ones(3, 24)}]}, "batch 0: example inputs must be a tuple"),
    "no steps": ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
    "odd steps": ({"steps": True}, "steps must be a whole number"),
    "the rate": ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0, got nan"),
    "warm-up": ({"warm_up": 1.5}, r"warm_up must be a share of the steps in \[0, 1\], got 1.5"),
    "a state's name": ({"states": ["5"]}, "the teacher has no module '5'"),
    "states as text": ({"states": "0"}, "states must be a list of names of modules"),
    "outputs": ({"outputs": 3}, "outputs must be a function, got 3"),
    "a trainer": ({"trainer": "SRigL"}, "trainer must be a function, got 'SRigL'"),
    "no outputs": ({"outputs": lambda y: y.long()}, "the teacher returns no floating-point tensor to compare"),
    "whole numbers": ({"autocast": torch.int8}, "autocast must be a type such as torch.bfloat16"),
    "positions": ({"positions": lambda x: x}, "positions must give a tensor of bool, not torch.float32"),
    "no positions": ({"positions": lambda x: x > x}, "positions chooses none of a batch"),
    "a loss": ({"loss": lambda one, other: one - other}, r"loss must give a tensor of one number, not \(16, 6\)"),
    "infinite": ({"batches": [torch.full((16, 24), torch.inf)]}, "the loss of step 1 is nan: look at the inputs"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_refused(case: str) -> None:
    student, dense = pair()
    before = values(student)
    change, words = CASES[case]
    with pytest.raises(DistillationError, match=words):
        sx.distil(student, dense, **({"batches": batches(4)} | change))
    assert_same(student, before)
    assert not engines(student)


def _itself(student: Any, dense: Any) -> tuple[Any, Any]:
    return student, nn.DataParallel(student)


def _shared(student: Any, dense: Any) -> tuple[Any, Any]:
    dense[2].weight = student[2].weight
    return student, dense


def _frozen(student: Any, dense: Any) -> tuple[Any, Any]:
    return student.requires_grad_(False), dense


def _others(student: Any, dense: Any) -> tuple[Any, Any]:
    return student, dense[:4]


def _more(student: Any, dense: Any) -> tuple[Any, Any]:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    return nn.Sequential(student, Two()), dense


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_itself, "the teacher is the student: keep a copy.deepcopy"),
        (_shared, "the teacher shares 2.weight with the student"),
        (_frozen, "no parameter of the student requires gradients"),
        (_others, r"output 0 is \(16, 6\) of the student, \(16, 20\) of the teacher: pick what is compared"),
        (_more, "the student returns 2 floating-point tensors, the teacher 1"),
        (lambda student, dense: (student, 3), "the teacher must be a module, not int"),
        (lambda student, dense: (3, dense), "the student must be a module, not int"),
    ],
)
def test_pairs_that_do_not_fit_are_refused(make: Callable[[Any, Any], tuple[Any, Any]], words: str) -> None:
    with pytest.raises(DistillationError, match=words):
        sx.distil(*make(*pair()), batches(2))


def test_states_that_do_not_fit_are_named() -> None:
    student, dense = pair()
    wider = nn.Sequential(nn.Linear(24, 40), *dense[1:2], nn.Linear(40, 6))
    with pytest.raises(DistillationError, match=r"0 is \(16, 32\) of the student, \(16, 40\) of the teacher"):
        sx.distil(student, wider, batches(2), states=["0"])

    class Skips(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            first: Tensor = self[0](input)
            return first

    skips = Skips(nn.Linear(24, 6), nn.Linear(6, 6))
    with pytest.raises(DistillationError, match="1 of the teacher did not run: take it out of states"):
        sx.distil(nn.Sequential(nn.Linear(24, 6), nn.Linear(6, 6)), skips, batches(2), states=["1"])


def test_another_trainer_and_inference_mode_are_refused() -> None:
    student, dense = pair()
    with pytest.raises(DistillationError, match="inference_mode"), torch.inference_mode():
        sx.distil(student, dense, batches(2))
    with torch.no_grad():
        assert sx.distil(student, dense, batches(2)).steps == 2
    attached = sx.Static(student, torch.optim.SGD(student.parameters(), lr=0.1))
    with pytest.raises(TrainerError, match="a trainer is attached to this model already"):
        sx.distil(student, dense, batches(2))
    assert engines(student) == [attached.engine]
