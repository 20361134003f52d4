"""``condense_onnx`` inside ``If``, ``Loop`` and ``Scan``, and in functions of a model's own."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from condensing_support import Array, assert_same, pruned, random, write
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.errors import ExportError, FormatError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.onnx_export.file import all_graphs, all_nodes, inspect_file
from srigl_fx.runtime.ort.abi import DOMAIN

FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64


def value(name: str, shape: list[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def condensed(path: Path) -> list[str]:
    return [node.op_type for node in all_nodes(onnx.load(path).graph) if node.domain == DOMAIN]


def stored(path: Path) -> set[str]:
    return {one.name for graph in all_graphs(onnx.load(path).graph) for one in graph.initializer}


def square(seed: int = 0) -> Array:
    return np.ascontiguousarray(pruned(48, 48, seed=seed).T)


def branches(path: Path) -> Path:
    """Two branches: a weight of the graph around them, which both read, and one of each."""
    then = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "shared"], ["t1"]),
            helper.make_node("Add", ["t1", "x"], ["t2"]),
            helper.make_node("Relu", ["t2"], ["t3"]),
            helper.make_node("MatMul", ["t3", "own_then"], ["then_y"]),
        ],
        "then",
        [],
        [value("then_y", None)],
        [numpy_helper.from_array(square(1), "own_then")],
    )
    constant = helper.make_node("Constant", [], ["own_else"], value=numpy_helper.from_array(square(2), "c"))
    otherwise = helper.make_graph(
        [
            constant,
            helper.make_node("MatMul", ["x", "shared"], ["e1"]),
            helper.make_node("Gemm", ["e1", "own_else"], ["else_y"]),
        ],
        "else",
        [],
        [value("else_y", None)],
    )
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    arrays = {"shared": square(), "zero": np.zeros((), np.float32)}
    return write(path, nodes, arrays, ["n", 48], ["n", 48])


def test_branches_with_weights_of_their_own_and_from_around_them(tmp_path: Path) -> None:
    source = branches(tmp_path / "a.onnx")
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert sorted(condensed(report.path)) == [*["CondensedLinear"] * 3, "CondensedLinearAddRelu"]
    assert sorted(row.name for row in report.rows) == ["own_else", "own_then", "shared", "shared"]
    assert {"shared", "own_then", "own_else"}.isdisjoint(stored(report.path))
    assert "shared_values" not in {one.name for one in onnx.load(report.path).graph.initializer}
    assert len(inspect_file(report.path).nodes) == 4
    onnx.checker.check_model(onnx.load(report.path))
    x = np.abs(random(3, 48))
    assert_same(source, report.path, x, -x)


def test_sums_that_a_branch_reads_stay(tmp_path: Path) -> None:
    steps = np.rint(50 * square()).clip(-127, 127).astype(np.int8)
    cast = helper.make_node("Cast", ["sums"], ["p"], to=FLOAT)
    then = helper.make_graph([cast], "then", [], [value("p", None)])
    otherwise = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "else", [], [value("e", None)])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    arrays: dict[str, Array] = {"w": steps, "yes": np.array(True)}
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 48], ["n", 48])
    with pytest.raises(ExportError, match="w: its sums are read inside a branch or a loop"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)


def test_the_body_of_a_loop(tmp_path: Path) -> None:
    """Its state, its weight from around it, and a name that the graph around it has, too."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["product"]),
            helper.make_node("Tanh", ["product"], ["w_values"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [value("i", [], INT64), value("go", [], BOOL), value("state", ["n", 48])],
        [value("on", [], BOOL), value("w_values", ["n", 48])],
    )
    nodes = [helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)]
    arrays = {"w": square(), "times": np.array(3)}
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 48], ["n", 48])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed(report.path) == ["CondensedLinearTanh"]
    assert_same(source, report.path, random(3, 48))


def test_bytes_inside_a_branch_that_are_rounded_around_it(tmp_path: Path) -> None:
    """int8 becomes uint8 where it is rounded."""
    steps = np.rint(50 * square()).clip(-127, 127).astype(np.int8)
    arrays: dict[str, Array] = {"w": steps, "s": np.array(0.02, np.float32), "z": np.array(-5, np.int8)}
    inner = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"]),
        helper.make_node("MatMul", ["d", "v"], ["p"]),
    ]
    then = helper.make_graph(inner, "then", [], [value("p", None)])
    otherwise = helper.make_graph([helper.make_node("Identity", ["x"], ["e"])], "else", [], [value("e", None)])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("If", ["yes"], ["y"], then_branch=then, else_branch=otherwise),
    ]
    arrays["yes"] = np.array(True)
    source = write(tmp_path / "a.onnx", nodes, arrays, ["n", 48], ["n", 48])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed(report.path) == ["CondensedLinearInt8"]
    assert [node.op_type for node in onnx.load(report.path).graph.node] == ["QuantizeLinear", "If"]
    assert_same(source, report.path, random(3, 48))


@pytest.mark.parametrize("weight_inside", [False, True])
@pytest.mark.parametrize(("version", "domain"), [(18, ""), (13, "ai.onnx")])
def test_functions_of_the_model(tmp_path: Path, weight_inside: bool, version: int, domain: str) -> None:
    """Called twice, one inside another; weights are arguments, or constants in it."""
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(square(), "c"))
    steps = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Relu", ["p"], ["y"])]
    opset = [helper.make_opsetid("", version), helper.make_opsetid("own", 1)]
    arguments = ["x"] if weight_inside else ["x", "w"]
    layer = helper.make_function("own", "Layer", arguments, ["y"], [constant] * weight_inside + steps, opset)
    calls = [
        helper.make_node("Layer", ["x", *arguments[1:]], ["h"], domain="own"),
        helper.make_node("Layer", ["h", *arguments[1:]], ["y"], domain="own"),
    ]
    both = helper.make_function("own", "Both", arguments, ["y"], calls, opset)
    graph = helper.make_graph(
        [helper.make_node("Both", ["x", *(["weight"] if not weight_inside else [])], ["y"], domain="own")],
        "g",
        [value("x", ["n", 48])],
        [value("y", ["n", 48])],
        [] if weight_inside else [numpy_helper.from_array(square(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=opset, functions=[layer, both], ir_version=9)
    model.opset_import[0].domain = domain
    onnx.save(model, tmp_path / "a.onnx")
    report = condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", min_speedup=0)
    assert condensed(report.path) == ["CondensedLinearRelu"] * 2
    assert {one.domain for one in onnx.load(report.path).functions} == {DOMAIN}
    assert_same(tmp_path / "a.onnx", report.path, random(3, 48))


@pytest.mark.parametrize("depth", [40, 1])
def test_functions_that_call_each_other_without_end_are_refused(tmp_path: Path, depth: int) -> None:
    """Twice each, which would be 2**40 nodes; or one itself."""
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = []
    for i in range(depth):
        called = f"F{(i + 1) % depth}" if depth == 1 or i < depth - 1 else "Relu"
        domain = "own" if called != "Relu" else ""
        calls = [
            helper.make_node(called, ["x"], ["h"], domain=domain),
            helper.make_node(called, ["h"], ["y"], domain=domain),
        ]
        functions.append(helper.make_function("own", f"F{i}", ["x"], ["y"], calls, opset))
    node = helper.make_node("F0", ["x"], ["y"], domain="own")
    graph = helper.make_graph([node], "g", [value("x", ["n", 8])], [value("y", ["n", 8])])
    onnx.save(helper.make_model(graph, opset_imports=opset, functions=functions, ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(FormatError, match="its functions call each other"):
        condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_what_is_condensed_already_keeps_its_fallback(tmp_path: Path) -> None:
    source = branches(tmp_path / "a.onnx")
    condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    with pytest.raises(ExportError, match=r"nothing more in .*: 4 of its nodes are condensed already"):
        condense_onnx(tmp_path / "b.onnx", tmp_path / "c.onnx", min_speedup=0)
    assert ort.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"]).get_inputs()
