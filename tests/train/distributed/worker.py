"""Run by torchrun: every scenario named on the command line, on all ranks; each rank writes what became of them.

``worker.py OUT NAME...`` writes ``OUT/<rank>.json``: "ok" or a traceback for each scenario.
"""

import contextlib
import copy
import datetime
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint
from train_support import loss_of

import srigl_fx as sx
from srigl_fx.errors import CheckpointError, InvariantError, SparsifyError, TrainerError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.masks.shards import local
from srigl_fx.train import GMP, SET, SNFS, RigL, SRigL, Static, ignore_masks
from srigl_fx.train.base import Trainer
from srigl_fx.train.distributed import Processes, gather
from srigl_fx.train.dynamic import Layer
from srigl_fx.train.engine import MaskEngine
from srigl_fx.train.schedules import DropSchedule
from srigl_fx.train.updates import rigl_update

OUT = Path(sys.argv[1])
GLOBAL_BATCH = 16
LEAVING = os.environ.get("LEAVING", "")  # how the last rank leaves the others


class Net(nn.Module):
    """Rows that do not divide by the number of processes, fewer rows than those, a tied and a checkpointed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 33)
        self.middle = nn.Linear(33, 33)
        self.tied = nn.Linear(33, 33)
        self.tied.weight = self.middle.weight
        self.head = nn.Linear(33, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(checkpoint(self.middle, x, use_reentrant=False))
        logits: Tensor = self.head(torch.relu(self.tied(x)))
        return logits


def sparse_net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    model = Net().double()
    return sx.sparsify(model, **{"sparsity": 0.75, "distribution": "uniform", "seed": seed, **options})


def data(steps: int, seed: int = 0, micro: int = 1) -> list[list[Tensor]]:
    """For each step, ``micro`` batches of all processes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(steps, micro, GLOBAL_BATCH, 24, generator=generator, dtype=torch.float64)
    return [list(step) for step in numbers]


def shard(model: nn.Module, *parts: nn.Module, **options: Any) -> nn.Module:
    for module in (*parts, model):
        fully_shard(module, **options)
    return model


def mine(batch: Tensor) -> Tensor:
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def run(
    model: nn.Module,
    optimizer: Optimizer,
    steps: list[list[Tensor]],
    *,
    share: Callable[[Tensor], Tensor] = mine,
    sync: Callable[[nn.Module, bool], contextlib.AbstractContextManager[None]] | None = None,
    to_none: bool = True,
    check: Callable[[], None] | None = None,
) -> None:
    for micro in steps:
        for index, batch in enumerate(micro):
            with sync(model, index == len(micro) - 1) if sync else contextlib.nullcontext():
                torch.autograd.backward(loss_of(model, share(batch)) / len(micro))
        optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)
        if check is not None:
            check()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_shape(model: nn.Module, name: str) -> torch.Size:
    return model.get_parameter(name).shape


def digest(model: nn.Module) -> str:
    masks = {handle.record.site.fqn: handle.mask for handle in sparse_weights(model)}
    return hashlib.sha256(b"".join(name.encode() + mask.numpy().tobytes() for name, mask in masks.items())).hexdigest()


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def assert_same_masks(model: nn.Module) -> None:
    assert len(set(everywhere(digest(model)))) == 1


def assert_equal_models(model: nn.Module, single: nn.Module) -> None:
    """Equal masks, and values that differ by the order of sums only."""
    masks = {handle.record.site.fqn: handle for handle in sparse_weights(model)}
    for other in sparse_weights(single):
        handle = masks[other.fqn]
        assert torch.equal(handle.mask, other.mask), other.fqn
        torch.testing.assert_close(whole(handle.weight), other.weight, rtol=1e-10, atol=1e-12)
        assert other.weight.any()


def raised(error: type[Exception], call: Callable[[], Any]) -> str:
    try:
        call()
    except error as caught:
        return str(caught)
    raise AssertionError(f"no {error.__name__}")


METHODS: dict[str, Callable[..., Trainer]] = {
    "SRigL": lambda *a, **k: SRigL(*a, **k, ablation=0.9, drop_fraction=0.5),
    "RigL": lambda *a, **k: RigL(*a, **k, drop_fraction=0.5),
    "SET": lambda *a, **k: SET(*a, **k, drop_fraction=0.5),
    "SNFS": lambda *a, **k: SNFS(*a, **k, drop_fraction=0.5),
    "GMP": GMP,
    "Static": Static,
}
EVERY_TWO: dict[str, Any] = {"total_steps": 40, "update_every": 2}


def methods() -> None:
    """Models that start differently on each rank train the same masks, with every method, on data of their own."""
    for sharded in (False, True):
        for name, method in METHODS.items():
            structure = "unstructured" if name == "RigL" else "constant_fan_in"
            seed = 0 if sharded else dist.get_rank()
            model: nn.Module = sparse_net(seed, structure=structure, mask_init="random")
            model = shard(model) if sharded else DistributedDataParallel(model)
            optimizer = AdamW(model.parameters(), lr=0.01)
            trainer = method(model, optimizer, **EVERY_TWO)
            assert_same_masks(model)
            start = digest(model)

            def check(model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
                assert_same_masks(model)
                sx.verify(model, optimizer)

            run(model, optimizer, data(7), check=check)
            assert trainer.last_update == (None if name == "Static" else 6)
            assert (digest(model) == start) == (name == "Static"), name


@contextlib.contextmanager
def no_sync(model: nn.Module, last: bool) -> Iterator[None]:
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if last else model.no_sync():
            yield
    else:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        yield


def like_one_process() -> None:
    """From equal weights in float64, masks and weights are those of one process on the joined batches."""
    compare_with_one_process(CASES)


def like_one_process_in_short() -> None:
    """The same, plainly."""
    compare_with_one_process([case for case in CASES if case[1:] == ({}, 1, None, True)])


def shared_inputs() -> None:
    """Neurons that share their inputs, too: 33 in groups of four and a rest, spread over the processes as they fall.

    And blocks of four neurons by two inputs.
    """
    for name, method in METHODS.items():
        unstructured = name in ("RigL", "GMP")
        share_inputs(name, method, structure="unstructured" if unstructured else "constant_fan_in")
        if unstructured:
            # 33 inputs are no whole blocks.
            rules = {"first": sx.LayerSpec(sparsity=0.5, structure="block", block_width=2), "head": None}
            share_inputs(name, method, structure="unstructured", rules=rules)


def share_inputs(name: str, method: Callable[..., Trainer], **more: Any) -> None:
    """Masks and weights of one method are those of one process on the joined batches."""
    steps, options = data(6), {"mask_init": "random", "group_size": 4, **more}
    single = sparse_net(**options)
    single_optimizer = SGD(single.parameters(), lr=0.05, momentum=0.9)
    alone(partial(method, single, single_optimizer, **EVERY_TWO))
    start = digest(single)
    run(single, single_optimizer, steps, share=lambda batch: batch)
    sx.verify(single, single_optimizer)
    for wrap in (DistributedDataParallel, shard):
        model = wrap(sparse_net(**options))
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        method(model, optimizer, **EVERY_TWO)
        run(model, optimizer, steps)
        sx.verify(model, optimizer)
        assert_equal_models(model, single)
    assert (digest(single) == start) == (name == "Static"), name


def counted_steps() -> None:
    """Weights that grow make steps of their own age, also after a save of what the processes have in parts."""
    data_of_steps = data(11)

    def make(wrap: Callable[[nn.Module], nn.Module]) -> tuple[nn.Module, Optimizer, Trainer]:
        model = wrap(sparse_net())
        optimizer = AdamW(model.parameters(), lr=0.01, eps=1e-6)
        options: dict[str, Any] = {**EVERY_TWO, "ablation": 0.9, "drop_fraction": 0.5, "step_count": "weight"}
        found: list[Trainer] = []
        attach = alone if wrap is plain else (lambda attach: attach())
        attach(lambda: found.append(SRigL(model, optimizer, **options)))
        return model, optimizer, found[0]

    def plain(model: nn.Module) -> nn.Module:
        return model

    single, single_optimizer, single_trainer = make(plain)
    run(single, single_optimizer, data_of_steps[:7], share=lambda batch: batch)
    state = single_trainer.state_dict()
    run(single, single_optimizer, data_of_steps[7:], share=lambda batch: batch)
    for wrap in (DistributedDataParallel, shard):
        model, optimizer, trainer = make(wrap)
        run(model, optimizer, data_of_steps[:7])
        own = trainer.state_dict()
        assert own["step_counts"]
        for mine_, theirs in zip(own["step_counts"], state["step_counts"], strict=True):
            assert all(torch.equal(one, other) for one, other in zip(mine_[1:], theirs[1:], strict=True))
        trainer.load_state_dict(state)
        run(model, optimizer, data_of_steps[7:])
        assert_equal_models(model, single)


Case = tuple[str, dict[str, Any], int, Any, bool]


# How it is wrapped and with what, micro-batches a step, where they synchronise, and how gradients are reset.
CASES: list[Case] = [
    ("DDP", {}, 1, None, True),
    ("DDP", {}, 3, no_sync, True),
    ("DDP", {}, 3, no_sync, False),
    ("DDP", {}, 3, None, True),
    ("DDP", {}, 3, None, False),
    ("DDP", {"gradient_as_bucket_view": True}, 3, no_sync, True),
    ("DDP", {"gradient_as_bucket_view": True}, 3, no_sync, False),
    ("DDP", {"gradient_as_bucket_view": True}, 3, None, True),
    ("DDP", {"gradient_as_bucket_view": True}, 3, None, False),
    ("inner", {}, 3, None, True),
    ("FSDP", {}, 1, None, True),
    ("FSDP", {}, 3, None, True),
    ("FSDP", {}, 3, None, False),
    ("FSDP", {}, 3, no_sync, True),
    ("FSDP", {}, 3, no_sync, False),
    ("FSDP", {"reshard_after_forward": False}, 2, None, True),
]


def compare_with_one_process(cases: list[Case]) -> None:
    for way, options, micro, sync, to_none in cases:
        steps = data(6, micro=micro)
        single = sparse_net()
        single_optimizer = SGD(single.parameters(), lr=0.05, momentum=0.9)
        alone(partial(SRigL, single, single_optimizer, **EVERY_TWO, ablation=0.9, drop_fraction=0.5))
        start = digest(single)
        run(single, single_optimizer, steps, share=lambda batch: batch, to_none=to_none)
        model: nn.Module = sparse_net()
        if way == "FSDP":
            model = shard(model, *list(model.children())[::3], **options)
        elif way == "DDP":
            model = DistributedDataParallel(model, **options)
        wrapper = DistributedDataParallel(model) if way == "inner" else model
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        SRigL(model, optimizer, **EVERY_TWO, ablation=0.9, drop_fraction=0.5)
        run(wrapper, optimizer, steps, sync=sync, to_none=to_none)
        try:
            assert_equal_models(model, single)
        except AssertionError as error:
            raise AssertionError(f"{way} {options} {micro} {sync} {to_none}") from error
        assert digest(single) != start


def alone(attach: Callable[[], Any]) -> None:
    """Attach a trainer as where no process group was made."""
    known, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        attach()
    finally:
        dist.is_initialized = known


def opposite_gradients() -> None:
    """Gradients g and -g grow nothing: the mean of signed gradients counts, not that of their magnitudes."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 6, bias=False)).double()
    model = DistributedDataParallel(sx.sparsify(layer, sparsity=0.5, structure="unstructured", distribution="uniform"))
    engine = MaskEngine(model, SGD(model.parameters(), lr=0.0), lambda _: None)
    engine.window.capturing = True
    x = torch.randint(-9, 10, (4, 8)).double()  # whole numbers: sums are exact
    sign = torch.randint(1, 10, (4, 6)).double() * (1 if dist.get_rank() % 2 == 0 else -1)
    (model(x) * sign).sum().backward()
    local = engine.window.gradient(engine.weights[0])
    assert local is not None
    local = local.clone()
    assert local.any()
    (gradient,) = engine.window.join().values()
    assert not gradient.any()
    engine.detach()

    optimizer = SGD(model.parameters(), lr=0.0)
    trainer = RigL(model, optimizer, total_steps=100, update_every=1, drop_fraction=0.5)
    handle = sparse_weights(model)[0]
    fraction = trainer.drop_fraction_at(1)
    expected = rigl_update(handle.weight, torch.zeros_like(handle.weight), handle.mask, drop_fraction=fraction)
    by_magnitude = rigl_update(handle.weight, local, handle.mask, drop_fraction=fraction)
    optimizer.zero_grad()
    (model(x) * sign).sum().backward()
    optimizer.step()
    assert torch.equal(handle.mask, expected)
    assert not torch.equal(expected, by_magnitude)


def collectives_in(step: Callable[[], None]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sorted(event.name for event in profile.events() if event.name.startswith(("gloo:", "c10d::")))


def communication() -> None:
    """Ordinary steps send what dense DDP sends; an update adds one all-reduce a weight and four small messages."""

    def model_of(sparse: bool) -> tuple[nn.Module, Optimizer, list[list[Tensor]]]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8)).double()
        model = DistributedDataParallel(sx.sparsify(net, sparsity=0.75) if sparse else net)
        optimizer = SGD(model.parameters(), lr=0.1)
        if sparse:
            SRigL(model, optimizer, total_steps=100, update_every=6)
        run(model, optimizer, data(3))  # DDP arranges its buckets in the second one
        return model, optimizer, data(1)

    dense = collectives_in(partial(run, *model_of(False)))
    model, optimizer, steps = model_of(True)
    assert [name for name in dense if "allreduce" in name or "all_reduce" in name]
    ordinary = [collectives_in(lambda: run(model, optimizer, steps)) for _ in range(2)]
    assert ordinary == [dense, dense], (ordinary, dense)
    update = collectives_in(lambda: run(model, optimizer, steps))

    def count(names: list[str], what: str) -> int:
        return sum(name == what for name in names)

    sent = [name for name in dict.fromkeys(update) if count(update, name) > count(dense, name)]
    assert sent == ["c10d::allreduce_", "gloo:all_reduce"]
    for name in sent:  # two weights; who has a gradient, is it finite, has anyone failed, the masks' fingerprints
        assert count(update, name) - count(dense, name) == 2 + 4, update
    assert collectives_in(lambda: run(model, optimizer, steps)) == dense


def other_verbs() -> None:
    """What takes a model takes the one inside DistributedDataParallel; finalize leaves the wrapper on."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3))
    model = DistributedDataParallel(sx.sparsify(layers, sparsity=0.5)).eval()
    x, path = torch.randn(2, 24), OUT / f"model_{dist.get_rank()}.onnx"
    with torch.no_grad():
        expected = model(x)
    lowered = sx.lower(model, (x,), min_speedup=0)
    torch.testing.assert_close(lowered(x), expected, rtol=1e-4, atol=1e-5)
    assert lowered.report.capture == "torch.export, dynamic batch"
    assert sx.export_onnx(model, path, (x,), min_speedup=0, verify=False).condensed_layers == 1
    sx.verify(model)
    assert [row.name for row in sx.summary(model).rows] == ["module.0.weight", "module.2.weight"]
    assert "sparsify its .module" in raised(
        SparsifyError, lambda: sx.sparsify(DistributedDataParallel(nn.Linear(3, 2)))
    )
    assert sx.finalize(model) is model
    torch.testing.assert_close(model(x), expected)


def wrong_orders() -> None:
    """Each wrong order of wrapping is an error that names the right one."""
    order = "sparsify(model) -> DistributedDataParallel(model) -> optimizer -> trainer"
    sharded_order = "sparsify(model) -> fully_shard(model) -> optimizer -> trainer"
    dense = Net().double()
    assert order in raised(SparsifyError, lambda: sx.sparsify(DistributedDataParallel(dense)))
    sharded = shard(Net().double())
    assert sharded_order in raised(SparsifyError, lambda: sx.sparsify(sharded))

    late = DistributedDataParallel(dense)
    sx.sparsify(dense, sparsity=0.75)
    message = raised(TrainerError, lambda: Static(late, SGD(late.parameters(), lr=0.1)))
    assert order in message
    assert "first.weight_mask" in message

    outer = nn.Sequential(sparse_net())
    wrapped = DistributedDataParallel(outer)
    assert "ignore_masks(module)" in raised(TrainerError, lambda: Static(wrapped, SGD(wrapped.parameters(), lr=0.1)))
    ignore_masks(outer)
    rewrapped = DistributedDataParallel(outer)
    Static(rewrapped, SGD(rewrapped.parameters(), lr=0.1))
    assert rewrapped.modules_buffers == []

    model = sparse_net()
    early = SGD(model.parameters(), lr=0.1)
    shard(model)
    assert "fully_shard" in raised(TrainerError, lambda: Static(model, early))

    for copied in (copy.deepcopy(sparse_net()), sparse_net()):
        compiled = torch.compile(copied, backend="eager")
        assert isinstance(compiled, nn.Module)
        assert DistributedDataParallel(compiled).modules_buffers == []
    plain = sparse_net()
    sx.finalize(plain)
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore")


def other_models() -> None:
    """A rank that trains something else is found on all ranks, before anything is changed."""
    rank = dist.get_rank()
    model = sparse_net(sparsity=0.5 if rank else 0.75)
    message = raised(TrainerError, lambda: Static(model, SGD(model.parameters(), lr=0.1)))
    assert "the weight first.weight is" in message, message
    assert "on rank 1" in message
    model = sparse_net(group_size=4 if rank else 1)
    message = raised(TrainerError, lambda: Static(model, SGD(model.parameters(), lr=0.1)))
    assert "the weight first.weight is" in message, message
    assert "'group_size': 4" in message, message
    model = sparse_net()
    every = 3 if rank else 2
    message = raised(
        TrainerError, lambda: RigL(model, SGD(model.parameters(), lr=0.1), total_steps=9, update_every=every)
    )
    assert "update_every is 2 on rank 0, but 3 on rank 1" in message
    course: list[DropSchedule] = ["cosine", lambda progress: 1.0 - progress]
    message = raised(
        TrainerError,
        lambda: RigL(model, SGD(model.parameters(), lr=0.1), **EVERY_TWO, drop_schedule=course[rank > 0]),
    )
    assert "drop_schedule is (1.0, 0.85" in message
    RigL(model, SGD(model.parameters(), lr=0.1), **EVERY_TWO)


def diverged() -> None:
    """Masks that differ after an update are an error on all ranks that names the layer."""
    model = DistributedDataParallel(sparse_net())
    optimizer = SGD(model.parameters(), lr=0.0)
    SET(model, optimizer, total_steps=100, update_every=2)
    run(model, optimizer, data(1))
    if dist.get_rank() == 1:
        with torch.no_grad():
            weight = model.module.middle.weight
            weight.copy_(weight.flip(0))
            model.module.middle.weight_mask.copy_(model.module.middle.weight_mask.flip(0))
    message = raised(InvariantError, lambda: run(model, optimizer, data(1)))
    assert "the masks of module.middle.weight differ between processes" in message


def not_finite() -> None:
    """A gradient that is not finite on one rank postpones the update on all, and a scaler skips the step on all."""
    for sharded in (False, True):
        model: nn.Module = nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 3)).double()
        sx.sparsify(model, sparsity=0.75, distribution="uniform")
        mask = sparse_weights(model)[0].mask
        mask[:, 0] = False  # nothing reads the first input: what it brings is seen by the dense gradient alone
        model.get_parameter("0.weight").data.mul_(mask)
        model = shard(model) if sharded else DistributedDataParallel(model)
        optimizer = SGD(model.parameters(), lr=0.01)
        trainer = RigL(model, optimizer, **EVERY_TWO)
        steps = data(4)
        run(model, optimizer, steps[:1])

        def spoiled(batch: Tensor) -> Tensor:
            x = mine(batch).clone()
            x[:, 0] = 1e308 if dist.get_rank() == dist.get_world_size() - 1 else 1.0
            return x

        torch.autograd.backward(loss_of(model, spoiled(steps[1][0])) * 1e30)
        for p in model.parameters():
            assert p.grad is not None
            assert bool(whole(p.grad).isfinite().all())
            p.grad.mul_(1e-30)
        optimizer.step()
        optimizer.zero_grad()
        assert everywhere((trainer.steps, trainer.last_update)) == [(2, None)] * dist.get_world_size()
        run(model, optimizer, steps[2:3])
        assert everywhere((trainer.steps, trainer.last_update)) == [(3, 3)] * dist.get_world_size()
        assert_same_masks(model)

    model = DistributedDataParallel(sparse_net().float())
    optimizer = SGD(model.parameters(), lr=0.01)
    trainer = RigL(model, optimizer, **EVERY_TWO)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index, (batch,) in enumerate(data(4)):
        x = mine(batch).float()
        if index == 1 and dist.get_rank() == 1:
            x[0, 0] = float("inf")
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        steps_now = [0, 1, 1, 2, 3][index + 1]
        assert everywhere(trainer.steps) == [steps_now] * dist.get_world_size()
    assert trainer.last_update == 2
    assert_same_masks(model)


def unused() -> None:
    """A layer that only one rank uses counts with what it has there."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(24, 16), nn.Linear(24, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head((self.left if dist.get_rank() == 0 else self.right)(x).relu())
            return logits

    torch.manual_seed(0)
    model = DistributedDataParallel(sx.sparsify(Branches().double(), sparsity=0.75), find_unused_parameters=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = RigL(model, optimizer, **EVERY_TWO)
    start = {handle.fqn: handle.mask.clone() for handle in sparse_weights(model)}
    run(model, optimizer, data(2))
    assert trainer.last_update == 2
    assert_same_masks(model)
    assert all(not torch.equal(start[handle.fqn], handle.mask) for handle in sparse_weights(model)[:2])


def sharded_tools() -> None:
    """What looks at a model works on a sharded one: apply, verify, summary, full state_dicts, eval before a step."""
    model = shard(sparse_net())
    optimizer = AdamW(model.parameters(), lr=0.01)
    trainer = SRigL(model, optimizer, **EVERY_TWO, auto=False)

    @torch.no_grad()
    def look() -> None:  # leaves whole parameters in the place of the root's sharded ones
        model(mine(data(1)[0][0]))

    run(model, optimizer, data(3), check=look)
    assert (trainer.steps, trainer.last_update) == (3, None)
    assert trainer.step()
    assert trainer.last_update == 3
    assert_same_masks(model)
    assert sx.summary(model).masked_sparsity > 0.7
    torch.autograd.backward(loss_of(model, mine(data(1)[0][0])))
    look()
    state = trainer.state_dict(include_gradients=True)
    assert all(grad.shape == whole_shape(model, name) for name, grad in state["gradients"])
    assert len(state["gradients"]) == len(list(model.parameters()))
    assert {part for _, part, _ in state["captured"]} == {"dense"}
    look()
    sx.verify(model, optimizer)
    optimizer.step()
    assert trainer.steps == 4
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    held = any(local(handle.weight).numel() for handle in sparse_weights(model))
    if held:
        assert "weights off the mask are not zero" in raised(InvariantError, lambda: sx.verify(model))
    sx.masks.apply(model)
    sx.verify(model)

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    values: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    if dist.get_rank() == 0:
        assert values["first.weight"].shape == values["first.weight_mask"].shape
    parts: list[Any] = [{name: value.clone() for name, value in values.items()}]
    dist.broadcast_object_list(parts)
    plain = sparse_net(5)
    plain.load_state_dict(parts[0])
    assert_equal_models(model, plain)
    other = shard(sparse_net(3))
    set_model_state_dict(other, copy.deepcopy(parts[0]), options=StateDictOptions(full_state_dict=True))
    sx.verify(other)
    assert_equal_models(other, plain)
    assert "full state_dict" in raised(SparsifyError, lambda: sx.finalize(model))
    sx.finalize(DistributedDataParallel(plain))
    assert type(plain.first) is nn.Linear


def one_layer_at_a_time() -> None:
    """Of sharded weights, each is gathered with its gradient, and done with before the next."""
    events: list[str] = []

    def watched(own: Tensor, like: Tensor) -> Tensor:
        events.append("gather")
        return gather(own, like)

    class Watched(RigL):
        def growth(self, layer: Layer) -> Tensor:
            events.append(layer.handle.fqn)
            return super().growth(layer)

    model = shard(sparse_net())
    optimizer = SGD(model.parameters(), lr=0.1)
    with patch("srigl_fx.train.engine.gather", watched):
        Watched(model, optimizer, **EVERY_TWO, drop_fraction=0.5)
        run(model, optimizer, data(1))
        assert events == []
        run(model, optimizer, data(1))
    names = [handle.fqn for handle in sparse_weights(model)]
    assert events == [event for name in names for event in ("gather", "gather", name)]


def failing_updates() -> None:
    """An update that fails in one process, at one of its layers, changes no mask in any, and is tried again."""

    class Failing(RigL):
        fails = True

        def growth(self, layer: Layer) -> Tensor:
            if self.fails and dist.get_rank() == 1 and layer.handle.fqn.endswith("middle.weight"):
                raise FloatingPointError("on purpose")
            return super().growth(layer)

    for sharded in (False, True):
        model = shard(sparse_net()) if sharded else DistributedDataParallel(sparse_net())
        optimizer = SGD(model.parameters(), lr=0.1)
        trainer = Failing(model, optimizer, **EVERY_TWO, drop_fraction=0.5)
        before = [handle.mask.clone() for handle in sparse_weights(model)]
        run(model, optimizer, data(1))
        kind = FloatingPointError if dist.get_rank() == 1 else TrainerError
        message = raised(kind, lambda: run(model, optimizer, data(1)))  # noqa: B023 - called at once
        if dist.get_rank() != 1:
            assert "the mask update at step 2 failed on another process" in message
        now = [handle.mask for handle in sparse_weights(model)]
        assert all(torch.equal(old, new) for old, new in zip(before, now, strict=True))
        assert everywhere(trainer.last_update) == [None] * dist.get_world_size()
        trainer.fails = False
        optimizer.zero_grad()
        run(model, optimizer, data(1))
        assert everywhere((trainer.steps, trainer.last_update)) == [(3, 3)] * dist.get_world_size()
        assert_same_masks(model)
        now = [handle.mask for handle in sparse_weights(model)]
        assert not all(torch.equal(old, new) for old, new in zip(before, now, strict=True))


def second_order() -> None:
    """Gradients that are only looked at are not captured."""
    model = sparse_net()
    engine = MaskEngine(model, SGD(model.parameters(), lr=0.1), lambda _: None)
    engine.window.capturing = True
    x = mine(data(1)[0][0])
    torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    assert engine.window.join() == {}
    torch.autograd.backward(loss_of(model, x))
    torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    once = {name: gradient.clone() for name, gradient in engine.window.join().items()}
    twin = sparse_net()
    torch.autograd.backward(loss_of(twin, x))
    for handle in sparse_weights(twin):
        assert handle.weight.grad is not None
        torch.testing.assert_close(once[handle.fqn], Processes(dist.group.WORLD, True).mean(handle.weight.grad))


def compiled_steps() -> None:
    """A step compiled as a whole is to the last bit what it is without, and mask updates compile nothing anew."""
    cases: list[tuple[str, str, dict[str, Any], dict[str, Any], int]] = [
        *[(name, "DDP", {}, {}, 1) for name in ("SRigL", "SNFS", "GMP", "Static")],  # each talks differently
        ("SRigL", "DDP", {}, {}, 2),
        ("SRigL", "DDP", {"gradient_as_bucket_view": True}, {}, 1),
        ("RigL", "DDP", {"static_graph": True}, {}, 1),
        ("RigL", "DDP", {}, {"optimize_ddp": False}, 1),
        ("RigL", "DDP", {}, {"optimize_ddp": "python_reducer", "compiled_autograd": True}, 1),
        ("SRigL", "FSDP", {}, {}, 1),
        ("RigL", "FSDP", {}, {}, 2),
    ]
    for name, way, options, config, micro in cases:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        pair: list[tuple[nn.Module, Optimizer, Trainer]] = []
        for compiled in (False, True):
            with torch._dynamo.config.patch(config if compiled else {}):
                model: nn.Module = small_net()
                model = DistributedDataParallel(model, **options) if way == "DDP" else shard(model)
                optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
                trainer = METHODS[name](model, optimizer, **EVERY_TWO)
                pair.append((model, optimizer, trainer))
                start, counts = digest(model), []
                take = torch.compile(accumulated_step, backend=counter) if compiled else accumulated_step
                for batches in data(8, micro=micro):
                    take(model, optimizer, [mine(batch) for batch in batches])
                    counts.append(counter.frame_count)
            sx.verify(model, optimizer)
            assert_same_masks(model)
        (plain, _, expected), (model, _, trainer) = pair
        where = f"{name} {way} {options} {config} {micro} {counts}"
        assert counts[0] > 0, where
        assert counts[2:] == counts[2:3] * 6, where
        assert (trainer.steps, trainer.last_update) == (expected.steps, expected.last_update), where
        assert (digest(model) == start) == (name == "Static"), where
        assert digest(model) == digest(plain), where
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(local(one), local(other)), where


def accumulated_step(model: nn.Module, optimizer: Optimizer, batches: list[Tensor]) -> None:
    optimizer.zero_grad()
    for index, x in enumerate(batches):
        with no_sync(model, index == len(batches) - 1):
            loss_of(model, x).backward()
    optimizer.step()


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 33), nn.ReLU(), nn.Linear(33, 33), nn.ReLU(), nn.Linear(33, 3))
    return sx.sparsify(layers.double(), sparsity=0.75, distribution="uniform")


SAVED: dict[str, Any] = {"total_steps": 40, "update_every": 4, "ablation": 0.9, "drop_fraction": 0.5, "grad_samples": 3}


def _resumable(sharded: bool) -> tuple[nn.Module, Optimizer, SRigL]:
    model: nn.Module = sparse_net()
    model = shard(model) if sharded else DistributedDataParallel(model)
    optimizer = SGD(model.parameters(), lr=0.05)
    return model, optimizer, SRigL(model, optimizer, **SAVED)


def _part(steps: list[list[Tensor]], model: nn.Module, optimizer: Optimizer, micro: range) -> None:
    """Some micro-batches of a run with three a step, counted from its start."""
    for index in micro:
        with no_sync(model, index % 3 == 2):
            torch.autograd.backward(loss_of(model, mine(steps[index // 3][index % 3])) / 3)
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()


def _save(path: Path, model: nn.Module, trainer: SRigL) -> None:
    values = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    state = trainer.state_dict(include_gradients=True)
    if dist.get_rank() == 0:
        torch.save((values, state), path)
    dist.barrier()


RESUMES = {"DDP": False, "FSDP": True}


def save() -> None:
    """Stop inside a capture window, between two micro-batches of a step."""
    for name, sharded in RESUMES.items():
        model, optimizer, trainer = _resumable(sharded)
        _part(data(12, micro=3), model, optimizer, range(3 * 6 + 2 * (not sharded)))
        _save(OUT / f"{name}.pt", model, trainer)


def resume_and_save() -> None:
    """Resume what another number of processes saved, and stop once more."""
    for name, sharded in RESUMES.items():
        model, optimizer, trainer = _resumable(sharded)
        values, state = torch.load(OUT / f"{name}.pt", weights_only=True)
        set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True))
        trainer.load_state_dict(state)
        _part(data(12, micro=3), model, optimizer, range(3 * 6 + 2 * (not sharded), 3 * 9 + 1 * (not sharded)))
        assert trainer.last_update == 8
        _save(OUT / f"{name}_again.pt", model, trainer)


def pretrained() -> None:
    """A sharded model of transformers is saved whole by the first process, and read back by all; failures are all's."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    from srigl_fx.integrations.transformers import MASKS_FILE, from_pretrained, save_pretrained

    def gpt2(seed: int) -> Any:
        torch.manual_seed(seed)
        sizes: Any = {"vocab_size": 41, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
        return sx.sparsify(GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)), sparsity=0.8)

    model, single = gpt2(0), gpt2(0)
    recipe = sx.recipe(model)
    shard(model, *model.transformer.h)
    ids = torch.arange(8)[None] + dist.get_rank()
    for step, one in enumerate((model, single)):  # the forward leaves whole parameters in the root
        one(input_ids=ids if not step else ids * 0)
    folder = OUT / "pretrained"
    save_pretrained(model, folder, max_shard_size="20KB")
    again = from_pretrained(AutoModelForCausalLM, folder)  # no barrier of ours: the call returns when all is there
    expected = single.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert again.lm_head.weight is again.transformer.wte.weight
    assert sx.recipe(again) == recipe
    shard(again, *again.transformer.h)
    optimizer = SGD(again.parameters(), lr=0.1)
    trainer = SRigL(again, optimizer, **EVERY_TWO)
    for _ in range(2):
        optimizer.zero_grad()
        again(input_ids=ids).logits.square().mean().backward()
        optimizer.step()
    assert trainer.last_update == 2
    trained = {name: whole(value) for name, value in again.state_dict().items()}
    values = get_model_state_dict(again, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    save_pretrained(again, folder, state_dict=values, is_main_process=dist.get_rank() == 0)
    last = from_pretrained(AutoModelForCausalLM, folder).state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in last.items())

    taken = OUT / "taken"
    if dist.get_rank() == 0:
        (taken / MASKS_FILE).mkdir(parents=True)
        said = raised(CheckpointError, lambda: save_pretrained(again, taken))
        assert f"{MASKS_FILE} cannot be written" in said
    else:
        said = raised(TrainerError, lambda: save_pretrained(again, taken))
        assert "save_pretrained failed on another process" in said
    flat = FullyShardedDataParallel(gpt2(0), use_orig_params=True, device_id=torch.device("cpu"))
    assert "spread the model by fully_shard" in raised(CheckpointError, lambda: save_pretrained(flat, folder))
    assert "tp_plan would spread" in raised(
        CheckpointError, lambda: from_pretrained(AutoModelForCausalLM, folder, tp_plan="auto")
    )


def abandoned() -> None:
    """The last rank leaves between backward and step of an update: an error on the others."""
    model = DistributedDataParallel(sparse_net())
    optimizer = SGD(model.parameters(), lr=0.1)
    RigL(model, optimizer, **EVERY_TWO)
    run(model, optimizer, data(1))
    torch.autograd.backward(loss_of(model, mine(data(1)[0][0])))
    if dist.get_rank() == dist.get_world_size() - 1:
        if LEAVING == "dies":
            os._exit(1)
        time.sleep(60)
    before = digest(model)
    raised(RuntimeError, optimizer.step)
    assert digest(model) == before


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4 if LEAVING else 60))
    outcome = {}
    for name in sys.argv[2:]:
        try:
            globals()[name]()
            outcome[name] = "ok"
        except Exception:  # whatever it is, the test shows it
            outcome[name] = traceback.format_exc()
        (OUT / f"{dist.get_rank()}.json").write_text(json.dumps(outcome))
    if not LEAVING:
        dist.barrier()
    # Gloo's threads sometimes abort a process that ends in the ordinary way, in programs of torch alone too.
    os._exit(0)


if __name__ == "__main__":
    main()
