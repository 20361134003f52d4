"""What has to be so while a model is traced: each rewriting of a forward, run on real tensors beside the forward."""

import contextlib
import inspect
import io
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from srigl_fx.errors import CaptureError
from srigl_fx.passes import tracing
from srigl_fx.passes.tracing import (
    fit_for_capture,
    flattened,
    plain_attention,
    plain_execution,
    plain_experts,
    writing_in_place,
)

ONE, TWO = torch.tensor(1), torch.tensor(2)
WHOLE = slice(None)

PLACES: dict[str, Any] = {
    "one": ONE,
    "one of two": (ONE, WHOLE),
    "second": (WHOLE, TWO),
    "dots in front": (..., ONE),
    "dots between": (ONE, ..., TWO),
    "dots behind": (ONE, ...),
    "number beside": (1, TWO),
    "new axis in front": (None, ONE),
    "new axis behind": (ONE, None, TWO),
    "new axis behind dots": (..., None, TWO),
    "all three": (ONE, TWO, torch.tensor(-1)),
}


@pytest.mark.parametrize("name", PLACES)
def test_rule_3_a_place_is_written_as_by_an_assignment(name: str) -> None:
    index = PLACES[name]
    expected, found = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
    value = torch.randn(expected[index].shape)
    for written in (value, 7.0, value[None, None], value.double()):
        expected[index] = written
        with tracing._PlacesOfTensors():
            found[index] = written
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", PLACES)
def test_rule_3_only_views_are_taken_of_a_place(name: str) -> None:
    """Else export would not see that the tensor is written."""
    assert tracing._is_place_of_tensors(PLACES[name])
    tensor = torch.zeros(3, 4, 5)
    assert tracing._selected(tensor, PLACES[name]).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "index",
    [
        1,
        (1, 2),
        WHOLE,
        ...,
        None,
        (),
        torch.tensor([0, 1]),
        torch.tensor(True),
        torch.tensor([True, False, True]),
        (ONE, torch.tensor([0])),
        (ONE, slice(1, 3)),
        (ONE, [0, 1]),
        (ONE, True),
    ],
    ids=repr,
)
def test_rule_3_other_places_are_left_to_python(index: Any) -> None:
    assert not tracing._is_place_of_tensors(index)
    expected, found = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
    expected[index] = 1.0
    with tracing._PlacesOfTensors():
        found[index] = 1.0
    assert torch.equal(found, expected)


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, first: Any, *rest: Any, scale: Any = 1, **more: Any) -> Any:
        return first, rest, scale, more


class Few(nn.Module):
    def forward(self, first: Any, second: Any = 2, *rest: Any, scale: Any = 1) -> Any:
        return first, second, rest, scale


@pytest.mark.parametrize(
    ("args", "kwargs", "parameters"),
    [
        ((1, 2, 3), {}, ["input_0", "input_1", "input_2"]),
        ((1,), {"scale": 5, "other": 6}, ["input_0", "scale", "other"]),
        ((1, 2), {"other": 6}, ["input_0", "input_1", "other"]),
        ((1,), {"scale": 5}, None),  # none of the variable ones is given
    ],
)
def test_rule_2_each_argument_gets_a_parameter(
    args: tuple[Any, ...], kwargs: dict[str, Any], parameters: list[str] | None
) -> None:
    model = Many()
    plain = tracing._with_plain_signature(model, args, kwargs)
    assert (plain is model) == (parameters is None)
    if parameters is not None:
        assert [*inspect.signature(plain.forward).parameters] == parameters
    assert plain(*args, **kwargs) == model(*args, **kwargs)
    assert plain.fc is model.fc


def test_rule_2_a_forward_that_would_take_more_stays_if_it_is_not_given_more() -> None:
    model = Few()
    assert tracing._with_plain_signature(model, (1, 2), {"scale": 3}) is model
    assert tracing._with_plain_signature(model, (1, 2, 3), {}) is not model


def test_another_forward_is_around_that_of_the_very_object() -> None:
    model = Many()
    model.forward = lambda *args: ("own", args)  # type: ignore[method-assign]
    plain = tracing._with_plain_signature(model, (1, 2), {})
    assert plain(1, 2) == ("own", (1, 2))
    assert isinstance(plain, Many)
    assert type(plain).__name__ == "Many"
    assert "forward" not in vars(plain)
    assert "forward" in vars(model)  # the model keeps it


class Total(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.ones(2))


class Counting(nn.Module):
    """Assigns to its buffers; ``how`` says what."""

    total: Tensor
    other: Tensor

    def __init__(self, how: Callable[["Counting", Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(2))
        self.register_buffer("other", torch.full((2,), 10.0))
        self.register_buffer("nothing", None)
        self.inner = Total()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def _assigns(model: Counting, x: Tensor) -> Tensor:
    model.total = model.total + x
    return model.total


def _swaps(model: Counting, x: Tensor) -> Tensor:
    model.total, model.other = model.other, model.total
    return x + model.total


def _assigns_inside(model: Counting, x: Tensor) -> Tensor:
    model.inner.total = model.inner.total * x
    return x - model.inner.total


def _returns_what_was(model: Counting, x: Tensor) -> Tensor:
    was = model.total
    model.total = x + 1
    return was


def _only_reads(model: Counting, x: Tensor) -> Tensor:
    return x + model.total


@pytest.mark.parametrize("how", [_assigns, _swaps, _assigns_inside, _returns_what_was, _only_reads])
def test_rule_4_an_assigned_buffer_is_written_when_all_is_done(how: Callable[[Counting, Tensor], Tensor]) -> None:
    expected, model = Counting(how), Counting(how)
    writing = writing_in_place(model)
    held = dict(model.named_buffers())
    for _ in range(2):
        x = torch.tensor([2.0, 3.0])
        assert torch.equal(writing(x), expected(x).clone())
        for name, buffer in expected.named_buffers():
            assert torch.equal(dict(model.named_buffers())[name], buffer)
            assert dict(model.named_buffers())[name] is held[name]  # written in place


def test_rule_4_outputs_are_not_written_with_the_buffers() -> None:
    writing = writing_in_place(Counting(_returns_what_was))
    first = writing(torch.ones(2))
    writing(torch.zeros(2))
    assert first.tolist() == [0, 0]


def test_rule_4_a_buffer_under_two_names_is_assigned_under_both_or_none() -> None:
    def both(model: Counting, x: Tensor) -> Tensor:
        model.total = model.inner.total = x + 1
        return x

    for how, fits in ((both, True), (_only_reads, True), (_assigns, False), (_assigns_inside, False)):
        model = Counting(how)
        model.inner.total = model.total
        if fits:
            writing_in_place(model)(torch.ones(2))
            assert model.total is model.inner.total
        else:
            with pytest.raises(CaptureError, match="two modules share is assigned in one of them"):
                writing_in_place(model)(torch.ones(2))


class Nested(nn.Module):
    def forward(self, pair: Any, *, options: dict[str, Any], scale: Any = 1) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1] * scale, "rest": (options["x"], [None])}


def test_rule_5_objects_are_made_of_leaves_and_taken_apart() -> None:
    flat = flattened(Nested(), ((1, 2),), {"options": {"x": 5}, "scale": 3})
    assert flat.leaves == (1, 2, 5, 3)
    assert [*inspect.signature(flat.module.forward).parameters] == ["pair_0", "pair_1", "options_x", "scale"]
    assert flat.names == ["pair", "options", "scale"]
    assert flat.module(1, 2, 5, 4) == [9, 5, None]
    tree = flat.tree
    assert tree.in_spec.unflatten([1, 2, 5, 3]) == (((1, 2),), {"options": {"x": 5}, "scale": 3})
    assert tree.out_spec is not None
    assert tree.out_spec.unflatten([7, 8, None]) == {"sum": 7, "rest": (8, [None])}


def test_rule_6_views_become_reshapes() -> None:
    aten = torch.ops.aten
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(aten.view.default, (graph.call_function(aten.t.default, (x,)), [6]))
    graph.output(view)
    module = fx.GraphModule(nn.Module(), graph)
    tracing._reshape_views(module)
    module.recompile()
    value = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(module(value), value.t().reshape(6))  # no view could be that


class Experts(nn.Module):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.how, self.error = "grouped", error

    def get_experts_implementation(self) -> str:
        return self.how

    def set_experts_implementation(self, how: str) -> None:
        if self.error is not None and how == "batched_mm":
            raise self.error
        self.how = how


def test_rule_1_experts_multiply_batches_for_a_while() -> None:
    half: Any = nn.Module()
    half.get_experts_implementation = lambda: "other"
    model = nn.ModuleList([Experts(), nn.ModuleList([Experts(ValueError("fixed")), half]), Experts(RuntimeError("no"))])
    found = [module for module in model.modules() if isinstance(module, Experts)]
    with plain_experts(model):
        assert [each.how for each in found] == ["batched_mm", "grouped", "grouped"]
    assert [each.how for each in found] == ["grouped"] * 3


def test_rule_1_what_an_error_of_another_kind_leaves_behind_is_undone() -> None:
    first = Experts()
    model = nn.ModuleList([first, Experts(KeyError("defect"))])
    with pytest.raises(KeyError), plain_experts(model):
        pass
    assert first.how == "grouped"


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("context", [plain_attention, plain_execution, lambda: fit_for_capture(nn.Linear(2, 2))])
def test_rule_1_attention_is_plain_for_a_while(context: Callable[[], Any], enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with contextlib.suppress(KeyError), context():
            inside = torch.backends.mha.get_fastpath_enabled()
            raise KeyError
        assert (inside, torch.backends.mha.get_fastpath_enabled()) == (False, enabled)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_what_is_compiled_runs_as_python() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("it was compiled")

    compiled = torch.compile(lambda x: x + 1, backend=refuse)
    with plain_execution():
        assert compiled(torch.ones(1)).tolist() == [2]


def test_rule_7_torch_is_silent_in_this_thread_alone() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("torch.something")
    logger.addHandler(handler)
    try:
        with tracing._quiet_torch():
            logger.error("of mine")
            other = threading.Thread(target=logger.error, args=("of others",))
            other.start()
            other.join()
            print("to nobody", file=sys.stderr)
        logger.error("afterwards")
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue().splitlines() == ["of others", "afterwards"]
    assert handler.filters == []


def test_rule_7_what_is_printed_meanwhile_is_kept_back(capsys: pytest.CaptureFixture[str]) -> None:
    with tracing._quiet_torch():
        print("to nobody", file=sys.stderr)
    print("to somebody", file=sys.stderr)
    assert capsys.readouterr().err == "to somebody\n"
