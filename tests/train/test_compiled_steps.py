"""Whole training steps under torch.compile: each gives what the same step gives without it, and compiles once."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import Optimizer
from train_support import batches, loss_of, mask_copies, mlp, same

from srigl_fx import sparsify
from srigl_fx.masks import verify
from srigl_fx.masks.records import sparse_weights
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static
from srigl_fx.train.base import Trainer
from srigl_fx.train.sparse_compute import compute_sparse

# What torch itself warns of while it imports its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")

METHODS: list[type[Trainer]] = [SRigL, RigL, SET, SNFS, Static, GMP]
Step = Callable[[Tensor], None]
Compile = Callable[[Any], Any]


def _run(
    model: nn.Module,
    optimizer: Optimizer,
    compile_: Compile | None = None,
    *,
    what: str = "step",
    data: Iterable[Tensor] | None = None,
) -> None:
    """An ordinary loop of which ``what`` is compiled."""
    maybe: Compile = compile_ or (lambda function: function)

    def backward(x: Tensor) -> None:
        torch.autograd.backward(loss_of(model, x))

    def whole(x: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    part: Any = maybe({"step": whole, "backward": backward, "optimizer.step": optimizer.step}[what])
    for x in batches(14) if data is None else data:
        if what == "step":
            part(x)
            continue
        optimizer.zero_grad()
        (part if what == "backward" else backward)(x)
        (part if what == "optimizer.step" else optimizer.step)()


def _whole_step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def _pair(method: type[Trainer], model: nn.Module, **options: Any) -> list[tuple[nn.Module, Optimizer, Trainer]]:
    found: list[tuple[nn.Module, Optimizer, Trainer]] = []
    for module in (model, copy.deepcopy(model)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        trainer: Any = method
        settings = {"total_steps": 40, "update_every": 3, "drop_fraction": 0.5, **options}
        found.append((module, optimizer, trainer(module, optimizer, **settings)))
    return found


def _assert_same(one: nn.Module, other: nn.Module, first: Optimizer, second: Optimizer) -> None:
    assert same(mask_copies(one), mask_copies(other))
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.grad is not None
        assert theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)
        for name, value in first.state[mine].items():
            assert not isinstance(value, Tensor) or torch.equal(value, second.state[theirs][name])


@pytest.mark.long
@pytest.mark.parametrize("what", ["step", "backward", "optimizer.step"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_as_without_a_compiler(method: type[Trainer], what: str) -> None:
    (model, optimizer, trainer), (plain, other, expected) = _pair(method, mlp())
    start = mask_copies(model)
    counter = CompileCounterWithBackend("aot_eager")
    _run(model, optimizer, lambda step: torch.compile(step, backend=counter), what=what)
    _run(plain, other)
    _assert_same(model, plain, optimizer, other)
    assert (trainer.steps, trainer.last_update) == (expected.steps, expected.last_update)
    assert same(start, mask_copies(model)) == (method is Static)
    verify(model, optimizer)
    assert counter.frame_count <= 3  # the model, backward and the optimizer, once each


@pytest.mark.long
def test_connections_that_grow_train_in_a_compiled_step() -> None:
    (model, optimizer, _), (plain, other, _) = _pair(RigL, mlp())
    start = mask_copies(model)
    _run(model, optimizer, lambda step: torch.compile(step, backend="aot_eager"))
    _run(plain, other)
    _assert_same(model, plain, optimizer, other)
    handle = sparse_weights(model)[1]
    grown = handle.mask & ~start[handle.fqn]
    assert handle.weight.grad is not None
    assert grown.sum() > 20
    assert bool(handle.weight.grad[grown].any())
    assert bool(handle.weight[grown].any())


@pytest.mark.long
def test_a_compiled_step_equals_masking_by_hand_around_one() -> None:
    """AdamW compiled is not AdamW to the last bit, and so it is compared with itself."""
    model = mlp()
    by_hand = copy.deepcopy(model)
    optimizer, plain = (torch.optim.AdamW(module.parameters(), lr=0.01) for module in (model, by_hand))
    Static(model, optimizer)
    _run(model, optimizer, lambda step: torch.compile(step, backend="aot_eager"), data=batches(5))
    torch._dynamo.reset()
    step = torch.compile(plain.step, backend="aot_eager")
    for x in batches(5):
        plain.zero_grad()
        torch.autograd.backward(loss_of(by_hand, x))
        for handle in sparse_weights(by_hand):
            assert handle.weight.grad is not None
            handle.weight.grad.mul_(handle.mask)
        step()
    for mine, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.long
@pytest.mark.parametrize("setting", ["compiled_autograd", "trace_autograd_ops"])
@pytest.mark.parametrize("method", [SRigL, SET])
def test_other_ways_to_compile_the_backward_pass(method: type[Trainer], setting: str) -> None:
    (model, optimizer, _), (plain, other, _) = _pair(method, mlp())
    with torch._dynamo.config.patch({setting: True}):
        _run(model, optimizer, lambda step: torch.compile(step, backend="aot_eager"))
    _run(plain, other)
    _assert_same(model, plain, optimizer, other)


@pytest.mark.long
def test_a_transformed_weight_in_a_compiled_step() -> None:
    """While gradients are captured the forward computes the transform twice: one more graph, compiled once."""
    layers = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(24, 32)), nn.ReLU(), nn.Linear(32, 4))
    (model, optimizer, _), (plain, other, _) = _pair(SRigL, sparsify(layers, sparsity=0.75))
    counter = CompileCounterWithBackend("aot_eager")
    _run(model, optimizer, lambda step: torch.compile(step, backend=counter))
    _run(plain, other)
    _assert_same(model, plain, optimizer, other)
    assert counter.frame_count <= 6


# How often a step is compiled once the first update is over: where the number of kept weights grows beyond what there
# was room for (ablation), and each time that it has halved (from all to 5 %).
RECOMPILED: list[tuple[type[Trainer], int]] = [(RigL, 0), (SET, 0), (SNFS, 0), (Static, 0), (SRigL, 1), (GMP, 4)]


@pytest.mark.long
@pytest.mark.parametrize("what", ["step", "optimizer.step"])
@pytest.mark.parametrize(("method", "most"), RECOMPILED)
def test_steps_from_the_kept_weights_alone_are_not_compiled_anew_by_updates(
    method: type[Trainer], most: int, what: str
) -> None:
    layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).double()
    pair = _pair(method, sparsify(layers, sparsity=0.95), **({"ablation": 0.9} if method is SRigL else {}))
    (model, optimizer, trainer), (plain, other, expected) = pair
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(optimizer.step if what == "optimizer.step" else _whole_step, backend=counter)
    counts = []
    data = torch.randn(40, 32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with compute_sparse(trainer) as computing, compute_sparse(expected):
        assert computing.steps_kept
        for index, x in enumerate(data):
            if what == "step":
                compiled(model, optimizer, x)
            else:
                optimizer.zero_grad()
                loss_of(model, x).backward()
                compiled()
            _whole_step(plain, other, x)
            counts.append(counter.frame_count)
            if index == 20:
                optimizer.state_dict()
                other.state_dict()
        assert trainer.last_update == expected.last_update == (None if method is Static else 27)
    assert counts[3] <= 4  # the model, backward and the optimizer, which is once without momentum
    assert counts[-1] - counts[3] <= most, counts
    assert same(mask_copies(model), mask_copies(plain))
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    verify(model, optimizer)


@pytest.mark.parametrize("what", ["step", "optimizer.step"])
def test_a_whole_graph_with_hooks_is_refused(what: str) -> None:
    (model, optimizer, trainer), _ = _pair(SRigL, mlp())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    reason = "hooks of a srigl_fx trainer cannot be compiled" if what == "optimizer.step" else "zero_grad"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=reason):
        _run(model, optimizer, lambda step: torch.compile(step, backend="aot_eager", fullgraph=True), what=what)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert trainer.steps == 0
