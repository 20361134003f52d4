"""Regenerated forwards compute what the originals do, and whatever a graph cannot show is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srigl_fx.nn import regenerated
from srigl_fx.nn.regenerated import RegenerationError


class Holder(nn.Module):
    """A weight, a buffer and a forward of the test's choice."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("count", torch.zeros(()))
        self.drop = nn.Dropout(0.5)
        self.seen: Tensor | None = None
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def round_with_bias(value: Tensor, low: float) -> Tensor:
    if value.max() > low:
        value = value - low
    return value


class Helped(nn.Module):
    """Calls a function that has to see its data."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_with_bias(x, 0.25), self.w.tanh())


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


rounded: Callable[[Tensor], Tensor] = Rounded.apply


class RoundedApart(Rounded):
    """Written in two parts, and a subclass of a subclass."""

    @staticmethod
    def forward(value: Tensor) -> Tensor:  # type: ignore[override]
        return value.floor() + 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class RoundedDecorated(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.round()

    backward = Rounded.backward


rounded_apart: Callable[[Tensor], Tensor] = RoundedApart.apply
rounded_decorated: Callable[[Tensor], Tensor] = RoundedDecorated.apply


def without_gradient(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = module.w.abs().mean()
    return F.linear(x, module.w * scale)


def remembers(module: Any, x: Tensor) -> Tensor:
    module.seen = x
    return F.linear(x, module.w)


def makes_constants(module: Any, x: Tensor) -> Tensor:
    return F.linear(x, module.w + torch.ones(6, 4))


def autocast(module: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return F.linear(x, module.w)


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (without_gradient, "no_grad"),
        (remembers, "writes to 'seen'"),
        (makes_constants, "makes constant tensors"),
        (autocast, "switches autocast"),
        (lambda module, x: F.linear(x, rounded(module.w)), "a gradient of its own"),
        (lambda module, x: F.linear(x, rounded_apart(module.w)), "a gradient of its own"),
        (lambda module, x: F.linear(x, rounded_decorated(module.w)), "a gradient of its own"),
        (lambda module, x: F.linear(x, module.w) if x.sum() > 0 else x, "torch.fx cannot trace it"),
    ],
)
def test_what_a_graph_cannot_show_is_refused(use: Callable[[Any, Tensor], Tensor], reason: str) -> None:
    module = Holder(use)
    before = dict(vars(module))
    with pytest.raises(RegenerationError, match=reason):
        regenerated.trace(module, training=True)
    assert vars(module) == before
    assert module.get_buffer("count").item() == 0


def test_optional_arguments_and_replaced_forwards_are_refused() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return x if gate is None else x * gate

    with pytest.raises(RegenerationError, match="optional argument 'gate"):
        regenerated.trace(Optional(), training=True)
    layer = nn.Linear(3, 3)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    with pytest.raises(RegenerationError, match="not a plain method"):
        regenerated.trace(layer, training=False)


def test_writes_to_a_buffer_happen_when_the_code_runs() -> None:
    def counts(module: Any, x: Tensor) -> Tensor:
        module.count.add_(1)
        return F.linear(x, module.w)

    module = Holder(counts)
    program = regenerated.with_values(regenerated.trace(module, training=True), ())
    assert module.get_buffer("count").item() == 0
    x = torch.randn(2, 4)
    assert torch.equal(program(module, x), F.linear(x, module.w))
    assert module.get_buffer("count").item() == 1


def test_a_function_that_needs_its_data_is_called_as_it_is() -> None:
    module = Helped()
    graph = regenerated.trace(module, training=False)
    (tanh,) = [node for node in graph.nodes if node.target == "tanh"]
    program = regenerated.with_values(graph, (tanh.name,))
    transform = regenerated.between(graph, "w", tanh.name)
    for x in (torch.randn(3, 4), torch.full((1, 4), -1.0)):
        torch.testing.assert_close(program(module, transform(module, module.w), x), module(x), rtol=0, atol=0)
    assert torch.equal(program(module, torch.zeros(6, 4), torch.randn(2, 4)), torch.zeros(2, 6))


def test_each_mode_has_its_graph() -> None:
    module = Holder(lambda module, x: F.linear(x, F.dropout(module.w, 0.5, module.training)))
    shown = [str(regenerated.trace(module, training=training)) for training in (False, True)]
    assert shown[0] != shown[1]
    assert module.training
