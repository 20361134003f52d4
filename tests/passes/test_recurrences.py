"""Recurrent layers in a trace: shapes that are told at once are those that the steps have, and torch is as before."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._decomp import decomposition_table
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from srigl_fx.passes.asked_sizes import wishes
from srigl_fx.passes.capture_sizes import capture_with
from srigl_fx.passes.recurrences import RECURRENT, whole_recurrences

KINDS: list[Any] = [nn.RNN, nn.GRU, nn.LSTM]


def shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(value)]


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_steps(kind: Any, options: dict[str, Any]) -> None:
    layer, x = kind(3, 4, **options), torch.randn(5, 2, 3)
    expected = shapes(layer(x))
    with whole_recurrences(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert shapes(layer(mode.from_tensor(x))) == expected


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # of one of torch's backends
def test_projections_have_their_own_width() -> None:
    layer, x = nn.LSTM(3, 6, proj_size=2), torch.randn(5, 2, 3)
    expected = shapes(layer(x))
    with whole_recurrences(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert shapes(layer(mode.from_tensor(x))) == expected


def test_torch_is_as_it_was_afterwards() -> None:
    kernels = [dict(operator.py_kernels) for operator in RECURRENT]
    known = [operator in decomposition_table for operator in RECURRENT]
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    expected = layer(x)[0]
    with whole_recurrences():
        assert torch.equal(layer(x)[0], expected)  # with numbers it computes
        with whole_recurrences():
            pass
        assert all(operator in decomposition_table for operator in RECURRENT)
    assert [dict(operator.py_kernels) for operator in RECURRENT] == kernels
    assert [operator in decomposition_table for operator in RECURRENT] == known


@pytest.mark.slow
def test_the_trace_keeps_one_operator_and_any_length() -> None:
    layer, x = nn.GRU(3, 4).eval(), torch.randn(5, 2, 3)
    program = capture_with(layer, (x,), {}, wishes(layer, (x,), {}, ({0: "length"},))).program
    assert program is not None
    assert [node.target for node in program.module.graph.nodes].count(torch.ops.aten.gru.input) == 1
    longer = torch.randn(9, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(program.module(longer)[0], layer(longer)[0])
