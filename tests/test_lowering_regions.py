"""``lower`` on models that are not one graph: regions, single layers, and the model's own code around them."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import srigl_fx as sx
from srigl_fx.errors import CaptureError, LoweringError
from srigl_fx.lowering.pipeline import lower
from srigl_fx.lowering.regions import LoweredRegions
from srigl_fx.passes.model_runs import run_model


def branch(x: Tensor) -> Tensor:
    """What no tracer takes: Python decides by the values."""
    return x if x.sum().item() > 0 else -x


def block(width: int = 12) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))


class DataBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = block(), block(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y: Tensor = self.head(self.second(x) if x.sum() > 0 else x * 2)
        return y


class ItemLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = block(), nn.Linear(12, 5)

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        for _ in range(int(steps.max().item())):
            x = torch.tanh(self.cell(x))
        y: Tensor = self.head(x[steps > 1])
        return y


class ScriptedChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.script = torch.jit.script(nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()).eval())
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.script(self.first(x)))
        return y


class LeavesTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        scale = max(sorted(abs(value) for value in x.numpy().ravel().tolist()))
        y: Tensor = self.head(x / scale)
        return y


class ListInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 5)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = self.backbone(torch.stack(images))
        scores = self.head(features.mean((2, 3)))
        return [{"scores": branch(row)} for row in scores]


class TwoShapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.any_rank = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.shared(x), self.shared(functional.avg_pool2d(x, 2))
        tokens, pooled = self.any_rank(a.flatten(2).transpose(1, 2)), self.any_rank(b.mean((2, 3)))
        return branch(tokens.mean(1) + pooled)


@dataclass
class Result:
    scores: Tensor
    parts: dict[str, Tensor]


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Result:
        hidden = self.body(x)
        return Result(branch(self.head(hidden)), {"hidden": hidden})


class ReadsAttributes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.body[0]
        assert isinstance(first, nn.Linear)
        x = self.body(x.to(first.weight.dtype)[:, : first.in_features])
        y: Tensor = self.head(branch(x).to(next(self.head.parameters()).device))
        return y * len(self.body) * self.head.weight.shape[0]


class ReadsWeight(nn.Module):
    """Computes with a weight inside a region: only the layers beside it can be lowered."""

    def __init__(self) -> None:
        super().__init__()
        self.body: nn.Sequential = block()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body[0].weight
        assert isinstance(weight, Tensor)
        penalty = weight.square().sum()
        y: Tensor = self.head(branch(self.body(x))) + penalty
        return y


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        common = nn.Linear(12, 12)
        self.left, self.right = nn.Sequential(common, nn.ReLU()), nn.Sequential(nn.Tanh(), common)
        self.again = common

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.again(branch(self.right(self.left(x))))
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Linear(12, 12), nn.ReLU()), nn.Sequential(nn.Linear(12, 12))
        self.second[0].weight = self.first[0].weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(branch(self.first(x)))
        return y


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = branch(self.teacher(x))
        y: Tensor = self.student(x) - target
        return y


class Counter(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.fc(x) + self.seen
        return y


class WritesBuffers(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.counter, self.head = Counter(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.head(branch(self.counter(x)))
        return y


class InPlaceOnInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12)), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        y: Tensor = self.head(branch(self.body(x) + x))
        return y


class Switch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor, negate: bool = False) -> Tensor:
        y: Tensor = self.fc(x)
        return -y if negate else y


class ConstantsDiffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.switch = Switch()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.switch(branch(self.switch(x, False)), True)
        return y


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.leaf = block(), nn.Linear(12, 12)
        for module in (self.body, self.leaf):
            module.register_forward_pre_hook(double)
            module.register_forward_hook(add_one)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leaf(branch(self.body(x)))
        return y


def double(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * 2,)


def add_one(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output + 1


class CompiledChild(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.compile(block(), backend="eager"), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(branch(self.body(x)))
        return y


class Experts(nn.Module):
    """Its experts see whatever rows are routed to them; in place, as such models are often written."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.experts = nn.Linear(12, 2), nn.ModuleList(block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y, chosen = x * 2, self.route(x).argmax(-1)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            if rows.numel() > 0:
                y[rows] = expert(x[rows])
        return y


class Parametrised(nn.Module):
    """Weights that the forward pass computes, which plain copying refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.old: nn.Module = torch.nn.utils.weight_norm(nn.Linear(12, 12))
        self.plain = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(branch(self.old(x)))
        return y


def vectors(batch: int) -> tuple[Any, ...]:
    return (torch.randn(batch, 12),)


def images(batch: int) -> tuple[Any, ...]:
    return (torch.randn(batch, 3, 8, 8),)


# model, inputs, regions, the weights that stay dense
Case = tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]], set[str], set[str]]
CASES: dict[str, Case] = {
    "data_branch": (DataBranch, vectors, {"first", "second", "head"}, set()),
    "item_loop": (ItemLoop, lambda n: (torch.randn(n, 12), torch.arange(n) + 1), {"cell", "head"}, set()),
    "scripted_child": (ScriptedChild, vectors, {"first", "head"}, set()),
    "leaves_torch": (LeavesTorch, vectors, {"body", "head"}, set()),
    "list_inputs": (ListInputs, lambda n: ([torch.randn(3, 6, 6) for _ in range(n)],), {"backbone", "head"}, set()),
    "two_shapes": (TwoShapes, images, {"shared", "any_rank"}, set()),
    "dataclass_output": (DataclassOutput, vectors, {"body", "head"}, set()),
    "reads_attributes": (ReadsAttributes, vectors, {"body", "head"}, set()),
    "reads_weight": (ReadsWeight, vectors, {"body.2", "head"}, {"body.0.weight"}),
    "shared": (Shared, vectors, {"left", "right", "again"}, set()),
    "tied": (Tied, vectors, {"first", "second"}, set()),
    "no_grad": (NoGrad, vectors, {"teacher", "student"}, set()),
    "writes_buffers": (WritesBuffers, vectors, {"counter.fc", "head"}, set()),
    "in_place_on_input": (InPlaceOnInput, vectors, {"body.1", "head"}, set()),
    "constants_differ": (ConstantsDiffer, vectors, {"switch.fc"}, set()),
    "hooked": (Hooked, vectors, {"body", "leaf"}, set()),
    "compiled_child": (CompiledChild, vectors, {"body", "head"}, set()),
    "experts": (Experts, lambda n: (torch.randn(8 * n, 12),), {"experts.0", "experts.1"}, set()),
}


def masked(make: Callable[[], nn.Module]) -> nn.Module:
    skip = (
        "script.0",
        "route",
        "second.0.weight" if make is Tied else "none",
    )  # a tied weight has one mask, on its first owner
    return mask_by_hand(randomise(make()), 0.3, ablated=2, skip=skip).eval()


def lowered_regions(model: nn.Module, inputs: Any, **options: Any) -> LoweredRegions:
    result = lower(model, inputs, min_speedup=0, **options)
    assert isinstance(result, LoweredRegions)
    return result


def leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(vars(value) if isinstance(value, Result) else value)


def assert_same(model: nn.Module, lowered: nn.Module, inputs: tuple[Any, ...]) -> None:
    expected, got = leaves(run_model(model, inputs, {})), leaves(run_model(lowered, inputs, {}))
    assert len(expected) == len(got) > 0
    for one, other in zip(expected, got, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", CASES)
def test_hard_cases(name: str) -> None:
    make, inputs, regions, dense = CASES[name]
    model = masked(make)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    lowered = lowered_regions(model, inputs(3))
    report = lowered.report
    assert set(lowered.regions) == set(lowered.region_inputs) == regions
    assert {layer.fqn for layer in report.layers if layer.decision == "dense"} == dense
    for layer in report.layers:
        assert set(layer.region.split(", ")) <= regions or layer.fqn in dense
    assert report.max_error is not None
    assert report.max_error < 1e-4
    assert report.capture_failures[0].name == ""
    for batch in (3, 7, 2):
        assert_same(model, lowered, inputs(batch))
        assert_same(
            model, lowered, pytree.tree_map(lambda leaf: leaf if leaf.dtype == torch.int64 else -leaf, inputs(batch))
        )
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.long
@pytest.mark.parametrize("name", ["data_branch", "two_shapes", "reads_attributes"])
def test_a_single_sample_is_enough_to_capture_with(name: str) -> None:
    make, inputs, regions, _ = CASES[name]
    model = masked(make)
    lowered = lowered_regions(model, inputs(1))
    assert set(lowered.regions) == regions
    assert_same(model, lowered, inputs(5))


class MakesMuch(nn.Module):
    """One of its outputs hangs on the last bits of what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(96, 64), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(1e7 * branch(self.body(x))), self.head(x)


@pytest.mark.slow
def test_rounding_that_the_rest_of_a_model_makes_much_of_is_named() -> None:
    lowered = lowered_regions(masked(MakesMuch), (torch.randn(8, 96),))
    assert set(lowered.regions) == {"head"}
    failures = {failure.name: failure.error for failure in lowered.report.capture_failures}
    assert "with its graph in place output 0 is off by " in failures["body"]
    assert "the rest of the model makes that of how the graph rounds" in failures["body"]


@pytest.mark.slow
def test_the_report_says_what_broke_and_where() -> None:
    model = masked(ReadsWeight)
    report = lowered_regions(model, vectors(2)).report
    assert "2 regions (0 by torch.export, 2 module-local)" in report.capture
    failures = {failure.name: failure for failure in report.capture_failures}
    assert failures[""].type == "ReadsWeight"
    assert "data-dependent" in failures[""].error
    assert "item() > 0" in failures[""].error
    assert "reads its weights" in failures["body"].error
    (dense,) = (layer for layer in report.layers if layer.decision == "dense")
    assert dense.reason.startswith("in no captured region: body.0 (Linear)")
    assert dense.bytes_after == dense.bytes_before
    assert type(report).from_dict(report.as_dict()) == report
    text = str(report)
    assert (
        "not captured (torch.export, dynamic batch): the model (ReadsWeight): test_lowering_regions.py, line " in text
    )
    assert "reason" in text.splitlines()[0]
    assert text.splitlines()[0].endswith("region")


def test_weights_that_a_model_uses_itself_stay_dense_with_the_error() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own_weight = nn.Parameter(torch.randn(8, 12))
            self.child, self.head = nn.Linear(12, 12), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.linear(x, self.child.weight)
            y: Tensor = self.head(branch(functional.linear(x, self.own_weight)))
            return y

    model = masked(Functional)
    lowered = lowered_regions(model, vectors(2))
    assert_same(model, lowered, vectors(4))
    reasons = {layer.fqn: layer.reason for layer in lowered.report.layers}
    assert reasons["head.weight"] == ""
    for fqn in ("own_weight", "child.weight"):
        assert reasons[fqn].startswith("in no captured region: the model (Functional): ")
        assert "data-dependent" in reasons[fqn]
    assert reasons["child.weight"].endswith("(child is not called on the example inputs)")


@pytest.mark.long
def test_dense_weights_that_were_replaced_are_gone() -> None:
    model = masked(DataBranch)
    watched = {name: weakref.ref(tensor) for name, tensor in model.named_parameters()}
    lowered = lowered_regions(model, vectors(2))
    held = sum(tensor.untyped_storage().nbytes() for tensor in (*lowered.parameters(), *lowered.buffers()))
    assert held <= lowered.report.bytes_after + sum(p.nbytes for n, p in model.named_parameters() if "bias" in n) + 64
    del model
    gc.collect()
    assert not [name for name, tensor in watched.items() if tensor() is not None and name.endswith("weight")]
    assert lowered.report.bytes_after < lowered.report.bytes_before


def test_buffers_that_the_model_writes_are_copied() -> None:
    model = masked(WritesBuffers)
    lowered = lowered_regions(model, vectors(2))
    with torch.no_grad():
        lowered(*vectors(2))
    assert int(model.calls) == 0  # type: ignore[arg-type]
    assert int(lowered.model.calls) == 1  # type: ignore[arg-type]


@pytest.mark.long
def test_copies_threads_and_pickle() -> None:
    model = masked(TwoShapes)
    lowered = lowered_regions(model, images(2))
    for copied in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        assert isinstance(copied, LoweredRegions)
        assert copied.report == lowered.report
        assert_same(model, copied, images(3))
    assert copied.graphs[0] is not lowered.graphs[0]
    assert dict(copied.model.named_modules())["shared"]._srigl_fx_graph[1] is copied.graphs[0]
    inputs = [images(size % 4 + 1)[0] for size in range(12)]
    expected = [run_model(model, (x,), {}) for x in inputs]

    def call(x: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = lowered(x)
            return y

    with ThreadPoolExecutor(4) as pool:
        for one, other in zip(expected, pool.map(call, inputs), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.long
def test_regions_are_saved_and_exported_one_by_one(tmp_path: Path) -> None:
    model = masked(ListInputs)
    lowered = lowered_regions(model, ([torch.randn(3, 6, 6) for _ in range(2)],))
    with pytest.raises(LoweringError, match=r"not one graph.*backbone.*lowered\.regions\[name\]\.save"):
        lowered.save(tmp_path / "whole.srigl")
    assert list(tmp_path.iterdir()) == []
    for name, region in lowered.regions.items():
        args, kwargs = lowered.region_inputs[name]
        region.save(tmp_path / f"{name}.srigl")
        again = sx.load_lowered(tmp_path / f"{name}.srigl")
        torch.testing.assert_close(run_model(again, args, kwargs), run_model(region, args, kwargs))
        report = sx.export_onnx(region, tmp_path / f"{name}.onnx", (args, kwargs), min_speedup=0)
        assert report.dynamic_batch
        assert report.condensed_layers == len(region.report.layers)
        assert {layer.region for layer in region.report.layers} == {name}


@pytest.mark.slow
def test_inputs_that_do_not_fit_a_region_name_it() -> None:
    lowered = lowered_regions(masked(ListInputs), ([torch.randn(3, 6, 6) for _ in range(2)],))
    with pytest.raises(LoweringError, match=r"in the region backbone: input 0 .*captured for float32"):
        lowered([torch.randn(3, 7, 7)])


def test_weight_norm_can_be_copied_after_a_forward_pass() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = randomise(Parametrised()).eval()
    mask_by_hand(model, 0.3, skip=("old",))
    model(*vectors(2))
    lowered = lowered_regions(model, vectors(2))
    assert set(lowered.regions) == {"plain"}
    assert_same(model, lowered, vectors(3))


def test_where_no_part_can_be_captured_the_error_says_why() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return branch(functional.linear(x, self.weight))

    with pytest.raises(CaptureError, match=r"cannot capture Alone whole.*item\(\) > 0.*data-dependent.*torch\.where"):
        lower(masked(Alone), vectors(2))


class HoldsOn(nn.Module):
    """A function made in the constructor calls the very module it was made for, whatever the model is copied to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = block(), nn.Linear(12, 5)
        self.function: Callable[[Tensor], Any] = lambda x: self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(branch(self.function(x)))
        return y


class SparseOutput(nn.Module):
    """Gives the output that ``wrap`` makes of a sparse one."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.wrap = block(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(torch.relu(self.body(x)))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda y: y.to_sparse(), r"the output of SparseOutput is a sparse tensor \(torch\.sparse_coo\)"),
        (lambda y: (y, {"graph": y.to_sparse_csr()}), r"the output '1\.graph' of .* \(torch\.sparse_csr\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_tensor_among_the_outputs_is_refused_by_name(
    wrap: Callable[[Tensor], Any], said: str, verify: bool, tmp_path: Path
) -> None:
    model = sx.sparsify(SparseOutput(wrap), sparsity=0.5).eval()
    with pytest.raises(LoweringError, match=said + ".* return it as to_dense"):
        lower(model, (torch.randn(2, 12),), min_speedup=0, verify=verify)
    with pytest.raises(LoweringError, match=said):
        sx.export_onnx(model, tmp_path / "model.onnx", (torch.randn(2, 12),), verify=verify)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_region_that_the_copy_does_not_call_is_given_up() -> None:
    model = masked(HoldsOn)
    lowered = lowered_regions(model, vectors(2))
    assert set(lowered.regions) == {"head"}
    assert_same(model, lowered, vectors(3))
    assert {layer.fqn for layer in lowered.report.layers if "holds on to the original" in layer.reason} == {
        "body.0.weight",
        "body.2.weight",
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_is_refused_with_the_reason() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(12, 5), nn.ReLU()).eval())
    with pytest.raises(CaptureError, match="compiled by TorchScript"):
        lower(scripted, vectors(2))


@pytest.mark.long
def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = masked(DataBranch)
    model.source = iter([1])  # type: ignore[assignment]
    model.source = (number for number in [1])  # type: ignore[assignment]
    with pytest.raises(LoweringError, match=r"DataBranch cannot be copied.*generator"):
        lower(model, vectors(2), min_speedup=0)


@pytest.mark.long
def test_measured_decisions_and_each_pass_verified() -> None:
    model = masked(DataBranch)
    result = lower(model, vectors(2), min_speedup=1e9, batch_sizes=[2, 4], verify="each pass")
    assert isinstance(result, LoweredRegions)
    assert {layer.decision for layer in result.report.layers} == {"dense"}
    assert {tuple(layer.seconds) for layer in result.report.layers if layer.region != "second"} == {(2, 4)}
    assert_same(model, result, vectors(3))


@pytest.mark.long
def test_summary_shows_the_layers_of_all_regions() -> None:
    lowered = lowered_regions(masked(DataBranch), vectors(2))
    summary = sx.summary(lowered)
    assert {row.name for row in summary.rows} == {layer.fqn for layer in lowered.report.layers}
    assert {row.status for row in summary.rows} == {"condensed"}


@pytest.mark.slow
def test_a_model_in_regions_has_the_recipe_of_the_whole() -> None:
    model = sx.sparsify(DataBranch(), sparsity=0.5).eval()
    lowered = sx.lower(model, (torch.randn(3, 12),), min_speedup=0)
    assert isinstance(lowered, LoweredRegions)
    assert lowered.recipe == sx.recipe(model)
    assert copy.deepcopy(lowered).recipe == sx.recipe(model)
    assert [part.recipe for part in lowered.regions.values()] == [sx.recipe(model)] * len(lowered.regions)


@pytest.mark.long
def test_a_model_in_regions_has_the_recipes_of_its_parts() -> None:
    model = DataBranch().eval()
    sx.sparsify(model.first, sparsity=0.5)
    lowered = sx.lower(model, (torch.randn(3, 12),), min_speedup=0)
    assert isinstance(lowered, LoweredRegions)
    assert lowered.recipe == sx.recipe(model.first)
    sx.sparsify(model.second, sparsity=0.75)
    lowered = sx.lower(model, (torch.randn(3, 12),), min_speedup=0)
    assert isinstance(lowered, LoweredRegions)
    assert lowered.recipe is None
    assert lowered.recipes == {"first": sx.recipe(model.first), "second": sx.recipe(model.second)}
