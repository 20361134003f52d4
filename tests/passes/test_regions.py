"""Finding the parts of a model that can be captured, and the graphs of single layers."""

from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn

from srigl_fx.passes.capture import capture_whole
from srigl_fx.passes.capture_checks import is_free
from srigl_fx.passes.regions.finder import RegionFinder
from srigl_fx.passes.regions.module_local import module_local
from srigl_fx.passes.regions.recording import ModuleCall, record


def refuse(x: Tensor) -> Tensor:
    """Something no tracer takes."""
    return x if x.sum().item() > 0 else -x


class Sub(nn.Module):
    """Cannot be captured itself; its child can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(refuse(x))
        return y


class Deep(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sub() for _ in range(depth))
        self.unused = nn.Linear(6, 6)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


def finder(model: nn.Module, *args: Any, **kwargs: Any) -> RegionFinder:
    return RegionFinder(mask_by_hand(randomise(model), 0.4).eval(), args, kwargs)


@pytest.mark.long
def test_regions_are_the_largest_modules_that_can_be_captured() -> None:
    search = finder(Deep(), torch.randn(3, 6))
    assert [region.name for region in search.below("")] == [f"layers.{i}.body" for i in range(4)]


@pytest.mark.long
def test_after_two_failures_of_a_class_no_more_are_tried() -> None:
    search = finder(Deep(5), torch.randn(3, 6))
    regions = search.below("")
    assert len(regions) == 5
    assert search.exports == 2 + 5
    assert [failure.error for failure in search.failures[2:]] == ["as 2 others of its class"] * 3


@pytest.mark.long
def test_a_class_that_was_captured_once_is_always_tried() -> None:
    search = finder(nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4))), torch.randn(3, 6))
    assert [region.name for region in search.below("")] == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_weights_that_are_never_called_name_the_module_that_reads_them() -> None:
    x = torch.randn(3, 6)
    failures = capture_whole(Deep(1).eval(), (x,), {}).failures
    search = RegionFinder(mask_by_hand(randomise(Deep(1)), 0.4).eval(), (x,), {}, failures)
    search.below("")
    reason = search.why_not("unused")
    assert reason.startswith("in no captured region: the model (Deep): test_regions.py, line ")
    assert reason.endswith("(unused is not called on the example inputs)")
    assert search.why_not("layers.0").startswith("in no captured region: layers.0 (Sub): test_regions.py, line ")


@pytest.mark.slow
def test_modules_without_masked_weights_are_left_alone() -> None:
    model = mask_by_hand(randomise(Deep(2)), 0.4, skip=("layers.1.body.0", "layers.1.body.2")).eval()
    search = RegionFinder(model, (torch.randn(3, 6),), {})
    assert [region.name for region in search.below("")] == ["layers.0.body"]


class Calls(nn.Module):
    """Calls one child in as many ways as asked for."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, calls: list[tuple[Any, ...]]) -> Any:
        return [self.child(*args) for args in calls]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, y: Any = None, flag: bool = False) -> Tensor:
        out: Tensor = self.conv(x) if y is None else self.conv(x) + self.conv(y)
        return -out if flag else out


def one_region(*calls: tuple[Any, ...]) -> tuple[RegionFinder, list[str]]:
    search = finder(Calls(TwoInputs()), list(calls))
    return search, [region.name for region in search.below("")]


def test_sizes_that_vary_from_call_to_call_become_free() -> None:
    search = finder(Calls(TwoInputs()), [(torch.randn(2, 3, 8),), (torch.randn(2, 3, 5),)])
    (region,) = search.below("")
    assert region.name == "child"
    (placeholder,) = region.program.module.graph.find_nodes(op="placeholder")
    assert [is_free(size) for size in placeholder.meta["val"].shape] == [True, False, True]
    x = torch.randn(1, 3, 11)
    with torch.no_grad():
        torch.testing.assert_close(region.program.module(x), region.module(x))


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ((torch.randn(2, 3, 8), torch.randn(2, 3, 8)), "differ in the number or structure"),
        ((torch.randn(2, 3, 8), None, True), "the constant input 2 differs"),
        ((torch.randn(3, 8), None, False), "input 0 differs in type or rank"),
    ],
)
def test_calls_that_one_graph_cannot_serve(second: tuple[Any, ...], problem: str) -> None:
    first = (torch.randn(2, 3, 8),) if len(second) == 2 else (torch.randn(2, 3, 8), None, False)
    search, _ = one_region(first, second)
    assert problem in search.failures[0].error
    assert search.exports <= 1


@pytest.mark.long
def test_a_size_that_varies_but_is_built_in() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.body(x) * (1 if x.shape[1] == 4 else 2)
            return y

    search = finder(Calls(Picky()), [(torch.randn(2, 4, 6),), (torch.randn(2, 5, 6),)])
    assert [region.name for region in search.below("")] == ["child.body"]
    assert "input 0 varies from call to call" in search.failures[0].error


def test_no_rows_at_all_do_not_make_a_constant_of_the_batch() -> None:
    search = finder(Calls(TwoInputs()), [(torch.randn(0, 3, 8),)])
    (region,) = search.below("")
    x = torch.randn(4, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(region.program.module(x), region.module(x))


def test_foreign_objects_and_writes_are_refused() -> None:
    class Writes(nn.Module):
        count: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor, note: Any) -> Tensor:
            self.count += 1
            y: Tensor = self.fc(x)
            return y

    search = finder(Calls(Writes()), [(torch.randn(2, 6), object())])
    assert [region.name for region in search.below("")] == ["child.fc"]
    assert search.failures[0].error == "it takes a value of type object"
    assert search.recording.written == {"child.count"}
    search = finder(Calls(Writes()), [(torch.randn(2, 6), None)])
    assert [region.name for region in search.below("")] == ["child.fc"]
    assert search.failures[0].error.startswith("it writes into child.count")


class Counts(nn.Module):
    """Counts its calls; its outputs depend on that, or not."""

    def __init__(self, *, matters: bool) -> None:
        super().__init__()
        self.fc, self.calls, self.matters = nn.Linear(6, 6), 0, matters

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.fc(x) * (self.calls if self.matters else 1)
        return y


@pytest.mark.parametrize("matters", [True, False])
def test_what_a_part_keeps_matters_where_its_outputs_change(matters: bool) -> None:
    """A graph would give the outputs of the first call for ever."""
    search = finder(Calls(Counts(matters=matters)), [(torch.randn(2, 6),)])
    assert [region.name for region in search.below("")] == ["child.fc" if matters else "child"]
    problems = ["its outputs depend on what it keeps in child.calls"] if matters else []
    assert [failure.error for failure in search.failures] == problems
    assert search.model.child.calls == 0  # type: ignore[union-attr]


def test_a_recording_keeps_distinct_calls_and_changes_nothing() -> None:
    model = Calls(nn.Linear(3, 2)).eval()
    hooks = (dict(model.child._forward_hooks), dict(model.child._forward_pre_hooks))
    x = torch.randn(4, 3)
    recording = record(model, ([(x,), (x * 2,), (x[:2],)],), {})
    assert [call.leaves[0].shape for call in recording.calls[model.child]] == [(4, 3), (2, 3)]
    assert len(recording.output) == 3
    assert (dict(model.child._forward_hooks), dict(model.child._forward_pre_hooks)) == hooks
    x.zero_()
    assert bool(recording.calls[model.child][0].leaves[0].any())


def call_of(*leaves: Any) -> ModuleCall:
    _, spec = torch.utils._pytree.tree_flatten((leaves, {}))
    return ModuleCall(list(leaves), spec)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.Linear(5, 4), [(5,), (3, 5), (2, 3, 5), (0, 5), (1, 1, 5)]),
        (nn.Linear(5, 4, bias=False), [(7, 5)]),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2), [(2, 4, 9), (1, 4, 5)]),
        (nn.Conv2d(3, 4, (3, 2), padding=(1, 0), dilation=2), [(2, 3, 9, 9), (1, 3, 5, 8)]),
        (nn.Conv2d(3, 4, 3, padding="same", bias=False), [(2, 3, 6, 7)]),
        (nn.Conv3d(2, 4, 2), [(2, 2, 4, 4, 4), (1, 2, 3, 3, 5)]),
    ],
)
def test_single_layers_take_any_leading_shape(layer: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    program = module_local(layer, layer, [call_of(torch.randn(shapes[-1]))])
    assert program is not None
    values = [node.meta["val"] for node in program.module.graph.nodes if node.op != "output"]
    assert all(isinstance(size, torch.SymInt) for size in values[0].shape[: 1 if values[0].dim() > 2 else -1])
    assert dict(program.module.named_parameters()).keys() == dict(layer.named_parameters()).keys()
    for shape in shapes:
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(program.module(x), layer(x))


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


@pytest.mark.parametrize(
    "layer",
    [
        OwnForward(5, 5),
        nn.Conv2d(5, 4, 3, padding=1, padding_mode="circular"),
        nn.ConvTranspose2d(5, 4, 3),
        nn.GRUCell(5, 5),
    ],
)
def test_other_layers_are_left_to_export(layer: nn.Module) -> None:
    assert module_local(layer, layer, [call_of(torch.randn(2, 5, 5, 5))]) is None


def test_layers_with_hooks_or_computed_weights_are_left_to_export() -> None:
    layer = nn.Linear(5, 5)
    layer.register_forward_hook(lambda *_: None)
    assert module_local(layer, layer, [call_of(torch.randn(2, 5))]) is None
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
    assert module_local(normed, normed, [call_of(torch.randn(2, 5))]) is None
