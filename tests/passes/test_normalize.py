"""Normal form, rule by rule."""

import pytest
import torch
import torch.nn.functional as F
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


def test_rules_1_2_and_7_assertions_views_and_dead_nodes() -> None:
    program = normalise(Views().eval(), torch.randn(2, 3, 4))
    called = targets(program)
    assert aten.reshape.default in called
    assert not {aten.view.default, aten._unsafe_view.default, aten._assert_tensor_metadata.default} & set(called)
    assert aten.mul.Tensor not in called
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(program.module(x), Views()(x))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    ("kind", "padding", "kernel", "dilation", "numbered"),
    [
        (nn.Conv2d, "same", (3, 5), (1, 2), True),
        (nn.Conv2d, "valid", (2, 2), (1, 1), True),
        (nn.Conv2d, "same", (2, 3), (1, 1), False),
        (nn.Conv1d, "same", (5,), (2,), True),
        (nn.Conv1d, "valid", (4,), (1,), True),
        (nn.Conv3d, "same", (1, 3, 5), (1, 1, 1), True),
        (nn.Conv3d, "same", (1, 3, 4), (1, 1, 1), False),
    ],
)
def test_rule_3_padding_by_name(
    kind: type[nn.Conv2d], padding: str, kernel: tuple[int, int], dilation: tuple[int, int], numbered: bool
) -> None:
    model = randomise(kind(2, 3, kernel, padding=padding, dilation=dilation)).eval()
    space = (12, 12, 12)[: len(kernel)]
    program = normalise(model, torch.randn(2, 2, *space))
    (target,) = targets(program)
    assert str(target).endswith(".default") == numbered
    x = torch.randn(3, 2, *space)
    with torch.no_grad():
        torch.testing.assert_close(program.module(x), model(x))


class Detours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(torch.relu(x).detach()).clone()
        out: Tensor = torch.tanh(y[:].float()[:, :, :]) + y[:, 1:]
        return out


def test_rules_4_and_5_what_returns_or_copies_its_operand_goes() -> None:
    program = normalise(Detours().eval(), torch.randn(2, 1, 4))
    assert targets(program) == [aten.relu.default, aten.tanh.default, aten.slice.Tensor, aten.add.Tensor]
    x = torch.randn(3, 1, 4)
    torch.testing.assert_close(program.module(x), Detours().eval()(x))


def test_rule_4_keeps_dropout_that_is_on() -> None:
    class On(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = F.dropout(x, 0.5, training=True)
            return y + 1

    called = targets(normalise(On().eval(), torch.randn(2, 4)))
    assert any("dropout" in str(target) or "bernoulli" in str(target) for target in called)


class Copied(nn.Module):
    """Copies of an input and of one of two outputs, through views."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.relu(x)
        return x.clone().transpose(0, 1)[1:], y, y.clone().reshape(-1)


def test_rule_5_keeps_copies_that_an_output_may_show() -> None:
    program = normalise(Copied().eval(), torch.randn(2, 3))
    assert targets(program).count(aten.clone.default) == 2
    x = torch.randn(4, 3)
    before = x.clone()
    first, y, second = program.module(x)
    first.fill_(7.0)
    second.fill_(7.0)
    torch.testing.assert_close(x, before)
    torch.testing.assert_close(y, before.relu())


class Recast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.double().mul(3).float()
        z = y.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        return torch.as_strided(z, (2, 2), (1, 2)) + 1


def test_rule_5_keeps_casts_and_the_layout_that_strides_are_read_from() -> None:
    program = normalise(Recast().eval(), torch.randn(2, 3, 4))
    called = targets(program)
    assert called.count(aten._to_copy.default) == 2
    assert aten.clone.default in called
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(program.module(x), Recast()(x))


@pytest.mark.slow
def test_normal_form_is_stable() -> None:
    program = normalise(Copied().eval(), torch.randn(2, 3))
    assert not run((Normalize(),), program).changed


class BeginsEmpty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cat([torch.tensor([]), x], -2), torch.tensor([]), x[:, :0] + 1, x], 1)


def test_rule_6_empty_tensors_are_not_concatenated() -> None:
    x = torch.randn(2, 3, 4)
    program = normalise(BeginsEmpty().eval(), x)
    counts = [len(node.args[0]) for node in program.module.graph.nodes if node.target is aten.cat.default]
    assert counts == [1, 3]  # an empty tensor with dimensions of its own stays
    torch.testing.assert_close(program.module(x), BeginsEmpty()(x))


class Turned(nn.Module):
    """Shuffles of channels, and what only looks like one."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if self.form == "shuffle":
            return x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w) + 1
        if self.form == "flattened":
            return x.reshape(n, 2, 3, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2) + 1
        if self.form == "other axes":
            return x.view(n, 3, c // 3, h, w).transpose(1, 3).reshape(n, c, h, w) + 1
        if self.form == "another shape":
            return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, h, c, w) + 1
        if self.form == "one group":
            return x.view(n, 1, c, h, w).transpose(1, 2).reshape(n, c, h, w) + 1
        return x.view(n, c, 2, h // 2, w).transpose(1, 2).reshape(n, c, h, w) + 1  # space and channels mixed


@pytest.mark.parametrize(
    ("form", "groups"),
    [("shuffle", 3), ("flattened", 2), ("other axes", 0), ("another shape", 0), ("one group", 0), ("mixed", 0)],
)
def test_rule_9_a_shuffle_that_is_written_out_is_one_operator(form: str, groups: int) -> None:
    program = normalise(Turned(form).eval(), torch.randn(2, 6, 4, 5))
    calls = [node for node in program.module.graph.nodes if node.target is aten.channel_shuffle.default]
    assert [node.args[1] for node in calls] == [groups] * bool(groups)
    for batch in (1, 4):
        x = torch.randn(batch, 6, 4, 5)
        assert torch.equal(program.module(x), Turned(form)(x))


class Renamed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.concat([torch.subtract(x, x.exp(), alpha=3), torch.divide(x, 2.0, rounding_mode="floor")], dim=-1)


def test_rule_8_second_names_become_first_ones() -> None:
    program = normalise(Renamed().eval(), torch.randn(2, 3))
    assert targets(program) == [aten.exp.default, aten.sub.Tensor, aten.div.Tensor_mode, aten.cat.default]
    x = torch.randn(4, 3)
    assert torch.equal(program.module(x), Renamed()(x))
    assert not run((Normalize(),), program).changed
