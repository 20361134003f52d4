"""Trained models that become sparse without training: ``prune``."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn
from torch.nn import functional

import srigl_fx as sx
from srigl_fx.errors import RuleError, SparsifyError
from srigl_fx.masks.least_squares import damped, least_squares_reference
from srigl_fx.masks.moments import Moments
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes import layer_moments


def perceptron() -> Any:
    return randomise(nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 20), nn.GELU(), nn.Linear(20, 6)))


def batches(*shape: int, count: int = 3, seed: int = 0) -> list[Tensor]:
    """Correlated inputs, with means of their own."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[-1], shape[-1], generator=draw) / shape[-1] ** 0.5
    mean = torch.randn(shape[-1], generator=draw)
    return [torch.randn(*shape, generator=draw) @ mixing + mean for _ in range(count)]


@torch.no_grad()
def expected_fit(weight: Tensor, bias: Tensor | None, mask: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias that least squares in NumPy give for these inputs (N, F)."""
    mean = x.double().mean(dim=0) if bias is not None else torch.zeros(x.shape[1]).double()
    centred = x.double() - mean
    cov = damped(centred.T @ centred / len(x))
    values = torch.from_numpy(least_squares_reference(weight.double().numpy(), mask.numpy(), cov.numpy()))
    return values, (0 if bias is None else bias) + (weight.double() - values) @ mean


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.parametrize("exchanges", [0, 3])
def test_layers_are_those_of_least_squares_on_their_inputs(exchanges: int) -> None:
    model = perceptron()
    dense, given = copy.deepcopy(model), batches(40, 24)
    report = sx.prune(model, given, sparsity=0.75, exchanges=exchanges)
    x = torch.cat(given)
    for place in (0, 2, 4):
        values, bias = expected_fit(dense[place].weight, dense[place].bias, model[place].weight_mask, x)
        torch.testing.assert_close(model[place].weight.double(), values, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model[place].bias.double(), bias, rtol=1e-4, atol=1e-5)
        x = dense[place + 1](dense[place](x)) if place < 4 else x
    sx.verify(model)
    assert [layer.name for layer in report.layers] == ["0.weight", "2.weight", "4.weight"]
    assert all(layer.samples == 120 for layer in report.layers)
    for layer in report.layers:
        assert layer.error is not None
        assert layer.mask_error is not None
        assert layer.magnitude_error is not None
        assert 0 < layer.error < min(layer.mask_error, layer.magnitude_error)


@torch.no_grad()
def test_the_error_is_that_of_the_layers_output() -> None:
    model = perceptron()
    dense, given = copy.deepcopy(model), batches(200, 24, count=1)
    report = sx.prune(model, given, sparsity=0.75, rules={"2": None, "4": None})
    wanted, found = dense[0](given[0]), model[0](given[0])
    share = (wanted - found).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    assert report.layers[0].error == pytest.approx(float(share), rel=1e-3)


def test_the_first_mask_is_by_weight_times_spread() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    x = torch.eye(4) * torch.tensor([8.0, 1.0, 3.0, 0.5])
    sx.prune(model, [x], sparsity=0.5, exchanges=0)
    assert model[0].weight_mask.tolist() == [[True, False, True, False]]


def test_without_a_bias_nothing_makes_up_for_means() -> None:
    model: Any = randomise(nn.Sequential(nn.Linear(16, 8, bias=False)))
    dense, given = copy.deepcopy(model), batches(60, 16)
    sx.prune(model, given, sparsity=0.5)
    values, _ = expected_fit(dense[0].weight, None, model[0].weight_mask, torch.cat(given))
    torch.testing.assert_close(model[0].weight.double(), values, rtol=1e-3, atol=1e-5)


def test_later_layers_may_see_what_earlier_ones_give_when_sparse() -> None:
    model = perceptron()
    dense, given = copy.deepcopy(model), batches(40, 24)
    sx.prune(model, given, sparsity=0.75, sequential=True)
    x = torch.cat(given)
    for place in (0, 2, 4):
        values, bias = expected_fit(dense[place].weight, dense[place].bias, model[place].weight_mask, x)
        torch.testing.assert_close(model[place].weight.double(), values, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model[place].bias.double(), bias, rtol=1e-3, atol=1e-4)
        x = model[place + 1](model[place](x)) if place < 4 else x


@pytest.mark.parametrize("memory", [0, 8 * (24**2 + 32**2), 1 << 30])
def test_memory_changes_nothing(memory: int) -> None:
    model, other = perceptron(), perceptron()
    other.load_state_dict(model.state_dict())
    sx.prune(model, batches(40, 24), sparsity=0.75)
    sx.prune(other, batches(40, 24), sparsity=0.75, memory=memory)
    assert_unchanged(other, parameters(model))


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 4},
        {"structure": "unstructured"},
        {"structure": "block", "group_size": 4, "block_width": 4},
        {"distribution": "erk"},
        {"rules": {"0": 0.5, "4": None}},
    ],
)
def test_structures_budgets_and_rules_are_those_of_sparsify(options: dict[str, Any]) -> None:
    model, alike = perceptron(), perceptron()
    sx.prune(model, batches(40, 24), sparsity=0.7, **options)
    sx.sparsify(alike, sparsity=0.7, **{"distribution": "uniform", **options})
    assert sx.recipe(model).weights == sx.recipe(alike).weights
    for one, other in zip(sparse_weights(model), sparse_weights(alike), strict=True):
        assert int(one.mask.sum()) == int(other.mask.sum())
    sx.verify(model)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 21)),
    "2d": (nn.Conv2d(4, 6, (3, 2), padding=(1, 0), dilation=(2, 1)), (3, 4, 9, 8)),
    "groups": (nn.Conv2d(8, 6, 3, groups=2, padding="same"), (3, 8, 7, 6)),
    "no bias": (nn.Conv1d(6, 5, 4, bias=False, padding_mode="circular", padding=2), (4, 6, 19)),
    "3d": (nn.Conv3d(3, 4, 2), (2, 3, 5, 4, 6)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_are_fitted_to_their_windows(name: str) -> None:
    layer, shape = CONVOLUTIONS[name]
    model: Any = randomise(nn.Sequential(copy.deepcopy(layer)))
    dense, x = copy.deepcopy(model), torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    sx.prune(model, [x[:1], x[1:]], sparsity=0.7)
    section = model[0].out_channels // model[0].groups
    found = dense[0]
    for group in range(model[0].groups):
        rows = slice(group * section, (group + 1) * section)
        weight, mask = (matrix[rows].flatten(1) for matrix in (found.weight, model[0].weight_mask))
        # The windows, by the convolution's own doing: each of its inputs is picked by a kernel of one number.
        picking = copy.deepcopy(dense[0])
        fan_in = weight.shape[1]
        picking.weight = nn.Parameter(torch.eye(fan_in).reshape(fan_in, *found.weight.shape[1:]))
        picking.bias, picking.out_channels, picking.groups = None, fan_in, 1
        part = x.chunk(found.groups, dim=1)[group]
        windows = picking(part).movedim(1, -1).reshape(-1, fan_in)
        values, bias = expected_fit(weight, None if found.bias is None else found.bias[rows], mask, windows)
        torch.testing.assert_close(model[0].weight[rows].flatten(1).double(), values, rtol=1e-3, atol=1e-5)
        if found.bias is not None:
            torch.testing.assert_close(model[0].bias[rows].double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_fitted_projection_by_projection(separate: bool, batch_first: bool) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = 12 if separate else None
            self.attend = nn.MultiheadAttention(16, 2, batch_first=batch_first, kdim=width, vdim=width)

        def forward(self, x: Tensor) -> Tensor:
            other = x[..., :12] if separate else x
            found: Tensor = self.attend(x, other, other, need_weights=False)[0]
            return found

    model: Any = randomise(Block())
    dense, (x,) = copy.deepcopy(model), batches(7, 5, 16, count=1)
    report = sx.prune(model, [x], sparsity=0.5)
    assert all(layer.error is not None and layer.samples == 35 for layer in report.layers)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    for place in range(3):
        rows = slice(16 * place, 16 * place + 16)
        weight, mask, now = (
            getattr(owner, names[place] + tail) if separate else getattr(owner, "in_proj_weight" + tail)[rows]
            for owner, tail in ((dense.attend, ""), (model.attend, "_mask"), (model.attend, ""))
        )
        inputs = x.reshape(-1, 16)[:, : weight.shape[1]]
        values, bias = expected_fit(weight, dense.attend.in_proj_bias[rows], mask, inputs)
        torch.testing.assert_close(now.double(), values, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model.attend.in_proj_bias[rows].double(), bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_padding_does_not_count(batch_first: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(16, 2, batch_first=batch_first)
            self.mix = nn.Linear(16, 16)

        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            found: Tensor = self.mix(self.attend(x, x, x, need_weights=False)[0] + x)
            return found

    model: Any = randomise(Encoder())
    (x,) = batches(6, 5, 16, count=1)
    real = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.6
    dense: Any = copy.deepcopy(model)
    report = sx.prune(model, [(x, real)], sparsity=0.5, positions=lambda x, real: real)
    assert {layer.samples for layer in report.layers} == {int(real.sum())}
    mask = model.attend.in_proj_weight_mask
    values, _ = expected_fit(dense.attend.in_proj_weight, dense.attend.in_proj_bias, mask, x[real])
    torch.testing.assert_close(model.attend.in_proj_weight.double(), values, rtol=1e-3, atol=1e-5)
    given = dense.attend(x, x, x, need_weights=False)[0] + x
    values, _ = expected_fit(dense.mix.weight, dense.mix.bias, model.mix.weight_mask, given[real])
    torch.testing.assert_close(model.mix.weight.double(), values, rtol=1e-3, atol=1e-5)


def test_tied_and_functional_weights_are_fitted_to_all_their_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.weight = nn.Parameter(torch.randn(12, 9))
            self.bias = nn.Parameter(torch.ones(9))  # a factor here, for all that anybody knows

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.first(self.first(x).relu()) @ self.weight
            return found * self.bias

    model: Any = randomise(Twice())
    dense, (x,) = copy.deepcopy(model), batches(50, 12, count=1)
    sx.prune(model, [x], sparsity=0.5)
    again = dense.first(x).relu()
    values, bias = expected_fit(dense.first.weight, dense.first.bias, model.first.weight_mask, torch.cat([x, again]))
    torch.testing.assert_close(model.first.weight.double(), values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.first.bias.double(), bias, rtol=1e-4, atol=1e-5)
    values, _ = expected_fit(dense.weight.T, None, model.weight_mask.T, dense.first(again))
    torch.testing.assert_close(model.weight.T.double(), values, rtol=1e-3, atol=1e-5)
    assert torch.equal(model.bias, dense.bias)


def test_kinds_that_cannot_be_seen_keep_their_largest_weights() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.GRU(12, 8, batch_first=True)
            self.head = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.read(x)[0])
            return found

    model: Any = randomise(Reader())
    alike: Any = randomise(Reader())
    alike.load_state_dict(model.state_dict())
    report = sx.prune(model, batches(5, 7, 12), sparsity=0.5)
    sx.sparsify(alike, sparsity=0.5, distribution="uniform")
    assert torch.equal(model.read.weight_ih_l0, alike.read.weight_ih_l0)
    assert [bool(layer.reason) for layer in report.layers] == [True, True, False]
    assert "read.weight_ih_l0 is not fitted: inputs of the kind 'rnn_gates'" in report.warnings[0]


def test_layers_that_lose_too_much_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    report = sx.prune(model, batches(40, 24), sparsity=0.9, warn_above=0.05, rules={"4": 0.05})
    lost = [layer.name for layer in report.layers if layer.error is not None and layer.error > 0.05]
    assert lost
    assert "4.weight" not in lost
    assert [warning.split()[0] for warning in report.warnings] == lost
    assert caplog.messages == [f"prune: {'; '.join(report.warnings)}"]
    assert str(report).count("above 5%") == len(lost)
    assert "by magnitude" in str(report)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[int, int]] = []
    sx.prune(perceptron(), batches(40, 24), sparsity=0.5, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, 7))
    assert {total for _, total in seen} == {6}


def test_buffers_modes_and_gradients_stay() -> None:
    model: Any = randomise(nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 4)))
    model[3].eval()
    before = parameters(model)
    state = torch.random.get_rng_state()
    sx.prune(model, batches(30, 24), sparsity=0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert [module.training for module in model] == [True, True, True, False]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_kept() -> None:
    model = perceptron().to(torch.bfloat16)
    report = sx.prune(model, [x.to(torch.bfloat16) for x in batches(40, 24)], sparsity=0.5)
    assert model[0].weight.dtype is model[0].bias.dtype is torch.bfloat16
    assert all(layer.error is not None and layer.error < 0.5 for layer in report.layers)


@pytest.mark.long
def test_what_is_pruned_trains_on_and_is_lowered() -> None:
    model, x = perceptron(), batches(40, 24)
    sx.prune(model, x, sparsity=0.75)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = sx.SRigL(model, optimizer, total_steps=10, update_every=2)
    for step in range(4):
        optimizer.zero_grad()
        functional.mse_loss(model(x[step % 3]), torch.zeros(40, 6)).backward()
        optimizer.step()
    trainer.detach()
    sx.verify(model)
    lowered = sx.lower(model.eval(), (x[0],), min_speedup=0)
    torch.testing.assert_close(lowered(x[1]), model(x[1]), rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """Its second layer runs for large inputs alone, and its third never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, far: bool = False) -> Tensor:
        x = self.first(x)
        return self.second(x) if far else x


def test_layers_that_only_some_inputs_reach_are_fitted_to_those() -> None:
    model = randomise(Branching())
    x = batches(20, 16)
    report = sx.prune(model, [x[0], (x[1], True), x[2]], sparsity=0.5, rules={"third": None})
    assert [layer.samples for layer in report.layers] == [60, 20]


def _nan(x: Tensor) -> Tensor:
    return torch.where(torch.arange(24) == 3, torch.nan, x)


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no inputs": ([], {}, "calibration is empty: give at least one input$"),
    "no iterable": (3, {}, "calibration must be an iterable"),
    "a tensor": (torch.ones(2, 24), {}, r"pass \[\(x,\)\] for one tensor"),
    "a list": ([[1, 2]], {}, "calibration input 0"),
    "wrong width": ([torch.ones(2, 24), torch.ones(2, 23)], {}, "does not run on calibration input 1"),
    "wrong type": ([torch.ones(2, 24, dtype=torch.float64)], {}, "does not run on calibration input 0"),
    "wrong device": ([torch.ones(2, 24, device="meta")], {}, "calibration input 0|meta"),
    "nan": ([_nan(torch.randn(4, 24))], {}, "'0.weight' is given numbers that are not finite"),
    "sparsity": ([torch.ones(2, 24)], {"sparsity": 1.0}, "sparsity"),
    "exchanges": ([torch.ones(2, 24)], {"exchanges": -1}, "exchanges must be a whole number"),
    "memory": ([torch.ones(2, 24)], {"memory": 1.5}, "memory must be a whole number"),
    "warn_above": ([torch.ones(2, 24)], {"warn_above": "no"}, "warn_above must be a share"),
    "progress": ([torch.ones(2, 24)], {"progress": 3}, "progress must be a function"),
    "positions": ([torch.ones(2, 24)], {"positions": lambda x: x}, "positions gives torch.float32 .* not a bool"),
    "no positions": (
        [torch.ones(2, 24)],
        {"positions": lambda x: torch.zeros(2, dtype=torch.bool)},
        "none of the positions that '0.weight' is given counts",
    ),
}


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_leaves_the_model_as_it_was(name: str, sequential: bool) -> None:
    model = perceptron()
    before = parameters(model)
    given, options, message = WRONG[name]
    with pytest.raises(SparsifyError, match=message):
        sx.prune(model, given, sequential=sequential, **options)
    assert_unchanged(model, before)
    assert type(model[0]) is nn.Linear


def test_later_faults_give_back_what_was_fitted_before() -> None:
    model: Any = randomise(nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)))
    before = parameters(model)

    def stop(done: int, total: int) -> None:
        assert done < total  # fails at the very end

    with pytest.raises(Exception, match="FitMasks"):
        sx.prune(model, batches(30, 24), sequential=True, progress=stop)
    assert_unchanged(model, before)


def test_layers_that_never_run_are_named() -> None:
    model = randomise(Branching())
    before = parameters(model)
    with pytest.raises(SparsifyError, match=r"no calibration input reaches 'second\.weight', 'third\.weight'"):
        sx.prune(model, batches(20, 16), sparsity=0.5)
    assert_unchanged(model, before)


def test_models_that_are_broken_or_sparse_are_refused() -> None:
    model = perceptron()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(SparsifyError, match=r"'2\.weight' holds numbers that are not finite"):
        sx.prune(model, batches(20, 24))
    done = sx.sparsify(perceptron())
    with pytest.raises(SparsifyError, match="sparse already"):
        sx.prune(done, batches(20, 24))
    with pytest.raises(SparsifyError, match=r"prune takes a torch\.nn\.Module"):
        sx.prune(3, batches(20, 24))  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="nowhere"):
        sx.prune(perceptron(), batches(20, 24), rules={"nowhere": 0.5})


@pytest.mark.slow
def test_a_hugging_face_conv1d_is_fitted() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    model: Any = randomise(nn.Sequential(transformers.pytorch_utils.Conv1D(10, 16)))
    dense, (x,) = copy.deepcopy(model), batches(4, 9, 16, count=1)
    sx.prune(model, [x], sparsity=0.5)
    values, bias = expected_fit(dense[0].weight.T, dense[0].bias, model[0].weight_mask.T, x.reshape(-1, 16))
    torch.testing.assert_close(model[0].weight.T.double(), values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model[0].bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_a_batch_of_products_is_seen_where_the_weight_is_one() -> None:
    model: Any = randomise(nn.Sequential(nn.Linear(16, 8, bias=False)))
    dense, (x,) = copy.deepcopy(model), batches(5, 7, 16, count=1)
    turned = x.transpose(0, 1)  # no view of it is a matrix, so that torch multiplies batch by batch
    sx.prune(model, [turned], sparsity=0.5)
    values, _ = expected_fit(dense[0].weight, None, model[0].weight_mask, x.reshape(-1, 16))
    torch.testing.assert_close(model[0].weight.double(), values, rtol=1e-3, atol=1e-5)
    assert np.isfinite(values.numpy()).all()


class Branches(nn.Module):
    """Layers that read one input, and ``between``, which may change it, each time but the first."""

    def __init__(self, layers: dict[str, nn.Module], between: Any = lambda x: None) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x, total = x.clone(), torch.zeros(())
        for place, layer in enumerate(self.layers.values()):
            if place:
                self.between(x)
            total = total + layer(x).sum()
        return total


def pyramid() -> dict[str, nn.Module]:
    rates: dict[str, nn.Module] = {f"rate {d}": nn.Conv2d(4, 5, 3, dilation=d, padding=d) for d in (1, 3)}
    further = {"stride": nn.Conv2d(4, 5, 3, stride=2, padding=3), "padding": nn.Conv2d(4, 5, 3, padding=0)}
    return {**rates, **further, "groups": nn.Conv2d(4, 4, 3, groups=2), "first again": nn.Conv2d(4, 6, 3, padding=1)}


def inception() -> dict[str, nn.Module]:
    kernels: tuple[Any, ...] = (1, 3, (1, 3), (3, 1), 5)
    return {f"kernel {size}": nn.Conv2d(4, 5, size, padding="same") for size in kernels}


@pytest.mark.parametrize("make", [pyramid, inception])
@pytest.mark.parametrize("sequential", [False, True])
def test_convolutions_of_one_input_are_fitted_to_their_own_windows(make: Any, sequential: bool) -> None:
    model: Any = randomise(Branches(make()))
    dense, x = copy.deepcopy(model), torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    sx.prune(model, [x], sparsity=0.6, sequential=sequential)
    for name, layer in dense.layers.items():
        alone: Any = nn.Sequential(layer)
        sx.prune(alone, [x], sparsity=0.6)
        assert torch.equal(model.layers[name].weight_mask, alone[0].weight_mask)
        torch.testing.assert_close(model.layers[name].weight, alone[0].weight)
        torch.testing.assert_close(model.layers[name].bias, alone[0].bias)


def sums_made(model: nn.Module, given: list[Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many sums of inputs ``prune`` makes."""
    made: list[Moments] = []

    class Counted(Moments):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(layer_moments, "Moments", Counted)
    sx.prune(model, given, sparsity=0.5)
    return sum(bool(one.count) for one in made)


def test_layers_that_read_the_same_numbers_share_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    same: Any = randomise(Branches({name: nn.Conv1d(4, 6, 3, padding=1) for name in "abc"}))
    assert sums_made(same, [torch.randn(3, 4, 12)], monkeypatch) == 1
    mixed: Any = randomise(Branches({name: nn.Conv1d(4, 6, 3, padding=int(name == "b")) for name in "abc"}))
    assert sums_made(mixed, [torch.randn(3, 4, 12)], monkeypatch) == 3


@pytest.mark.parametrize("kind", ["linear", "convolution", "vector"])
def test_what_is_changed_in_place_is_another_input(kind: str) -> None:
    def layer() -> nn.Module:
        return nn.Conv1d(6, 5, 3) if kind == "convolution" else nn.Linear(9, 5)

    model: Any = randomise(Branches({"first": layer(), "second": layer()}, Tensor.relu_))
    dense, x = copy.deepcopy(model), torch.randn(20, 6, 9, generator=torch.Generator().manual_seed(0))
    given = list(x.flatten(0, 1)[::8]) if kind == "vector" else list(torch.split(x, 10))
    sx.prune(model, given, sparsity=0.5)
    for name, change in (("first", torch.clone), ("second", torch.relu)):
        alone: Any = nn.Sequential(dense.layers[name])
        sx.prune(alone, [change(one) for one in given], sparsity=0.5)
        assert torch.equal(model.layers[name].weight_mask, alone[0].weight_mask)
        torch.testing.assert_close(model.layers[name].weight, alone[0].weight)


def test_inputs_of_inference_mode_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        x = torch.randn(30, 12)
    model: Any = randomise(nn.Sequential(nn.Linear(12, 5)))
    assert sums_made(model, [x, x], monkeypatch) == 1
    sx.verify(model)


def test_one_tensor_in_two_inputs_is_no_shared_input() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Linear(16, 6), nn.Linear(16, 6)

        def forward(self, x: Tensor, far: bool) -> Tensor:
            found: Tensor = (self.far if far else self.near)(x)
            return found

    x = batches(20, 16)
    report = sx.prune(randomise(Either()), [(x[0], False), (x[0], True), (x[1], True), (x[2], True)], sparsity=0.5)
    assert [layer.samples for layer in report.layers] == [20, 60]


def test_what_a_loader_gives_is_taken() -> None:
    model, alike = perceptron(), perceptron()
    alike.load_state_dict(model.state_dict())
    x = torch.cat(batches(40, 24))
    sx.prune(model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=40), sparsity=0.75)
    sx.prune(alike, torch.split(x, 40), sparsity=0.75)
    assert_unchanged(model, parameters(alike))


def test_inference_mode_is_refused_in_words() -> None:
    model = perceptron()
    before = parameters(model)
    with torch.inference_mode(), pytest.raises(SparsifyError, match=r"^prune cannot run under torch\.inference_mode"):
        sx.prune(model, batches(40, 24))
    assert_unchanged(model, before)
    with torch.no_grad():
        sx.prune(model, batches(40, 24))
    sx.verify(model)


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_is_written_before_the_end_unless_it_is_sequential(sequential: bool) -> None:
    model = perceptron()
    versions = [parameter._version for parameter in model.parameters()]
    changed: list[bool] = []

    def look(done: int, total: int) -> None:
        changed.append([parameter._version for parameter in model.parameters()] != versions)

    sx.prune(model, batches(40, 24), progress=look, sequential=sequential)
    assert any(changed) is sequential
