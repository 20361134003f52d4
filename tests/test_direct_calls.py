"""Calls past torch's dispatcher: the bits of the operators, which are called where something has to observe them."""

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import srigl_fx as sx
from srigl_fx.errors import FormatError, LoweringError
from srigl_fx.lowering.loading import load_lowered
from srigl_fx.lowering.lowered import LoweredModule
from srigl_fx.passes.condensed_nodes import LINEAR, condensed_nodes, set_arguments
from srigl_fx.passes.program import arguments
from srigl_fx.runtime.cpu.direct import DirectCall
from srigl_fx.runtime.cpu.execute import Prepared
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.format import CondensedWeight


class Residual(nn.Module):
    """Convolutions of several kinds around an addition, then a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.Conv2d(16, 16, 3, padding=2, dilation=2)
        self.up, self.head = nn.ConvTranspose2d(16, 32, 2, stride=2), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.depth(x))
        result: Tensor = self.head(self.up(x).mean((2, 3)))
        return result


class Pair(nn.Module):
    """Two inputs with one batch, of which one is optional, and three outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, 33), nn.Linear(7, 33)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        one, two = torch.tanh(self.one(a)), self.two(b)
        return {"sum": one + two, "one": one, "two": two}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 70), nn.GELU(), nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "perceptron": (perceptron, lambda batch: (torch.randn(batch, 20),)),
    "sequences": (perceptron, lambda batch: (torch.randn(batch, 3, 20),)),
    "convolutions": (Residual, lambda batch: (torch.randn(batch, 3, 12, 10),)),
    "two inputs": (Pair, lambda batch: (torch.randn(batch, 20), torch.randn(batch, 7))),
}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of outputs that were computed past the dispatcher."""
    seen: list[tuple[int, ...]] = []
    plain = Prepared.__call__

    def counted(self: Prepared, x: Tensor, residual: Tensor | None) -> Tensor:
        y = plain(self, x, residual)
        seen.append(tuple(y.shape))
        return y

    monkeypatch.setattr(Prepared, "__call__", counted)
    return seen


def made(name: str, **options: Any) -> tuple[LoweredModule, Callable[[int], tuple[Tensor, ...]]]:
    make, inputs = MODELS[name]
    model = mask_by_hand(randomise(make()), 0.3).eval()
    lowered = sx.lower(model, inputs(4), min_speedup=0, verify=False, **options)
    assert isinstance(lowered, LoweredModule)
    return lowered, inputs


def leaves(result: Any) -> list[Tensor]:
    return list(result.values()) if isinstance(result, dict) else [result]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(*pair) for pair in zip(leaves(one), leaves(other), strict=True))


def by_operators(lowered: LoweredModule, *args: Any) -> Any:
    """What the graph gives, operator by operator."""
    with torch.no_grad():
        flat = torch.utils._pytree.tree_leaves(args)
        outputs = torch.fx.Interpreter(lowered).run(*flat, enable_io_processing=False)
    spec = lowered._out_spec
    assert spec is not None
    return torch.utils._pytree.tree_unflatten(list(outputs), spec)


def operand(lowered: LoweredModule, name: str) -> tuple[nn.Module, str, Tensor]:
    """A tensor of the first condensed layer, with the module that holds it, and its name there."""
    target = str(arguments(next(condensed_nodes(lowered.graph)))[name].target)
    owner, _, leaf = target.rpartition(".")
    return lowered.get_submodule(owner), leaf, lowered.state_dict(keep_vars=True)[target]


@pytest.mark.parametrize("options", [{}, {"value_dtype": torch.bfloat16}, {"value_dtype": torch.int8}], ids=str)
@every_model
def test_the_same_bits(name: str, options: dict[str, Any], direct: list[tuple[int, ...]]) -> None:
    lowered, inputs = made(name, **options)
    layers = len(list(condensed_nodes(lowered.graph)))
    for count in (1, 2):
        with torch_threads(count):
            for batch in (1, 5, 70):
                for again in range(3):
                    x = inputs(batch)
                    expected, before = by_operators(lowered, *x), len(direct)
                    with torch.inference_mode() if again == 2 else torch.no_grad():
                        assert same(lowered(*x), expected)
                    assert again == 0 or len(direct) > before
            assert len(direct) - before == layers or options  # parts of a batch in eight bits go through the operator


@pytest.mark.parametrize("name", ["perceptron", "convolutions"])
def test_bytes_between_layers(name: str, direct: list[tuple[int, ...]]) -> None:
    inputs = MODELS[name][1]
    lowered, _ = made(name, value_dtype=torch.int8, calibration=[inputs(16)])
    for _ in range(2):
        x = inputs(6)
        with torch.no_grad():
            assert same(lowered(*x), by_operators(lowered, *x))
    assert direct


def test_layouts_of_samples(direct: list[tuple[int, ...]]) -> None:
    lowered, _ = made("perceptron")
    x, wide = torch.randn(6, 20), torch.randn(6, 40)
    samples = {
        "rows": x,
        "columns": x.t().contiguous().t(),
        "every second one": wide[:, ::2],
        "one row again and again": x[:1].expand(6, 20),
        "negated without a copy": torch._neg_view(x),
    }
    for what, given in samples.items():
        expected = by_operators(lowered, given.clone().contiguous())
        for _ in range(2):
            with torch.no_grad():
                torch.testing.assert_close(lowered(given), expected, msg=what)
    assert direct


def test_what_changes_is_noticed(direct: list[tuple[int, ...]], tmp_path: Path) -> None:
    lowered, inputs = made("perceptron")
    (x,) = inputs(5)

    def agrees() -> None:
        with torch.no_grad():
            for _ in range(2):
                assert same(lowered(x), by_operators(lowered, x))

    agrees()
    first = next(condensed_nodes(lowered.graph))
    module, name, values = operand(lowered, "values")
    bias = operand(lowered, "bias")[2]
    results = [lowered(x).detach()]
    with torch.no_grad():
        values.mul_(2)  # in place
        agrees()
        results.append(lowered(x))
        bias.add_(1)
        agrees()
        results.append(lowered(x))
    setattr(module, name, values * 3)  # another tensor
    agrees()
    results.append(lowered(x).detach())
    lowered.load_state_dict({name: tensor.clone() for name, tensor in lowered.state_dict().items()})
    agrees()
    setattr(lowered, "0", copy.deepcopy(module))  # another module
    module.get_buffer(name).zero_()
    agrees()
    set_arguments(first, activation="none" if "relu" in str(first.kwargs) else "relu")  # another graph
    lowered.recompile()
    agrees()
    results.append(lowered(x).detach())
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(results))
    before = len(direct)
    delattr(operand(lowered, "values")[0], name)
    with pytest.raises(AttributeError, match=name), torch.no_grad():
        lowered(x)
    assert len(direct) == before


def test_copies_and_files(direct: list[tuple[int, ...]], tmp_path: Path) -> None:
    lowered, inputs = made("two inputs")
    x = inputs(5)
    lowered.save(tmp_path / "model.srigl")
    with torch.no_grad():
        expected = lowered(*x)
        ways = [copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered)), load_lowered(tmp_path / "model.srigl")]
        for other in ways:
            before = len(direct)
            for _ in range(2):
                assert same(other(*x), expected)
            assert len(direct) == before + 2
        for at, first in enumerate(ways):  # none has another one's weights
            first.get_submodule("one").get_buffer("weight_values").zero_()
            assert not same(first(*x), expected)
            assert all(same(other(*x), expected) for other in ways[at + 1 :])
        assert same(lowered(*x), expected)


def test_arguments_by_name_and_wrong_ones() -> None:
    lowered, inputs = made("two inputs")
    a, b = inputs(5)
    with torch.no_grad():
        expected = lowered(a, b)
        for _ in range(2):
            assert same(lowered(a, b=b), expected)
            assert same(lowered(b=b, a=a), expected)
        wrong: list[tuple[tuple[Any, ...], str]] = [
            ((a[:, 1:], b), r"input 0 .* is float32 \(5, 19\)"),
            ((a, b.double()), "give it as float32"),
            ((a, b[:4]), "has batch 4 and input 0 has 5"),
            ((a, 3), "input 1 .* is int"),
        ]
        for given, message in wrong:
            with pytest.raises(LoweringError, match=message):
                lowered(*given)
        for given in ((a,), (a, b, b)):
            with pytest.raises(TypeError):
                lowered(*given)
    assert str(inspect.signature(lowered.forward)) == "(a, b)"


@every_model
def test_gradients_are_those_of_the_operators(name: str, direct: list[tuple[int, ...]]) -> None:
    lowered, inputs = made(name)
    parameters = [one for one in lowered.parameters() if one.is_floating_point()]
    assert any(one.requires_grad for one in parameters)

    def gradients(call: Callable[..., Any], x: tuple[Tensor, ...]) -> list[Tensor | None]:
        wanted = [*(one.clone().requires_grad_() for one in x)]
        for one in parameters:
            one.grad = None
        torch.stack([leaf.square().sum() for leaf in leaves(call(*wanted))]).sum().backward()
        return [one.grad for one in (*wanted, *parameters)]

    for batch in (3, 3, 40):
        x = inputs(batch)
        with torch.profiler.profile():  # operator by operator
            expected = gradients(lowered, x)
        got = gradients(lowered, x)
        for one, other in zip(got, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.any()
                assert torch.equal(one, other)
    assert direct
    with torch.no_grad():
        plain = lowered(*x)
    assert all(
        leaf.requires_grad and torch.equal(leaf, other)
        for leaf, other in zip(leaves(lowered(*x)), leaves(plain), strict=True)
    )
    lowered.requires_grad_(False)
    assert not any(leaf.requires_grad for leaf in leaves(lowered(*x)))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_values_that_are_trained_are_read_anew(optimizer: Any) -> None:
    """A fused optimizer writes to them without a word to torch; they were called before that."""
    lowered, inputs = made("perceptron")
    (x,) = inputs(5)
    with torch.no_grad():
        first = lowered(x), lowered(x)
    names = [str(arguments(node)["values"].target) for node in condensed_nodes(lowered.graph)]
    values = [lowered.state_dict(keep_vars=True)[name].requires_grad_() for name in names]
    steps = optimizer(values, lr=0.1, fused=True)
    for _ in range(2):
        lowered(x).square().sum().backward()
        steps.step()
        with torch.no_grad():
            y = lowered(x)
            assert torch.equal(y, by_operators(lowered, x))
    assert not torch.equal(y, first[0])


def test_tensors_that_are_not_what_they_seem() -> None:
    lowered, inputs = made("perceptron")
    (x,) = inputs(5)
    owner, name, values = operand(lowered, "values")
    bias = operand(lowered, "bias")[2]
    with torch.no_grad():
        lowered(x), lowered(x)
        setattr(owner, name, torch._neg_view(values.clone()))
        for _ in range(3):
            torch.testing.assert_close(lowered(x), by_operators(lowered, x))
        setattr(owner, name, values)
        other = torch._neg_view(bias.detach().clone())
        for _ in range(3):
            got = torch.func.functional_call(lowered, {"0.bias": other}, (x,))
            torch.testing.assert_close(got, torch.func.functional_call(lowered, {"0.bias": -bias.detach()}, (x,)))
        bias.data = torch.arange(2.0 * len(bias))[::2]  # with gaps
        for _ in range(3):
            torch.testing.assert_close(lowered(x), by_operators(lowered, x))
        bias.data = torch.ones(3)
        with pytest.raises(FormatError):
            lowered(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_has_no_gradient_is_refused_as_ever() -> None:
    lowered, (x,) = made("perceptron")[0], MODELS["perceptron"][1](3)
    for _ in range(2):
        first = torch.autograd.grad(lowered(x.requires_grad_()).sum(), x, create_graph=False)[0]
    assert first.any()
    with pytest.raises(FormatError, match="second derivatives are not supported"):
        torch.autograd.grad(lowered(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lowered, (x.detach(),), (torch.ones_like(x),))
    rounded, _ = made("perceptron", value_dtype=torch.int8)
    for _ in range(2):
        with pytest.raises(FormatError, match="have no gradient"):
            rounded(x).sum().backward()


class Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_whoever_looks_sees_the_operators(direct: list[tuple[int, ...]]) -> None:
    lowered, inputs = made("perceptron")
    (x,), (other,) = inputs(3), inputs(3)
    with torch.no_grad():
        lowered(x)
        expected = lowered(x)
        used = len(direct)
        assert used
        with Seen() as seen:
            assert same(lowered(x), expected)
        assert seen.operators.count(LINEAR) == 3
        with torch.profiler.profile() as profiler:
            lowered(x)
        assert [event.name for event in profiler.events()].count("srigl_fx::condensed_linear") == 3
        traced = torch.jit.trace(lowered, (x,), check_trace=False)  # type: ignore[no-untyped-call]
        torch.testing.assert_close(traced(other), lowered(other))
        used = len(direct)
        graph = make_fx(lowered)(x)
        assert sum(node.target is LINEAR for node in graph.graph.nodes) == 3
        assert sum(node.target is LINEAR for node in torch.export.export(lowered, (x,)).graph.nodes) == 3
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert lowered(mode.from_tensor(x)).shape == (3, 9)
        doubled = {name: 2 * tensor for name, tensor in lowered.named_parameters()}
        assert not same(torch.func.functional_call(lowered, doubled, (x,)), expected)
        assert same(lowered(x), expected)
    symbolic = torch.fx.symbolic_trace(lowered)
    assert sum(node.target is LINEAR for node in symbolic.graph.nodes) == 3


@pytest.mark.slow
def test_a_compiled_module_is_one_graph() -> None:
    lowered, inputs = made("perceptron")
    (x,) = inputs(3)
    compiled = torch.compile(lowered, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert same(compiled(x), lowered(x))


def test_weights_in_use_are_checked_as_ever() -> None:
    """Indices that go out of range are refused, whether the layer was called before or not."""
    lowered, inputs = made("perceptron")
    (x,) = inputs(3)
    indices = operand(lowered, "indices")[2]
    with torch.no_grad():
        lowered(x), lowered(x)
        indices.copy_(torch.full_like(indices, 1000))
        with pytest.raises(FormatError, match="rebuild the operands"):
            lowered(x)


def test_many_shapes_are_not_kept_for_ever() -> None:
    dense = torch.randn(33, 20)
    weight = CondensedWeight.from_dense(dense.numpy(), np.tile(np.arange(20) % 3 == 0, (33, 1)), np.zeros(33))
    values, indices, active, bias = (
        torch.from_numpy(part) for part in (weight.values, weight.indices, weight.active, weight.bias)
    )
    call = DirectCall(LINEAR, {"in_features": 20})
    with torch.no_grad():
        for batch in range(1, 140):
            x = torch.randn(batch, 20)
            for _ in range(2):
                assert torch.equal(
                    call(x, values, indices, active, bias, None, None), LINEAR(x, values, indices, active, bias, 20)
                )
    assert call._known is not None
    assert len(call._known.prepared) <= 64
