"""Permutations of inputs, learned beside the weights: from the first step to the lowered layer."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import srigl_fx as sx
from srigl_fx.errors import CheckpointError, InvariantError, LoweringError, SparsifyError, TrainerError
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.masks.input_orders import matrix_of, order_of
from srigl_fx.train import checkpoint
from srigl_fx.train.permutations import LearnedPermutations
from srigl_fx.train.soft_permutations import assignment, normalise, penalty

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(5))


def mlp(*, sparse: bool = True, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    if sparse:
        sx.sparsify(model, **{"sparsity": 0.5, "distribution": "uniform", **options})
    return model


def loss_of(model: nn.Module) -> Tensor:
    loss: Tensor = (model(X) - X[:, :8].flip(1)).square().mean()
    return loss


class Run:
    """A model in training, with everything that trains it."""

    def __init__(self, *, method: str = "SET", penalty: float = 1e-2, **options: Any) -> None:
        self.model = mlp(**options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2, weight_decay=1e-3)
        self.trainer = getattr(sx, method)(self.model, self.optimizer, total_steps=200, update_every=7)
        self.permutations = sx.LearnedPermutations(self.model, self.optimizer, penalty=penalty)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            (loss_of(self.model) + self.permutations.penalty()).backward()
            self.optimizer.step()

    def save(self, path: Path) -> None:
        extra = {"permutations": self.permutations.state_dict()}
        checkpoint.save(path, model=self.model, optimizer=self.optimizer, trainer=self.trainer, extra=extra)

    def load(self, path: Path) -> None:
        extra = checkpoint.load(path, model=self.model, optimizer=self.optimizer, trainer=self.trainer)
        self.permutations.load_state_dict(extra["permutations"])


def test_while_soft_a_layer_computes_s_m_x() -> None:
    run = Run()
    layer: Any = run.model[0]
    matrix = matrix_of(layer)
    assert matrix is not None
    by_hand = X @ (layer.weight @ matrix).T + layer.bias
    torch.testing.assert_close(layer(X), by_hand)
    torch.testing.assert_close(layer(input=X), by_hand)


def test_of_a_convolution_the_channels_are_permuted() -> None:
    model = sx.sparsify(nn.Sequential(nn.Conv2d(12, 8, 3, padding=1)), sparsity=0.5)
    permutations = LearnedPermutations(model, torch.optim.SGD(model.parameters(), lr=0.1))
    layer: Any = model[0]
    matrix, x = matrix_of(layer), torch.randn(2, 12, 5, 4)
    assert matrix is not None
    assert matrix.shape == (12, 12)
    by_hand = nn.functional.conv2d(torch.einsum("ji,nihw->njhw", matrix, x), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(model(x), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x[0]), by_hand[0], rtol=1e-4, atol=1e-5)
    permutations.harden()
    order = order_of(layer)
    assert order is not None
    by_hand = nn.functional.conv2d(x[:, order], layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(model(x), by_hand, rtol=0, atol=0)
    torch.testing.assert_close(model(x[0]), by_hand[0], rtol=1e-5, atol=1e-6)


def test_the_loss_gets_the_weight_times_all_penalties() -> None:
    run = Run(penalty=0.5)
    parts = [penalty(matrix) for module in run.model if (matrix := matrix_of(module)) is not None]
    assert len(parts) == 2
    torch.testing.assert_close(run.permutations.penalty(), 0.5 * sum(parts))


def test_each_step_ends_in_the_papers_normalisation() -> None:
    run = Run()
    matrix = matrix_of(run.model[0])
    assert matrix is not None
    other = copy.deepcopy(run.model)
    weights, matrices = (
        [p for name, p in other.named_parameters() if ("permutation" in name) is learned] for learned in (False, True)
    )
    groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": 1e-3}, {"params": matrices}]
    plain = torch.optim.Adam(groups, lr=1e-2)
    penalties = [penalty(m) for part in other if (m := matrix_of(part)) is not None]
    (loss_of(other) + 1e-2 * torch.stack(penalties).sum()).backward()
    plain.step()
    run.train(1)
    moved = matrix_of(other[0])
    assert moved is not None
    torch.testing.assert_close(matrix, normalise(moved.detach()), rtol=1e-6, atol=1e-7)
    assert float(matrix.detach().min()) == 0  # the step went below zero somewhere
    torch.testing.assert_close(matrix.sum(1), torch.ones(12))


def test_the_optimizer_holds_the_matrices_without_weight_decay() -> None:
    run = Run()
    group = run.optimizer.param_groups[-1]
    assert [id(p) for p in group["params"]] == [id(matrix_of(run.model[0])), id(matrix_of(run.model[2]))]
    assert group["weight_decay"] == 0
    assert run.optimizer.param_groups[0]["weight_decay"] == 1e-3
    model = mlp()
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    LearnedPermutations(model, named, lr=0.5)
    assert named.param_groups[-1]["param_names"] == ["0.weight_permutation", "2.weight_permutation"]
    assert named.param_groups[-1]["lr"] == 0.5


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("SRigL", {}),
        ("SET", {"group_size": 4}),
        ("RigL", {"structure": "block", "group_size": 4, "block_width": 4}),
    ],
    ids=["constant fan-in", "shared inputs", "blocks"],
)
@pytest.mark.long
def test_training_decides_every_permutation_and_lowering_folds_it(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(method=method, penalty=3e-2, **options)
    first = float(loss_of(run.model).detach())
    run.train(180)
    assert run.permutations.soft == []
    hardened = run.permutations.hardened
    assert sorted(hardened) == ["0", "2"]
    assert all(how.penalty < 0.22 and 0 < how.step <= 180 and how.kept > 0.5 for how in hardened.values())
    assert float(run.permutations.penalty()) == 0
    assert float(loss_of(run.model).detach()) < 0.7 * first
    sx.verify(run.model, run.optimizer)
    model = run.model.eval()
    lowered = sx.lower(model, (X,), min_speedup=0)
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    assert isinstance(lowered, LoweredModule)
    assert not any("index" in str(node.target) for node in lowered.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(lowered(X[:5]), model(X[:5]), rtol=1e-5, atol=1e-5)
        report = sx.export_onnx(model, tmp_path / "model.onnx", (X,), min_speedup=0)
        session = sx.runtime.load(report.path)
        (found,) = session.run(None, {session.get_inputs()[0].name: X[:5].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(X[:5]), rtol=1e-5, atol=1e-5)


def test_hardening_is_the_assignment_and_a_gather_from_then_on() -> None:
    run = Run()
    layer: Any = run.model[0]
    with torch.no_grad():
        matrix = matrix_of(layer)
        assert matrix is not None
        matrix[:, 0] += 2  # the largest entry of every row
        expected = assignment(matrix)
    found = run.permutations.harden(["0"])
    assert found == {"0": run.permutations.hardened["0"]}
    assert found["0"].repeated == 11
    order = order_of(layer)
    assert order is not None
    assert torch.equal(order, expected)
    assert sorted(order.tolist()) == list(range(12))
    assert torch.equal(layer(X), nn.functional.linear(X[:, order], layer.weight, layer.bias))
    assert run.permutations.soft == ["2"]
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    sx.verify(run.model, run.optimizer)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9))
def test_what_a_decided_permutation_computes_is_a_product_with_its_matrix(seed: int, rows: int) -> None:
    torch.manual_seed(seed)
    model = sx.sparsify(nn.Sequential(nn.Linear(11, rows + 3)), sparsity=0.4, seed=seed)
    LearnedPermutations(model, torch.optim.SGD(model.parameters(), lr=0.1), seed=seed).harden()
    layer: Any = model[0]
    order = order_of(layer)
    assert order is not None
    x, matrix = torch.randn(3, 11), torch.eye(11)[order]
    torch.testing.assert_close(layer(x), x @ (layer.weight @ matrix).T + layer.bias, rtol=1e-5, atol=1e-5)
    before = layer(x).detach()
    torch.testing.assert_close(sx.finalize(model)(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("at", ["soft", "between", "hard"])
def test_a_resumed_run_ends_in_the_same_bits(at: str, tmp_path: Path) -> None:
    whole, half, resumed = Run(), Run(), Run()
    steps = 15
    half.train(steps)
    whole.train(steps)
    if at != "soft":
        for run in (whole, half):
            run.permutations.harden(["0"] if at == "between" else None)
    half.save(tmp_path / "half.safetensors")
    resumed.load(tmp_path / "half.safetensors")
    assert resumed.permutations.soft == whole.permutations.soft
    assert resumed.permutations.hardened == whole.permutations.hardened
    whole.train(steps)
    resumed.train(steps)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert resumed.permutations.steps == 2 * steps
    resumed.save(tmp_path / "again.safetensors")
    Run().load(tmp_path / "again.safetensors")


def test_a_decided_order_loads_into_models_without_one() -> None:
    run = Run()
    run.permutations.harden()
    served = mlp()
    served.load_state_dict(run.model.state_dict())
    assert torch.equal(served(X), run.model(X))
    learning = Run()
    learning.model.load_state_dict(run.model.state_dict())
    assert learning.permutations.soft == []
    learning.train(1)
    copied, pickled = copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))
    assert torch.equal(copied(X), run.model(X))
    assert torch.equal(pickled(X), run.model(X))


def test_a_checkpoint_with_orders_loads_into_a_model_without(tmp_path: Path) -> None:
    run = Run()
    run.permutations.harden()
    run.save(tmp_path / "last.safetensors")
    served = mlp()
    checkpoint.load(tmp_path / "last.safetensors", model=served)
    assert torch.equal(served(X), run.model(X))
    soft = Run()
    soft.save(tmp_path / "soft.safetensors")
    with pytest.raises(CheckpointError, match=r"weight_permutation"):
        run.load(tmp_path / "soft.safetensors")


@pytest.mark.parametrize("order", [torch.zeros(12, dtype=torch.long), torch.arange(11), torch.arange(12.0), "a"])
def test_a_damaged_order_is_refused(order: Any) -> None:
    run = Run()
    run.permutations.harden()
    state = run.model.state_dict()
    before = run.model(X)
    state["0.weight_order"] = order
    for model in (mlp(), Run().model):
        with pytest.raises(RuntimeError, match=r"0\.weight_order: it must"):
            model.load_state_dict(state)
    assert torch.equal(run.model(X), before)


def test_soft_matrices_do_not_load_over_decided_orders() -> None:
    soft, hard = Run(), Run()
    hard.permutations.harden()
    with pytest.raises(RuntimeError, match="is decided here, and still learned there"):
        hard.model.load_state_dict(soft.model.state_dict())


def test_verify_knows_orders_and_matrices() -> None:
    run = Run()
    matrix = matrix_of(run.model[0])
    assert matrix is not None
    with torch.no_grad():
        matrix[1, 2] = -1
    with pytest.raises(InvariantError, match=r"0\.weight_permutation: it must be finite and nowhere negative"):
        sx.verify(run.model)
    run.permutations.harden()
    order = order_of(run.model[2])
    assert order is not None
    order[0] = order[1]
    with pytest.raises(InvariantError, match=r"2\.weight_order: it must name each of 16 inputs once"):
        sx.verify(run.model)


def test_what_is_still_learned_is_neither_lowered_nor_finalized(tmp_path: Path) -> None:
    run = Run()
    model = run.model.eval()
    before = model(X)
    with pytest.raises(LoweringError, match=r"still being learned, in '0', '2': call \.harden\(\)"):
        sx.lower(model, (X,))
    with pytest.raises(LoweringError, match=r"call \.harden\(\)"):
        sx.export_onnx(model, tmp_path / "model.onnx", (X,))
    with pytest.raises(SparsifyError, match=r"call \.harden\(\)"):
        sx.finalize(model)
    assert torch.equal(model(X), before)


def test_finalize_writes_the_order_into_the_weight() -> None:
    run = Run()
    run.permutations.harden()
    before = run.model(X)
    plain = sx.finalize(run.model)
    torch.testing.assert_close(plain(X), before, rtol=1e-6, atol=1e-6)
    dense = mlp(sparse=False)
    dense.load_state_dict(plain.state_dict())
    assert torch.equal(dense(X), plain(X))
    assert type(plain[0]) is nn.Linear
    assert not plain[0]._forward_pre_hooks


def test_a_stripped_state_dict_would_leave_the_order_out() -> None:
    run = Run()
    run.permutations.harden()
    with pytest.raises(InvariantError, match=r"0\.weight_order: .*finalize on a copy"):
        sx.masks.strip(run.model.state_dict())


def test_layers_are_chosen_by_name_and_the_others_have_reasons() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(8, 8, 3, groups=2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).transpose(1, 2)
            x, _ = self.attention(x, x, x)
            y: Tensor = self.mlp(x)
            return y

    model = sx.sparsify(Model(), sparsity=0.5, distribution="uniform")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainerError, match="conv cannot have a permutation: its groups of channels"):
        LearnedPermutations(model, optimizer, layers=["mlp", "conv"])
    with pytest.raises(TrainerError, match=r"'mpl\.\*' matches no masked layer"):
        LearnedPermutations(model, optimizer, layers=["mlp", "mpl.*"])
    assert len(optimizer.param_groups) == 1
    found = LearnedPermutations(model, optimizer, layers=["mlp"])
    assert (found.soft, found.skipped) == (["mlp.0", "mlp.1"], {})
    found.detach()
    rest = LearnedPermutations(model, optimizer)
    assert rest.soft == ["mlp.0", "mlp.1"]
    assert len(optimizer.param_groups) == 2
    assert {name: reason.split()[-1] for name, reason in rest.skipped.items()} == {
        "conv": "own",
        "attention": "MultiheadAttention",
        "attention.out_proj": "it",
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"penalty": float("inf")}, "penalty is inf"),
        ({"harden_below": 1.5}, "harden_below is 1.5"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"layers": "0"}, "layers is '0'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_are_none(options: dict[str, Any], reason: str) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainerError, match=reason):
        LearnedPermutations(model, optimizer, **options)
    assert len(optimizer.param_groups) == 1
    assert sorted(model.state_dict()) == sorted(mlp().state_dict())


def test_one_at_a_time_and_no_copies() -> None:
    run = Run()
    with pytest.raises(TrainerError, match="being learned already"):
        LearnedPermutations(run.model, run.optimizer)
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TrainerError, match="cannot be"):
            duplicate(run.permutations)
    with pytest.raises(TrainerError, match="no mask-managed weight"):
        LearnedPermutations(mlp(sparse=False), run.optimizer)
    with pytest.raises(TrainerError, match="no permutation of '1' is being learned"):
        run.permutations.harden(["1"])
    run.permutations.detach()
    matrix = matrix_of(run.model[0])
    assert matrix is not None
    before = matrix.sum(1)
    (loss_of(run.model)).backward()
    run.optimizer.step()
    assert not torch.equal(matrix.sum(1), before)  # nobody normalises it
    LearnedPermutations(run.model, run.optimizer)


def test_several_processes_are_refused() -> None:
    run = Run()
    run.permutations.detach()
    options = len(run.optimizer.param_groups)
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(TrainerError, match="learned by a single process"):
            LearnedPermutations(run.model, run.optimizer)
    finally:
        torch.distributed.destroy_process_group()
    assert len(run.optimizer.param_groups) == options


def test_a_matrix_that_is_not_finite_is_not_decided() -> None:
    run = Run()
    matrix = matrix_of(run.model[0])
    assert matrix is not None
    with torch.no_grad():
        matrix[0, 0] = float("nan")
    with pytest.raises(TrainerError, match="not finite"):
        run.permutations.harden()
    assert run.permutations.soft == ["0", "2"]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"version": 2, "steps": 1, "hardened": {}},
        {"version": 1, "steps": -1, "hardened": {}},
        {"version": 1, "steps": 1, "hardened": {"0": {"step": 1}}},
        {"version": 1, "steps": 1, "hardened": {"0": {"step": 1, "penalty": 0.1, "kept": 1.0, "repeated": 0}}},
        {"version": 1, "steps": 1, "hardened": 3},
    ],
    ids=["empty", "version", "steps", "fields", "another model", "kind"],
)
def test_a_damaged_state_is_refused(state: dict[str, Any]) -> None:
    run = Run()
    run.train(2)
    with pytest.raises(TrainerError):
        run.permutations.load_state_dict(state)
    assert run.permutations.steps == 2
