"""Buffers that a graph writes, and what stands around a model: both on modules made by hand."""

from typing import Any

import torch
from torch import fx, nn
from torch.nn.parallel import DataParallel

from srigl_fx.passes.state import kept_in, own_state, writes
from srigl_fx.passes.wrappers import unwrapped

aten = torch.ops.aten


def graph_with_writes() -> fx.GraphModule:
    """Writes ``inner.state`` and its input, and reads ``still``."""
    root = nn.Module()
    inner = nn.Module()
    inner.register_buffer("state", torch.ones(2, requires_grad=False))
    root.inner = inner
    root.register_buffer("still", torch.ones(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    state, still = graph.get_attr("inner.state"), graph.get_attr("still")
    total = graph.call_function(aten.add.Tensor, (state, still))
    graph.call_function(aten.copy_.default, (state, total))
    graph.call_function(aten.copy_.default, (x, total))
    graph.output(total)
    return fx.GraphModule(root, graph)


def test_buffers_are_told_from_inputs_that_are_written() -> None:
    module = graph_with_writes()
    (state,) = (node for node in module.graph.nodes if node.target == "inner.state")
    assert {name: node.args[0] for name, node in writes(module.graph).items()} == {"inner.state": state}


def test_a_graph_has_its_own_copy_of_what_it_writes_and_of_nothing_else() -> None:
    module = graph_with_writes()
    state, still = module.get_buffer("inner.state"), module.get_buffer("still")
    own_state(module)
    own = module.get_buffer("inner.state")
    assert own is not state
    assert torch.equal(own, state)
    assert module.get_buffer("still") is still
    module(torch.zeros(2))
    assert own.tolist() == [2, 2]
    assert state.tolist() == [1, 1]


def test_a_buffer_in_words() -> None:
    norm = nn.BatchNorm1d(2)
    assert kept_in(norm, "running_mean") == "the buffer 'running_mean' of the model (BatchNorm1d)"
    kind: Any = type("Generated", (nn.BatchNorm1d,), {"_srigl_fx_dense_class": nn.BatchNorm1d})
    assert kept_in(nn.Sequential(nn.Sequential(kind(2))), "0.0.n") == "the buffer 'n' of 0.0 (BatchNorm1d)"


def test_all_wrappers_are_taken_off_in_any_order() -> None:
    layer = nn.Linear(2, 2)
    compiled = nn.Module()
    compiled.add_module("_orig_mod", DataParallel(layer))
    assert unwrapped(DataParallel(compiled)) is layer
    inside = nn.Sequential(DataParallel(layer))
    assert unwrapped(inside) is inside  # a part stays wrapped
