"""Which attempts at a capture are made after which errors, and what a graph is refused for: without an export."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from srigl_fx.errors import CaptureError
from srigl_fx.passes import capture as capturing
from srigl_fx.passes.capture import Capture, _Rung, capture_region, capture_whole, uncapturable
from srigl_fx.passes.capture_checks import (
    about_places,
    check_free,
    check_pure,
    check_state,
    class_name,
    first_line,
    fit_batches,
    raised_by,
    raised_in,
    replaced_buffer,
)
from srigl_fx.passes.model_runs import Run
from srigl_fx.passes.program import Program
from srigl_fx.passes.sizes import Sizes

DYNAMIC, AUTOMATIC, STATIC = "dynamic", "automatic", "static"
STRICT_AUTOMATIC, STRICT_STATIC = "strict automatic", "strict static"
X = torch.ones(2, 3)

SIZES = "Constraints violated: s0 is specialized"
DATA = "Could not guard on data-dependent expression u0"
UNBACKED = "needs an unbacked symbol"
LEAKED = "a fake tensor was kept"
OTHER = "no such operator"


def attempts(monkeypatch: pytest.MonkeyPatch, capture: Any, errors: Mapping[str, str], default: str) -> list[str]:
    """The attempts that are made where each fails with its error."""
    made: list[str] = []

    def export(model: Any, args: Any, kwargs: Any, free: Any, rung: _Rung, run: Any, *, asked: bool) -> Any:
        assert bool(free) == (rung.dim is not None)
        name = rung.attempt.removeprefix("torch.export").removesuffix(" batch").replace(",", "").strip()
        made.append(name)
        raise RuntimeError(errors.get(name, default))

    monkeypatch.setattr(capturing, "_export", export)
    done = capture()
    assert isinstance(done, Capture)
    assert done.program is None
    assert len(done.failures) == len({failure.error for failure in done.failures})  # each error is told once
    return made


@pytest.mark.parametrize(
    ("errors", "default", "made"),
    [
        ({}, SIZES, [DYNAMIC, AUTOMATIC, STATIC, STRICT_AUTOMATIC, STRICT_STATIC]),
        ({}, OTHER, [DYNAMIC, STATIC, STRICT_AUTOMATIC, STRICT_STATIC]),
    ],
    ids=["sizes", "others"],
)
def test_rule_5_attempts_on_a_whole_model(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, str], default: str, made: list[str]
) -> None:
    model = nn.Linear(3, 2).eval()
    assert attempts(monkeypatch, lambda: capture_whole(model, (X,), {}), errors, default) == made


@pytest.mark.parametrize("error", [DATA, UNBACKED, LEAKED])
def test_rule_5_nothing_cures_a_branch_on_values(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    model = nn.Linear(3, 2).eval()
    assert attempts(monkeypatch, lambda: capture_whole(model, (X,), {}), {}, error) == [DYNAMIC]


def test_rule_4_without_a_batch_only_fixed_sizes_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Identity().eval()
    scalar = torch.tensor(1.0)
    assert attempts(monkeypatch, lambda: capture_whole(model, (scalar,), {}), {}, OTHER) == [STATIC, STRICT_STATIC]


@pytest.mark.parametrize(
    ("varying", "error", "made"),
    [
        ({}, SIZES, [AUTOMATIC, STATIC, STRICT_AUTOMATIC]),
        ({}, OTHER, [AUTOMATIC, STRICT_AUTOMATIC]),
        ({0: frozenset({0})}, SIZES, [AUTOMATIC]),
        ({0: frozenset({0})}, OTHER, [AUTOMATIC, STRICT_AUTOMATIC]),
        ({}, DATA, [AUTOMATIC]),
    ],
)
def test_rule_5_attempts_on_a_part(
    monkeypatch: pytest.MonkeyPatch, varying: dict[int, frozenset[int]], error: str, made: list[str]
) -> None:
    free = {0: frozenset({0})}
    model = nn.Linear(3, 2).eval()
    assert attempts(monkeypatch, lambda: capture_region(model, (X,), {}, free, varying, "fc"), {}, error) == made


@pytest.mark.parametrize(
    ("dim", "strict", "text"),
    [
        (Dim.DYNAMIC, False, "torch.export, dynamic batch"),
        (Dim.AUTO, True, "torch.export strict, automatic batch"),
        (None, False, "torch.export, static batch"),
    ],
)
def test_attempts_in_words(dim: Any, strict: bool, text: str) -> None:
    assert _Rung(dim, strict).attempt == text


def test_the_first_error_is_raised_with_its_cause_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def export(*args: Any) -> Any:
        raise RuntimeError(OTHER)

    monkeypatch.setattr(capturing, "_export", export)
    model = nn.Linear(3, 2).eval()
    done = capture_whole(model, (X,), {})
    error = uncapturable(model, done)
    assert str(done.failures[0]) == f"the model (Linear): {done.failures[0].error}"
    assert error.__cause__ is done.cause
    assert f"cannot capture Linear whole: {done.failures[0].error}; a forward must not branch" in str(error)


@pytest.mark.parametrize(
    "register",
    [
        lambda model, name: model.register_buffer(name, torch.ones(1)),
        lambda model, name: model.register_parameter(name, nn.Parameter(torch.ones(1))),
        lambda model, name: model.add_module(name, nn.Identity()),
    ],
)
def test_names_that_a_graph_needs_for_itself_are_told_without_an_attempt(register: Any) -> None:
    model = nn.Identity().eval()
    register(model, "graph")
    model.eval()
    done = capture_whole(model, (X,), {})
    assert [(failure.attempt, failure.error[:21]) for failure in done.failures] == [
        ("not tried", "its attribute 'graph'")
    ]
    assert str(uncapturable(model, done)).count("branch on the values") == 0  # no advice that would not help


def fake(*sizes: int) -> Tensor:
    """A value of a graph whose sizes are free but for those of one."""
    made: Tensor = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.ones(sizes), static_shapes=False)
    return made


def program(*values: Tensor, leaves: tuple[Tensor, ...]) -> Program:
    graph = fx.Graph()
    for position, value in enumerate(values):
        graph.placeholder(f"x{position}").meta["val"] = value
    graph.output(())
    module = fx.GraphModule(nn.Module(), graph)
    return Program(module=module, model=nn.Identity(), args=leaves, kwargs={}, how="")


def exported(limits: dict[Any, Any] | None = None, **signature: Any) -> Any:
    return SimpleNamespace(range_constraints=limits or {}, graph_signature=SimpleNamespace(**signature))


ALL, NONE = frozenset({0, 1}), frozenset[int]()


def test_rule_6_sizes_that_must_be_free_are() -> None:
    free, fixed = fake(5, 4), torch.ones(5, 4)
    leaves = torch.ones(5, 4), torch.ones(5, 4)
    check_free(program(free, fixed, leaves=leaves), exported(), {0: ALL}, {0: ALL})
    check_free(program(fixed, fixed, leaves=leaves), exported(), {}, {})
    with pytest.raises(CaptureError, match="all sizes are specialized to constants"):
        check_free(program(fixed, fixed, leaves=leaves), exported(), {0: ALL}, {})
    with pytest.raises(CaptureError, match="dimension 1 of input 1 varies from call to call, but is built in"):
        check_free(program(free, fixed, leaves=leaves), exported(), {0: ALL}, {1: frozenset({1})})


def test_rule_6_a_batch_that_was_repeated_must_not_be_built_in() -> None:
    repeated, free = torch.ones(2, 4), fake(5, 4)
    leaves = torch.ones(5, 4), torch.ones(1, 4)
    with pytest.raises(CaptureError, match="dimension 0 of input 1 is specialized to a constant"):
        check_free(program(free, repeated, leaves=leaves), exported(), {0: ALL, 1: ALL}, {})
    leaves = torch.ones(5, 4), torch.ones(2, 4)  # it was as large as it is: a size that the user gave
    check_free(program(free, repeated, leaves=leaves), exported(), {0: ALL, 1: ALL}, {})


@pytest.mark.parametrize(
    ("lower", "upper", "refused"), [(2, 2**40, False), (0, 2**40, False), (3, 2**40, True), (2, 100, True)]
)
def test_rule_6_a_graph_that_is_right_for_some_sizes_alone(lower: int, upper: int, refused: bool) -> None:
    value = fake(5, 4)
    symbol: Any = value.shape[0]
    limits = {symbol.node.expr: SimpleNamespace(lower=lower, upper=upper)}
    checked = program(value, leaves=(torch.ones(5, 4),))
    if refused:
        with pytest.raises(CaptureError, match=f"dimension 0 of input 0 .* right from {lower} to {upper}"):
            check_free(checked, exported(limits), {0: ALL}, {})
    else:
        check_free(checked, exported(limits), {0: ALL}, {})


@pytest.mark.parametrize(
    ("buffers", "inputs", "written"),
    [({"a": "total"}, {}, "total"), ({}, {"b": "x"}, "x"), ({"a": "y"}, {"b": "x", "c": "x"}, "x, y")],
)
def test_rule_6_a_part_of_a_model_writes_nothing(buffers: Any, inputs: Any, written: str) -> None:
    check_pure(exported(buffers_to_mutate={}, user_inputs_to_mutate={}))
    with pytest.raises(CaptureError, match=f"^it writes into {written}$"):
        check_pure(exported(buffers_to_mutate=buffers, user_inputs_to_mutate=inputs))


def ran(**written: str) -> Run:
    return Run(output=None, written=written, changed=(), buffers={})


def test_rule_1_buffers_that_are_replaced_by_others_of_their_kind_or_not() -> None:
    model = nn.BatchNorm1d(2)
    assert replaced_buffer(model, ran()) == replaced_buffer(model, ran(running_mean="")) == ""
    said = replaced_buffer(model, ran(running_mean="", running_var="(2,) to (3,)"))
    assert said.startswith("it changes the buffer 'running_var' of the model (BatchNorm1d) from (2,) to (3,): register")


def test_rule_6_what_a_model_writes_its_graph_writes() -> None:
    model = nn.Module()
    model.register_buffer("seen", torch.ones(2))
    model.register_buffer("unseen", torch.ones(2))
    graph = fx.Graph()
    graph.call_function(torch.ops.aten.copy_.default, (graph.get_attr("seen"), graph.get_attr("unseen")))
    graph.output(())
    module = fx.GraphModule(model, graph)
    made = Program(module=module, model=model, args=(), kwargs={}, how="")
    check_state(made, ran())
    check_state(made, ran(seen=""))
    with pytest.raises(CaptureError, match=r"it writes the buffer 'unseen' of the model .* with copy_"):
        check_state(made, ran(seen="", unseen=""))
    inner = nn.Module()
    inner.register_buffer("again", model.get_buffer("unseen"))
    model.inner = inner
    with pytest.raises(CaptureError, match=r"registered in 2 places \(unseen, inner.again\), of which"):
        check_state(made, ran(unseen=""))


class Sums(nn.Module):
    """Runs at batches of at most ``most``, or of equal size alone."""

    def __init__(self, most: int = 100, *, equal: bool = False) -> None:
        super().__init__()
        self.most, self.equal = most, equal

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if max(len(x), len(y)) > self.most or (self.equal and len(x) != len(y)):
            raise ValueError("\n  it is too large\nfor me")
        return x.sum(0) + y.sum(0)


@pytest.mark.parametrize(
    ("model", "ties", "found"),
    [
        (Sums(), (0, 1), ("batch", "batch_1")),
        (Sums(equal=True), (0, 1), ("batch", "batch")),  # tied, which the graph did not say
        (Sums(), (0, 0), ("batch", "batch")),
    ],
    ids=["apart", "equal", "tied"],
)
def test_batches_are_tied_where_the_model_runs_with_equal_ones_alone(
    model: nn.Module, ties: tuple[int, ...], found: tuple[str, ...]
) -> None:
    settings: dict[str, Any] = {"module": fx.GraphModule(nn.Module(), fx.Graph()), "model": model, "kwargs": {}}
    made = Program(**settings, args=(X, X), sizes=Sizes.of_batch((True, True), ties), how="")
    assert tuple(str(axes[0]) for axes in fit_batches(made).sizes.axes) == found
    fixed = Program(**settings, args=(X, X), sizes=Sizes.of_batch((False, False), ties), how="")
    assert fit_batches(fixed) is fixed


def test_a_model_that_runs_at_no_other_batch_says_why() -> None:
    settings: dict[str, Any] = {"module": fx.GraphModule(nn.Module(), fx.Graph()), "model": Sums(2), "kwargs": {}}
    made = Program(**settings, args=(X, X), sizes=Sizes.of_batch((True, True)), how="")
    with pytest.raises(CaptureError, match=r"at batch \d.*raise ValueError.*: ValueError: it is too large$"):
        fit_batches(made)


def raised(call: Any, *args: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        call(*args)
    return caught.value


def test_errors_in_words() -> None:
    assert first_line(ValueError("")) == first_line(ValueError(" \n ")) == "ValueError"
    part = Sums(0)
    model = nn.Sequential(nn.Identity(), nn.Sequential(part))
    error = raised(part, X, X)
    assert raised_by(error).startswith("test_capture_attempts.py, line ")
    assert "raise ValueError" in raised_by(error)
    assert raised_by(ValueError("never raised")) == ""
    assert raised_in(error, model) == ("1.0", part)
    assert raised_in(ValueError("never raised"), model) == ("", model)
    assert about_places(error, model) == ""
    place = raised(Index(), X)
    assert about_places(place, nn.Sequential(nn.Identity())).startswith("; a position is known only when")
    index = Index()
    place = raised(index, X)
    assert about_places(place, nn.Sequential(index)).startswith("; a position in 0 is known only when")
    kind = type("Generated", (nn.Linear,), {"_srigl_fx_dense_class": nn.Linear})
    assert class_name(kind(2, 2)) == "Linear"


class Index(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("a specialized integer")
