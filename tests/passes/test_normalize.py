"""Normal form, rule by rule."""

import pytest
import torch
from lowering_support import randomise
from torch import Tensor, nn

from srigl_fx.passes.base import run
from srigl_fx.passes.capture import capture
from srigl_fx.passes.normalize import Normalize
from srigl_fx.passes.program import Program

aten = torch.ops.aten


def normalise(model: nn.Module, x: Tensor) -> Program:
    return run((Normalize(),), capture(model, (x,))).subject


def targets(program: Program) -> list[object]:
    return [node.target for node in program.module.graph.nodes if node.op == "call_function"]


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        unused = x * 3  # noqa: F841 - a dead node
        return x.to(torch.float32).view(x.shape[0], -1).transpose(0, 1).reshape(-1)


def test_views_become_reshapes_and_assertions_and_dead_nodes_go() -> None:
    program = normalise(Views().eval(), torch.randn(2, 3, 4))
    called = targets(program)
    assert aten.reshape.default in called
    assert not {aten.view.default, aten._unsafe_view.default, aten._assert_tensor_metadata.default} & set(called)
    assert aten.mul.Tensor not in called
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(program.module(x), Views()(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "numbered"),
    [("same", (3, 5), (1, 2), True), ("valid", (2, 2), (1, 1), True), ("same", (2, 3), (1, 1), False)],
)
def test_padding_by_name(padding: str, kernel: tuple[int, int], dilation: tuple[int, int], numbered: bool) -> None:
    model = randomise(nn.Conv2d(2, 3, kernel, padding=padding, dilation=dilation)).eval()
    program = normalise(model, torch.randn(2, 2, 12, 12))
    assert (aten.conv2d.default in targets(program)) == numbered
    x = torch.randn(3, 2, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(program.module(x), model(x))
