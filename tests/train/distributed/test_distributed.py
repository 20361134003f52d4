"""Training by several processes: each scenario of worker.py, launched by torchrun once for each number of processes."""

import copy
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD
from train_support import loss_of

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.masks.shards import as_shard, held, local, part, shard_like
from srigl_fx.runtime.cache import locked
from srigl_fx.train import RigL, SRigL, ignore_masks
from srigl_fx.train.base import Trainer
from srigl_fx.train.distributed import Processes, fingerprint, processes_of

WORKER = Path(__file__).with_name("worker.py")
IN_SHORT = ("like_one_process_in_short", "counted_steps", "opposite_gradients", "other_verbs")
WRONG = ("wrong_orders", "other_models", "diverged", "not_finite", "failing_updates")
ANY_NUMBER = ("methods", "communication", *WRONG, "sharded_tools")
TWO = (
    *ANY_NUMBER,
    "like_one_process",
    "shared_inputs",
    "opposite_gradients",
    "unused",
    "one_layer_at_a_time",
    "second_order",
    "save",
)
FOUR = (*ANY_NUMBER, "like_one_process_in_short", "resume_and_save")

Outcomes = dict[str, list[str]]


def _environment(**extra: str) -> dict[str, str]:
    tests = os.pathsep.join([str(WORKER.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **extra}


def launch(out: Path, processes: int, scenarios: tuple[str, ...], *, patience_s: int = 170) -> Outcomes:
    """What became of each scenario on each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(WORKER), str(out), *scenarios],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=patience_s,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: [rank[name] for rank in ranks] for name in scenarios}


def launched_once(out: Path, processes: int, scenarios: tuple[str, ...]) -> Outcomes:
    """The same, from the first of the test run's workers that asks; the others wait for it."""
    kept = out / f"outcomes_of_{processes}.json"
    with locked(out):
        if not kept.exists():
            kept.write_text(json.dumps(launch(out, processes, scenarios)))
        outcomes: Outcomes = json.loads(kept.read_text())
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    found = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed"  # of all workers
    found.mkdir(exist_ok=True)
    return found


@pytest.fixture(scope="module")
def two(folder: Path) -> Outcomes:
    return launched_once(folder, 2, TWO)


@pytest.fixture(scope="module")
def four(folder: Path, two: Outcomes) -> Outcomes:
    assert two["save"] == ["ok", "ok"], two["save"]  # what "resume_and_save" starts from
    return launched_once(folder, 4, FOUR)


@pytest.mark.long
def test_two_processes_in_short(tmp_path: Path) -> None:
    for name, outcome in launch(tmp_path, 2, IN_SHORT).items():
        assert outcome == ["ok", "ok"], f"{name}\n" + "\n".join(outcome)


@pytest.mark.long
def test_compiled_steps_of_two_processes(tmp_path: Path) -> None:
    """By themselves, as they take longer than all others."""
    outcome = launch(tmp_path, 2, ("compiled_steps",), patience_s=400)["compiled_steps"]
    assert outcome == ["ok"] * 2, "\n".join(outcome)


@pytest.mark.long
def test_a_sharded_model_of_transformers_survives_save_pretrained(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the extra [transformers] is not installed")
    outcome = launch(tmp_path, 2, ("pretrained",))["pretrained"]
    assert outcome == ["ok"] * 2, "\n".join(outcome)


@pytest.mark.long
@pytest.mark.parametrize("scenario", TWO)
def test_two_processes(two: Outcomes, scenario: str) -> None:
    assert two[scenario] == ["ok"] * 2, "\n".join(two[scenario])


@pytest.mark.long
@pytest.mark.parametrize("scenario", FOUR)
def test_four_processes(four: Outcomes, scenario: str) -> None:
    assert four[scenario] == ["ok"] * 4, "\n".join(four[scenario])


@pytest.mark.long
@pytest.mark.parametrize("name", ["DDP", "FSDP"])
def test_a_run_of_two_then_four_then_one_process(
    four: Outcomes, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert four["resume_and_save"] == ["ok"] * 4
    monkeypatch.setattr(sys, "argv", ["worker.py", str(folder)])
    monkeypatch.syspath_prepend(str(WORKER.parent))
    import worker

    steps = worker.data(12, micro=3)

    def start() -> tuple[nn.Module, SGD, Trainer]:
        model = worker.sparse_net()
        optimizer = SGD(model.parameters(), lr=0.05)
        return model, optimizer, SRigL(model, optimizer, **worker.SAVED)

    def train(model: nn.Module, optimizer: SGD, first: int) -> None:
        for index in range(first, 36):
            torch.autograd.backward(loss_of(model, steps[index // 3][index % 3]) / 3)
            if index % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    expected, optimizer, trainer = start()
    first = copy.deepcopy({handle.fqn: handle.mask for handle in sparse_weights(expected)})
    train(expected, optimizer, 0)
    resumed, optimizer, resumed_trainer = start()
    values, state = torch.load(folder / f"{name}_again.pt", weights_only=True)
    resumed.load_state_dict({key.removeprefix("module."): value for key, value in values.items()})
    resumed_trainer.load_state_dict(state)
    train(resumed, optimizer, 27 + (name == "DDP"))
    worker.assert_equal_models(resumed, expected)
    assert trainer.last_update == resumed_trainer.last_update == 12
    assert any(not torch.equal(first[handle.fqn], handle.mask) for handle in sparse_weights(expected))


@pytest.mark.long
@pytest.mark.parametrize("leaving", ["dies", "hangs"])
def test_a_rank_that_leaves_is_an_error_on_the_others(tmp_path: Path, leaving: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), "abandoned"],
            env=_environment(
                LEAVING=leaving, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    try:
        ranks[0].wait(timeout=50)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert json.loads((tmp_path / "0.json").read_text()) == {"abandoned": "ok"}
    assert time.monotonic() - started < 45  # the group's timeout is 4 s; the rest is starting up


def test_one_process_communicates_with_nobody() -> None:
    alone = processes_of(sx.sparsify(nn.Sequential(nn.Linear(8, 4)), sparsity=0.5))
    assert alone == Processes()
    tensor = torch.randn(3)
    assert alone.mean(tensor) is tensor
    assert alone.any_has([True, False]) == [True, False]
    assert alone.differing([tensor]) == []
    alone.check_agreed({"anything": 1}, "nothing")


def test_a_tensor_that_is_whole() -> None:
    weight, mask = torch.randn(3, 2), torch.rand(3, 2) > 0.5
    assert held(weight) is None
    assert local(weight) is weight
    assert part(mask, weight) is mask
    assert as_shard(weight, mask) is weight
    copied = shard_like(weight, mask)
    assert torch.equal(copied, weight)
    assert copied is not weight


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 3000])
def test_a_fingerprint_tells_masks_apart(size: int) -> None:
    mask = torch.rand(size) > 0.5
    changed = [mask ^ (torch.arange(size) == index) for index in range(size)]
    moved = [mask.roll(shift) for shift in range(min(size, 600))]
    seen: dict[int, bytes] = {}
    for other in [mask, mask.clone(), *changed, *moved]:
        assert seen.setdefault(int(fingerprint(other)), other.numpy().tobytes()) == other.numpy().tobytes()
    assert len(seen) > size


@pytest.mark.parametrize("way", ["itself", "a deepcopy", "an outer module", "compiled"])
def test_masks_are_on_the_ignore_list_of_data_parallelism(way: str) -> None:
    model: nn.Module = sx.sparsify(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)), sparsity=0.5)
    if way == "a deepcopy":
        model = copy.deepcopy(model)
    elif way == "an outer module":
        model = nn.Sequential(model)
        ignore_masks(model)
        ignore_masks(model)
    elif way == "compiled":
        compiled = torch.compile(model, backend="eager")
        assert isinstance(compiled, nn.Module)
        model = compiled
    ignored = model._ddp_params_and_buffers_to_ignore
    assert isinstance(ignored, list)
    assert len(ignored) == len(set(ignored))
    masks = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool}
    assert masks <= set(ignored)
    assert len(masks) == 1


def test_finalize_clears_the_ignore_list() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model._ddp_params_and_buffers_to_ignore = ["1.running_mean"]  # type: ignore[assignment]
    sx.sparsify(model, sparsity=0.5)
    assert model._ddp_params_and_buffers_to_ignore == ["1.running_mean", "0.weight_mask", "_orig_mod.0.weight_mask"]
    sx.finalize(model)
    assert model._ddp_params_and_buffers_to_ignore == ["1.running_mean"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_capturing_with_checkpointed_activations(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def run(checkpointed: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        model = sx.sparsify(nn.ModuleDict({"body": body, "head": nn.Linear(16, 3)}), sparsity=0.5)
        optimizer = SGD(model.parameters(), lr=0.1)
        RigL(model, optimizer, total_steps=40, update_every=2, drop_fraction=0.5)
        for step in range(6):
            for micro in range(3):
                x = torch.randn(8, 24, generator=torch.Generator().manual_seed(3 * step + micro)).requires_grad_()
                hidden = checkpoint(body, x, use_reentrant=reentrant) if checkpointed else body(x)
                torch.autograd.backward(model["head"](hidden).square().mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return {**model.state_dict()}

    expected, found = run(False), run(True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
