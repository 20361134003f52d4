"""What depends on no input becomes a buffer, and masks come along."""

from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

import srigl_fx as sx
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes import fold_constants
from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.fold_constants import FoldConstants
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Program, tensor_at

aten = torch.ops.aten


def folded(model: nn.Module, *inputs: Tensor) -> Program:
    program = run((Normalize(), FoldConstants()), capture(model.eval(), inputs)).subject
    with torch.no_grad():
        torch.testing.assert_close(program.module(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)
    return program


def contraction(program: Program, target: Any = aten.linear.default) -> fx.Node:
    found: list[fx.Node] = list(program.module.graph.find_nodes(op="call_function", target=target))
    assert len(found) == 1
    return found[0]


class OnWeight(nn.Module):
    """A linear layer whose weight goes through a function first."""

    def __init__(self, function: Any, shape: tuple[int, int] = (6, 8)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.scale = nn.Parameter(torch.rand(shape[0], 1) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.function(self))


def masked(model: nn.Module, density: float = 0.4, **options: Any) -> Any:
    return mask_by_hand(randomise(model), density, skip=("scale",), **options)


def test_rule_1_a_weight_is_entered_by_its_parameter() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    sx.sparsify(randomise(model), sparsity=0.5)
    program = folded(model, torch.randn(3, 8))
    assert {entry.fqn for entry in program.masked.values()} == {"0.weight"}
    for target, entry in program.masked.items():
        assert tensor_at(program.module, target) is model[0].weight
        assert entry.mask is model[0].weight_mask


def test_rule_2_a_constant_becomes_one_buffer_and_the_model_is_untouched() -> None:
    model = masked(OnWeight(lambda m: m.weight * m.scale))
    before = model.weight.detach().clone()
    program = folded(model, torch.randn(3, 8))
    weight = contraction(program).args[1]
    assert isinstance(weight, fx.Node)
    assert weight.op == "get_attr"
    assert torch.equal(tensor_at(program.module, str(weight.target)), model.weight.detach() * model.scale.detach())
    assert torch.equal(model.weight, before)
    assert [node.op for node in program.module.graph.nodes if node.op == "call_function"] == ["call_function"]


def test_rule_2_what_only_makes_numbers_is_left_to_run() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.table = nn.Embedding(9, 8)

        def forward(self, x: Tensor) -> Tensor:
            ramp = torch.arange(x.shape[1], device=x.device)
            y: Tensor = self.fc(x + self.table(ramp)) * ramp[:, None]
            return y

    program = folded(masked(Positions()), torch.randn(3, 5, 8))
    names = [str(node.target) for node in program.module.graph.nodes if node.op == "call_function"]
    assert "aten.arange.default" in names or "aten.arange.start" in names
    assert "aten.embedding.default" not in names


def test_rule_2_random_numbers_and_written_buffers_are_not_constants() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            y: Tensor = self.fc(x) * self.seen + 0 * torch.rand_like(self.fc.bias)
            return y

    model = masked(Counting()).eval()
    program = run((Normalize(), FoldConstants()), capture(model, (torch.randn(3, 8),))).subject
    x = torch.randn(3, 8)
    with torch.no_grad():
        first, second = program.module(x), program.module(x)
    assert not torch.allclose(first, second)


def test_rule_2_a_constant_much_larger_than_its_sources_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_constants, "_LARGEST", 10)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.side = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x) @ (self.side[:, None] * self.side)
            return y

    program = folded(masked(Outer()), torch.randn(3, 8))
    assert not any("folded" in str(node.target) for node in program.module.graph.find_nodes(op="get_attr"))


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m: m.weight.t(), (8, 6)),
        (lambda m: m.weight[2:5], (6, 8)),
        (lambda m: m.weight.chunk(2)[1] * 3, (6, 8)),
        (lambda m: m.weight.reshape(2, 3, 8).transpose(0, 1).reshape(6, 8), (6, 8)),
        (lambda m: torch.tanh(m.weight) * m.scale, (6, 8)),
        (lambda m: m.weight / m.weight.norm(dim=1, keepdim=True), (6, 8)),
        (lambda m: torch.where(m.weight_mask, m.weight - m.weight.mean(1, keepdim=True), 0.0), (6, 8)),
        (lambda m: m.weight.flip(0), (6, 8)),
    ],
)
def test_rule_3_the_mask_comes_along(function: Any, shape: tuple[int, int]) -> None:
    model = masked(OnWeight(function, shape))
    program = folded(model, torch.randn(3, 8))
    weight = contraction(program).args[1]
    assert isinstance(weight, fx.Node)
    entry = program.masked[str(weight.target)]
    value = tensor_at(program.module, str(weight.target))
    assert entry.fqn == "weight"
    assert torch.equal(entry.mask, value != 0)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda m: m.weight - m.weight.mean(1, keepdim=True), "not zero where that is masked"),
        (lambda m: m.weight @ m.weight.t() @ m.weight, "zero"),
        (lambda m: torch.cumsum(m.weight, 1), "not zero where that is masked"),
    ],
)
def test_rule_3_what_fills_pruned_weights_again_counts_as_dense(function: Any, words: str) -> None:
    model = masked(OnWeight(function))
    result = run((Normalize(), FoldConstants()), capture(model.eval(), (torch.randn(3, 8),)))
    weight = contraction(result.subject).args[1]
    assert isinstance(weight, fx.Node)
    assert str(weight.target) not in result.subject.masked
    assert any(words in note.reason for note in result.notes)


def test_rule_3_several_masked_weights_in_one_value_count_as_dense() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_weight = nn.Parameter(torch.randn(6, 8))
            self.b_weight = nn.Parameter(torch.randn(6, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.a_weight + self.b_weight)

    result = run((FoldConstants(),), capture(masked(Sum()).eval(), (torch.randn(3, 8),)))
    assert "several masked weights (a_weight, b_weight)" in result.notes[0].reason


def test_a_second_run_changes_nothing() -> None:
    program = folded(masked(OnWeight(lambda m: torch.tanh(m.weight).flip(0))), torch.randn(3, 8))
    again = run((FoldConstants(),), program)
    assert not again.changed


@pytest.mark.slow
def test_a_weight_normed_layer_lowers_to_a_condensed_one() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 4))
    sx.sparsify(randomise(model), sparsity=0.5)
    if not any("original1" in weight.fqn for weight in sparse_weights(model)):
        pytest.fail("the weight-normed layer is no site")
    x = torch.randn(3, 16)
    lowered = sx.lower(model.eval(), (x,), min_speedup=0)
    assert {layer.decision for layer in lowered.report.layers} == {"condensed"}
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_attributes_that_are_no_tensors_are_left() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            z: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (y,))
            return z

    model = sx.sparsify(randomise(Branch()), sparsity=0.5).eval()
    lowered = sx.lower(model, (torch.randn(3, 8),), min_speedup=0)
    assert lowered.report.layers[0].decision == "condensed"
    with torch.no_grad():
        for x in (torch.rand(3, 8), -torch.rand(5, 8)):
            torch.testing.assert_close(lowered(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_weight_that_only_meets_constants_says_so() -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(4, 8))
            self.mix = nn.Linear(8, 8)
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x) @ self.mix(self.prompt).T
            return y

    model = sx.sparsify(randomise(Prompt()), sparsity=0.5).eval()
    report = sx.lower(model, (torch.randn(3, 8),), min_speedup=0).report
    reasons = {layer.fqn: layer.reason for layer in report.layers}
    assert reasons["fc.weight"] == ""
    assert reasons["mix.weight"] == "it only meets constants: the result is computed once and stored, without a mask"
