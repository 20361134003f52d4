"""Which nodes a condensed operator can replace, on graphs that are written by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowering_support import mask_by_hand, randomise
from torch import Tensor, fx, nn

from srigl_fx.errors import LoweringError
from srigl_fx.masks.records import Kind, Structure, set_records, sparse_weights
from srigl_fx.passes.base import run
from srigl_fx.passes.condense import Condense
from srigl_fx.passes.match import MatchWeights
from srigl_fx.passes.program import Geometry, MatchedLayer, Program, Use, enter_masks
from srigl_fx.passes.select import Select
from srigl_fx.passes.sizes import Sizes

aten = torch.ops.aten
Make = Callable[[fx.Graph, fx.Node, fx.Node], Any]


def program_of(model: nn.Module, shape: tuple[int, ...], make: Make, dtype: torch.dtype = torch.float32) -> Program:
    """A graph of an input and the weight of a masked layer, which ``make`` makes the output of."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(shape, dtype=dtype)
    weight = graph.get_attr("weight")
    weight.meta["val"] = model.weight
    graph.output(make(graph, x, weight))
    program = Program(
        module=fx.GraphModule(model, graph),
        model=model,
        args=(x.meta["val"],),
        kwargs={},
        sizes=Sizes.of_batch((False,)),
        how="by hand",
    )
    enter_masks(program)
    return program


def matched(program: Program) -> MatchedLayer:
    """The only layer, after the pass."""
    (layer,) = run((MatchWeights(),), program).subject.layers
    return layer


def linear(structure: Structure = "constant_fan_in") -> Any:
    return mask_by_hand(randomise(nn.Linear(6, 4)), 0.5, structure=structure)


def conv(module: nn.Module) -> Any:
    return mask_by_hand(randomise(module), 0.5)


def reading(*operators: Any) -> Make:
    """Each operator on the input and the weight."""
    return lambda g, x, w: tuple(g.call_function(op, (x, w)) for op in operators)


def test_rule_1_a_linear_layer_is_a_use_of_the_weight_as_it_is() -> None:
    model = linear()
    layer = matched(program_of(model, (2, 3, 6), reading(aten.linear.default)))
    (use,) = layer.uses
    assert (use.target, use.geometry, use.bias, layer.others, layer.reason) == ("weight", None, None, [], "")
    assert (use.x.name, use.node.target) == ("x", aten.linear.default)
    assert torch.equal(use.weight, model.weight)
    assert torch.equal(use.mask, model.weight_mask)


# fmt: off
GEOMETRIES: list[tuple[nn.Module, Any, tuple[Any, ...], dict[str, Any]]] = [
    (nn.Conv2d(4, 6, 3), aten.conv2d.default, (None, [2, 1], [1, 0], [1, 2], 1),
     {"kernel": (3, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 1}),
    (nn.Conv2d(4, 6, 3), aten.conv2d.default, (None, [2], [1], [1]),  # one number for all axes
     {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 1}),
    (nn.Conv2d(4, 6, 3), aten.conv2d.default, (),
     {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}),
    (nn.Conv2d(4, 6, (2, 5), groups=2), aten.conv2d.padding, (None, [1], "same", [3, 1], 2),
     {"kernel": (2, 5), "stride": (1, 1), "padding": (1, 2), "dilation": (3, 1), "groups": 2, "extra": (1, 0)}),
    (nn.Conv1d(4, 6, 2), aten.conv1d.padding, (None, [3], "valid"),
     {"kernel": (2,), "stride": (3,), "padding": (0,), "dilation": (1,), "groups": 1}),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), aten.conv_transpose2d.input, (None, [2], [1], [1, 0], 2, [3]),
     {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (3, 3), "groups": 2, "transposed": True,
      "output_padding": (1, 0)}),
    (nn.Conv1d(4, 6, 2), aten.convolution.default, (None, [3], [1], [2], False, [0], 1),
     {"kernel": (2,), "stride": (3,), "padding": (1,), "dilation": (2,), "groups": 1}),
    (nn.ConvTranspose1d(4, 6, 2), aten.convolution.default, (None, [3], [1], [2], True, [1], 1),
     {"kernel": (2,), "stride": (3,), "padding": (1,), "dilation": (2,), "groups": 1, "transposed": True,
      "output_padding": (1,)}),
]
# fmt: on
SETTINGS = ["all axes", "one number", "defaults", "same", "valid", "transposed", "any", "any, transposed"]


@pytest.mark.parametrize(("module", "operator", "settings", "expected"), GEOMETRIES, ids=SETTINGS)
def test_rule_2_the_settings_of_a_convolution(
    module: nn.Module, operator: Any, settings: tuple[Any, ...], expected: dict[str, Any]
) -> None:
    model = conv(module)
    rank = model.weight.dim()
    expected = {"extra": (0,) * (rank - 2), **expected}
    layer = matched(
        program_of(model, (2, 4, 9, 9)[:rank], lambda g, x, w: g.call_function(operator, (x, w, *settings)))
    )
    (use,) = layer.uses
    assert use.geometry == Geometry(**expected)
    # The matrix view is that of the record, which knows the module and not the operator.
    (handle,) = sparse_weights(model)
    site = handle.record.site
    if expected["groups"] == model.groups:
        assert torch.equal(use.weight, site.to_matrix(handle.weight.detach()))
        assert torch.equal(use.mask, site.to_matrix(handle.mask))


@pytest.mark.parametrize(
    ("shape", "dtype", "make", "reason", "others"),
    [
        ((2, 6), torch.float64, reading(aten.linear.default), "its input is not float32", ["aten.linear"]),
        (
            (2, 6),
            torch.float32,
            reading(aten.mul.Tensor),
            "read by aten.mul.Tensor, which has no condensed form",
            ["aten.mul.Tensor"],
        ),
        (
            (2, 6),
            torch.float32,
            lambda g, x, w: g.call_function(aten.linear.default, (w, x)),
            "also the data of the operator that reads it",
            ["aten.linear"],
        ),
        (
            (6,),
            torch.float32,
            lambda g, x, w: g.call_function(aten.linear.default, (w, w)),
            "also the data of the operator that reads it",
            ["aten.linear"],
        ),
        ((2, 6), torch.float32, lambda g, x, w: x, "read by nothing the captured graph computes", []),
    ],
    ids=["rule 3: type", "rule 4: operator", "rule 3: as data", "rule 3: by itself", "rule 5: not read"],
)
def test_what_reads_the_dense_weight(
    shape: tuple[int, ...], dtype: torch.dtype, make: Make, reason: str, others: list[str]
) -> None:
    program = program_of(linear(), shape, make, dtype)
    result = run((MatchWeights(),), program)
    (layer,) = result.subject.layers
    assert (layer.uses, layer.reason, layer.others) == ([], reason, others)
    assert [(note.where, note.reason) for note in result.notes] == [("weight", reason)]


def test_rule_2_a_single_sample_has_no_window() -> None:
    layer = matched(program_of(conv(nn.Conv1d(4, 6, 3)), (4, 9), reading(aten.conv1d.default)))
    assert (layer.uses, layer.reason) == ([], "its input has no batch dimension")


def test_rule_2_settings_that_are_computed() -> None:
    def make(g: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        size = g.call_function(aten.sym_size.int, (x, 0))
        return g.call_function(aten.conv1d.default, (x, w, None, [size]))

    layer = matched(program_of(conv(nn.Conv1d(4, 6, 3)), (2, 4, 9), make))
    assert (layer.uses, layer.reason) == ([], "its settings are computed from the input")


def test_rule_4_one_other_reader_does_not_hinder_the_rest() -> None:
    layer = matched(program_of(linear(), (4, 6), reading(aten.linear.default, aten.mul.Tensor, aten.linear.default)))
    assert (len(layer.uses), layer.others, layer.reason) == (2, ["aten.mul.Tensor"], "")


def test_rule_4_the_parts_of_fused_operators_are_told_as_such() -> None:
    kinds: dict[Kind, str] = {"rnn_gates": "recurrent gates are part of one fused", "stack": "a stack of experts"}
    for kind, words in kinds.items():
        model = linear()
        (handle,) = sparse_weights(model)
        set_records(model, {"weight": replace(handle.record, site=replace(handle.record.site, kind=kind))})
        reason = matched(program_of(model, (4, 6), reading(aten.mul.Tensor))).reason
        assert reason.startswith(words)
        assert "(aten.mul.Tensor)" in reason


def test_rule_5_an_unstructured_weight_is_a_use_like_any_other() -> None:
    model: Any = mask_by_hand(randomise(nn.Linear(32, 8)), 0.2, structure="unstructured")
    assert len({*model.weight_mask.sum(1).tolist()}) > 1
    layer = matched(program_of(model, (2, 32), reading(aten.linear.default)))
    (use,) = layer.uses
    assert (use.target, layer.others, layer.reason) == ("weight", [], "")


@pytest.mark.parametrize(("counts", "fits"), [([3, 1, 1, 1], True), ([4, 1, 1, 1], True), ([6, 5, 4, 4], False)])
def test_rule_5_rows_that_differ_too_much_have_no_use_but_an_other_reader(counts: list[int], fits: bool) -> None:
    """The dense weight takes 4 * 6 * 4 bytes; the padded one 4 * longest * (4 + 2), or less in groups of rows."""
    model = linear("unstructured")
    model.weight_mask[:] = torch.arange(6) < torch.tensor(counts)[:, None]
    layer = matched(program_of(model, (2, 6), reading(aten.linear.default)))
    if fits:
        assert (len(layer.uses), layer.others, layer.reason) == (1, [], "")
    else:
        assert (layer.uses, layer.others) == ([], ["aten.linear"])
        assert layer.reason == (
            "its rows keep 4 to 6 of 6 weights: padded to the longest of each of 2 groups, they take as many bytes as "
            "the dense weight"
        )


@pytest.mark.parametrize("folded", [{}, {"weight": "it only meets constants"}], ids=["gone", "folded"])
def test_rule_5_a_weight_that_the_graph_does_not_know(folded: dict[str, str]) -> None:
    program = program_of(linear(), (2, 6), reading(aten.linear.default))
    program.masked, program.folded = {}, folded
    assert matched(program).reason == folded.get("weight", "not used by the captured graph")


def test_a_weight_that_is_read_under_two_names_has_both_uses() -> None:
    model = linear()
    program = program_of(model, (2, 6), reading(aten.linear.default))
    graph = program.module.graph
    program.module.register_buffer("turned", model.weight.detach().clone())
    program.masked["turned"] = program.masked["weight"]
    out: Any = next(iter(graph.find_nodes(op="output")))
    with graph.inserting_before(out):
        turned = graph.get_attr("turned")
        (x,) = graph.find_nodes(op="placeholder")
        more = graph.call_function(aten.linear.default, (x, turned))
    out.args = ((*out.args[0], more),)
    assert [use.target for use in matched(program).uses] == ["weight", "turned"]


@pytest.mark.parametrize(
    ("value", "dtype", "words"),
    [
        (7e4, torch.float16, "holds 70000"),
        (-7e4, torch.float16, "holds -70000"),
        (6e4, torch.float16, ""),
        (torch.inf, torch.float16, ""),  # as the user trained it
        (7e4, torch.bfloat16, ""),
        (7e4, torch.int8, ""),
    ],
)
def test_rule_6_what_a_dtype_cannot_hold(value: float, dtype: torch.dtype, words: str) -> None:
    model = linear()
    with torch.no_grad():
        model.weight[0, model.weight_mask[0].nonzero()[0]] = value
    program = program_of(model, (2, 6), reading(aten.linear.default))
    program.value_dtypes = {"weight": dtype}
    if words:
        with pytest.raises(LoweringError, match=words):
            run((MatchWeights(),), program)
    else:
        assert matched(program).value_dtype is dtype


def test_rule_6_does_not_ask_of_what_is_pruned() -> None:
    model = linear()
    (row, column) = (~model.weight_mask).nonzero()[0].tolist()
    with torch.no_grad():
        model.weight[row, column] = 7e4
    program = program_of(model, (2, 6), reading(aten.linear.default))
    program.value_dtype = torch.float16
    assert matched(program).value_dtype is torch.float16


def test_layers_that_are_rewritten_already_are_refused() -> None:
    program = program_of(linear(), (2, 6), reading(aten.linear.default))
    with pytest.raises(LoweringError, match=r"and weight are decided already: give passes one MatchWeights, in front"):
        run((MatchWeights(), Select(), Condense(), MatchWeights()), program)
    layer = matched(run((MatchWeights(),), program).subject)  # nothing is rewritten by then
    assert len(layer.uses) == 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_view_and_back(groups: int, transposed: bool) -> None:
    one = (1,)
    geometry = Geometry(kernel=(2, 3), stride=one, padding=(0,), dilation=one, groups=groups, transposed=transposed)
    weight: Tensor = torch.randn(4, 6, 2, 3)
    matrix = geometry.to_matrix(weight)
    assert matrix.shape == ((6 * groups, 24 // groups) if transposed else (4, 36))
    if groups == 1:
        assert torch.equal(geometry.from_matrix(matrix), weight)
        assert geometry.from_matrix(matrix).is_contiguous()


def test_a_use_tells_its_operands_apart() -> None:
    graph = fx.Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    node = graph.call_function(aten.linear.default, (x, weight), {"bias": bias})
    use = Use(node=node, target="weight", weight=torch.ones(1, 1), mask=torch.ones(1, 1, dtype=torch.bool))
    assert (use.x, use.bias) == (x, bias)
