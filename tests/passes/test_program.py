"""The subject of the passes of ``lower``: its inputs at other sizes, its copies, and how its tensors are found."""

from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand
from torch import Tensor, fx, nn

from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.program import (
    MaskedTensor,
    MatchedLayer,
    Program,
    Use,
    arguments,
    enter_masks,
    new_buffer,
    operands,
    tensor_at,
)
from srigl_fx.passes.sizes import Sizes, resize

aten = torch.ops.aten


def program_of(*args: Any, batched: tuple[bool, ...], ties: tuple[int, ...] = (), **kwargs: Any) -> Program:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    module = fx.GraphModule(nn.Module(), graph)
    sizes = Sizes.of_batch(batched, ties)
    return Program(module=module, model=module, args=args, kwargs=kwargs, sizes=sizes, how="by hand")


@pytest.mark.parametrize(
    ("args", "batched", "size", "other"),
    [
        ((torch.ones(4, 2),), (True,), 4, 5),
        ((torch.ones(5, 2),), (True,), 5, 7),  # odd, and no multiple
        ((torch.ones(1, 2),), (True,), 1, 3),
        ((torch.ones(7, 2), torch.ones(4, 2)), (False, True), 4, 5),  # that which is batched counts
        ((torch.ones(()), torch.ones(6)), (False, False), 6, 7),
        ((3, torch.ones(())), (False, False), 1, 3),
    ],
)
def test_batch_sizes(args: tuple[Any, ...], batched: tuple[bool, ...], size: int, other: int) -> None:
    program = program_of(*args, batched=batched)
    assert (program.batch_size, program.other_batch) == (size, other)
    assert program.dynamic == any(batched)
    assert [str(at) for at in program.trials] == [f"batch {n}" for n in ([size, other] if any(batched) else [size])]


def lengths(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> list[int]:
    args, kwargs = inputs
    return [leaf.shape[0] for leaf in (*args, *kwargs.values())]


def test_inputs_of_another_size() -> None:
    x = torch.arange(3.0)
    program = program_of(x, torch.ones(4), batched=(True, False, True), mask=torch.arange(2.0))
    assert lengths(program.inputs()) == [3, 4, 2]
    args, kwargs = program.inputs(5)
    assert args[0].tolist() == [0, 1, 2, 0, 1]
    assert (args[1].tolist(), kwargs["mask"].tolist()) == ([1] * 4, [0, 1, 0, 1, 0])
    assert program.inputs(2)[0][0].tolist() == [0, 1]
    assert lengths(program_of(x, batched=(False,)).inputs(5)) == [3]


@pytest.mark.parametrize(
    ("ties", "apart", "expected"),
    [
        ((7, 0, 3, 7), True, [3, 9, 5, 3]),  # those with one number have one size, in the order of their first ones
        ((7, 0, 3, 7), False, [3, 9, 3, 3]),
        ((), True, [3, 9, 3, 3]),  # all are tied
        ((0, 7, 1, 2), True, [3, 9, 5, 7]),
    ],
)
def test_sizes_that_the_graph_does_not_tie_differ(ties: tuple[int, ...], apart: bool, expected: list[int]) -> None:
    inputs = [torch.ones(2), torch.ones(9), torch.ones(2), torch.ones(2)]
    program = program_of(*inputs, batched=(True, False, True, True), ties=ties)
    assert lengths(program.inputs(3, apart=apart)) == expected


def test_samples_are_repeated_as_they_are() -> None:
    x = torch.tensor([[1, 2], [3, 4]])
    assert resize(x, 5).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4], [1, 2]]
    assert resize(x, 1).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("dtypes", "decision", "snr", "error"),
    [
        ([torch.float32], "condensed", None, 1e-4),
        ([torch.bfloat16], "dense", None, 1e-4),  # a layer that is not condensed is not rounded
        ([torch.bfloat16], "shrunk", None, 1e-4),
        ([torch.bfloat16], "condensed", None, 2**-7),
        ([torch.float32, torch.int8], "condensed", 20.0, 1e-4),
    ],
)
def test_condensed_layers_say_how_far_off_outputs_may_be(
    dtypes: list[torch.dtype], decision: Any, snr: float | None, error: float
) -> None:
    program = program_of(torch.ones(2), batched=(True,))
    weight: Any = None
    program.layers = [MatchedLayer(weight=weight, decision=decision, value_dtype=dtype) for dtype in dtypes]
    assert program.limit.snr == snr
    assert program.limit.error == pytest.approx(error)


def linear_program() -> tuple[Program, fx.Node]:
    """A masked linear layer, twice under two names, with its use."""
    model = mask_by_hand(nn.Linear(4, 3), 0.5)
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    node = graph.call_function(aten.linear.default, (x, weight))
    node.meta["val"] = torch.ones(2, 3)
    output = graph.output(node)
    output.meta["said"] = "last"
    module = fx.GraphModule(model, graph)
    sizes = Sizes.of_batch((True,))
    program = Program(module=module, model=model, args=(torch.ones(2, 4),), kwargs={}, sizes=sizes, how="by hand")
    enter_masks(program)
    (handle,) = sparse_weights(model)
    use = Use(node=node, target="weight", weight=handle.weight, mask=handle.mask)
    program.layers = [MatchedLayer(weight=handle, uses=[use], others=["aten.t"])]
    return program, node


def test_masks_are_entered_by_parameter_and_what_is_entered_stays() -> None:
    program, _ = linear_program()
    (handle,) = sparse_weights(program.model)
    assert program.masked["weight"].mask is handle.mask
    module: Any = program.module
    module.tied = module.weight
    module.bare = nn.Parameter(module.weight.detach().clone())
    kept = MaskedTensor(fqn="mine", mask=handle.mask)
    program.masked = {"weight": kept}
    with program.module.graph.inserting_before(next(iter(program.module.graph.nodes))):
        for name in ("tied", "bare"):
            program.module.graph.get_attr(name)
    enter_masks(program)
    assert program.masked["weight"] is kept
    assert program.masked["tied"].fqn == "weight"
    assert "bare" not in program.masked  # equal, but not the parameter


def test_what_is_done_to_a_copy_leaves_the_original() -> None:
    program, node = linear_program()
    copied = program.copy()
    (use,) = copied.layers[0].uses
    assert use.node is not node
    assert use.node.graph is copied.module.graph
    assert use.node.meta["val"] is node.meta["val"]
    assert [one.name for one in copied.module.graph.nodes] == [one.name for one in program.module.graph.nodes]
    assert next(iter(reversed(copied.module.graph.nodes))).meta["said"] == "last"
    copied.layers[0].others.append("more")
    copied.layers[0].uses.clear()
    copied.masked.clear()
    copied.folded["weight"] = "why"
    use.node.replace_input_with(use.x, use.node.all_input_nodes[1])
    assert program.layers[0].others == ["aten.t"]
    assert program.layers[0].uses[0].node is node
    assert (list(program.masked), program.folded, node.all_input_nodes[0].name) == (["weight"], {}, "x")


def test_the_graph_of_a_branch_is_copied_too() -> None:
    branch = fx.GraphModule(nn.Module(), fx.Graph())
    branch.graph.output(branch.graph.placeholder("y"))
    program, _ = linear_program()
    program.module.add_submodule("branches.first", branch)
    with program.module.graph.inserting_before(next(iter(program.module.graph.nodes))):
        program.module.graph.get_attr("branches.first")
    copied = program.copy().module.get_submodule("branches.first")
    assert isinstance(copied, fx.GraphModule)
    assert copied.graph is not branch.graph
    assert program.module.get_submodule("branches.first") is branch


def test_new_buffers_take_no_name_that_is_taken() -> None:
    program, _ = linear_program()
    module = program.module
    values = torch.arange(6.0).view(2, 3)
    with module.graph.inserting_before(next(iter(module.graph.nodes))):
        one = new_buffer(module, "weight", values.t())
        two = new_buffer(module, "weight", values)
        deep = new_buffer(module, "a.b.c", values)
        same = new_buffer(module, "weight", values, same=lambda held, new: torch.equal(held, new))
        again = new_buffer(module, "a.b.c", values + 1, same=lambda held, new: torch.equal(held, new))
    assert [node.target for node in (one, two, deep, same, again)] == [
        "weight_",
        "weight__",
        "a.b.c",
        "weight__",
        "a.b.c_",
    ]
    assert tensor_at(module, "weight_").is_contiguous()
    assert torch.equal(tensor_at(module, "weight_"), values.t())
    assert torch.equal(tensor_at(module, "a.b.c_"), values + 1)
    assert one.meta["val"].shape == (3, 2)


def test_arguments_by_position_by_name_and_by_default() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    node = graph.call_function(aten.conv1d.default, (x, weight, None, [2]), {"groups": 2})
    assert arguments(node) == {
        "input": x, "weight": weight, "bias": None, "stride": [2], "padding": [0], "dilation": [1], "groups": 2,
    }  # fmt: skip
    assert operands(node) == (x, weight, None)
    linear = graph.call_function(aten.linear.default, (x,), {"bias": x, "weight": weight})
    assert operands(linear) == (x, weight, x)
    values: Tensor = torch.ones(1)
    use = Use(node=linear, target="weight", weight=values, mask=values.bool())
    assert (use.x, use.bias) == (x, x)
