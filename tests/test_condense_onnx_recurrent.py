"""``condense_onnx`` on LSTM and GRU, and on stacks of experts."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from condensing_support import Array, pruned, random, write
from onnx import TensorProto, helper, numpy_helper

from srigl_fx.errors import ExportError
from srigl_fx.onnx_condensing.pipeline import condense_onnx
from srigl_fx.onnx_export.file import all_nodes
from srigl_fx.runtime import load
from srigl_fx.runtime.ort.abi import DOMAIN

INPUTS, HIDDEN = 20, 24


def recurrent(
    path: Path,
    operator: str,
    *,
    directions: int = 1,
    lengths: bool = False,
    initial: bool = False,
    outputs: int = 3,
    density: tuple[float, float] = (0.2, 0.2),
    bias: bool = True,
    sizes: tuple[int | str, int | str] = ("t", "n"),
    **attributes: Any,
) -> Path:
    """A file of one LSTM or GRU whose inputs and outputs are those of the graph."""
    gates = 4 if operator == "LSTM" else 3
    arrays = {
        "w": np.stack([pruned(gates * HIDDEN, INPUTS, density=density[0], seed=i) for i in range(directions)]),
        "r": np.stack([pruned(gates * HIDDEN, HIDDEN, density=density[1], seed=9 + i) for i in range(directions)]),
    }
    if bias:
        arrays["b"] = random(directions, 2 * gates * HIDDEN)
    states = ["h0", "c0"] if operator == "LSTM" else ["h0"]
    shape = [directions, sizes[1], HIDDEN]
    more = [helper.make_tensor_value_info("lengths", TensorProto.INT32, [sizes[1]])] if lengths else []
    more += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in states] if initial else []
    inputs = ["x", "w", "r", "b" if bias else "", "lengths" if lengths else "", *(states if initial else [])]
    named = ["y", "h", "c"][: min(outputs, 1 + len(states))]
    nodes = [helper.make_node(operator, inputs, named, name="cell", hidden_size=HIDDEN, **attributes)]
    path = write(path, nodes, arrays, [*sizes, INPUTS], [sizes[0], directions, sizes[1], HIDDEN], inputs=more)
    model = onnx.load(path)
    model.graph.output.extend(helper.make_tensor_value_info(one, TensorProto.FLOAT, shape) for one in named[1:])
    onnx.save(model, path)
    return path


def condensed(path: Path) -> list[str]:
    return [node.op_type for node in all_nodes(onnx.load(path).graph) if node.domain == DOMAIN]


def assert_same(source: Path, result: Path, feeds: dict[str, Array]) -> None:
    """All outputs, with the library and on a stock ONNX Runtime."""
    reference = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    expected = reference.run(None, feeds)
    for session in (load(result), ort.InferenceSession(str(result), providers=["CPUExecutionProvider"])):
        assert [one.name for one in session.get_outputs()] == [one.name for one in reference.get_outputs()]
        for got, right in zip(session.run(None, feeds), expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-5)


def feeds_for(path: Path, *, steps: int, batch: int) -> dict[str, Array]:
    feeds: dict[str, Array] = {}
    for one in ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs():
        if one.name == "lengths":
            feeds[one.name] = (np.arange(batch) * 3 % (steps + 1)).astype(np.int32)  # none of it, too
        else:
            shape = [{"t": steps, "n": batch}.get(size, size) for size in one.shape]
            feeds[one.name] = np.asarray(np.random.default_rng(3).standard_normal(shape), np.float32)
    return feeds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "settings"),
    [
        ("LSTM", {}),
        ("LSTM", {"direction": "reverse", "initial": True}),
        ("LSTM", {"direction": "bidirectional", "directions": 2, "initial": True, "lengths": True}),
        ("LSTM", {"direction": "reverse", "lengths": True, "bias": False}),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"], "outputs": 1}),
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 0, "initial": True, "direction": "reverse"}),
        ("GRU", {"linear_before_reset": 1, "direction": "bidirectional", "directions": 2, "lengths": True}),
        ("GRU", {"linear_before_reset": 0, "lengths": True, "initial": True, "sizes": ("t", 4)}),
        ("GRU", {"linear_before_reset": 1, "bias": False, "outputs": 1, "activations": ["Sigmoid", "Relu"]}),
    ],
)
def test_a_recurrent_layer_becomes_products_around_a_scan(
    tmp_path: Path, operator: str, settings: dict[str, Any]
) -> None:
    source = recurrent(tmp_path / "a.onnx", operator, **settings)
    feeds = feeds_for(source, steps=5, batch=4)
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0, example_inputs=feeds)
    directions = settings.get("directions", 1)
    names = condensed(report.path)
    assert len(names) == 4 * directions
    assert sum(name.endswith("AddSigmoid") for name in names) == directions  # gates with their activation
    operators = [node.op_type for node in onnx.load(report.path).graph.node]
    assert operator not in operators
    assert operators.count("Scan") == directions
    assert [(row.name, row.operator, row.form) for row in report.rows] == [
        (name, operator, "condensed, its steps in a Scan") for name in ("w", "r")
    ]
    assert report.rows[0].shape == (directions, (4 if operator == "LSTM" else 3) * HIDDEN, INPUTS)
    assert {"w", "r"}.isdisjoint(one.name for one in onnx.load(report.path).graph.initializer)
    onnx.checker.check_model(onnx.load(report.path))
    for steps in (1, 7):
        assert_same(source, report.path, feeds_for(source, steps=steps, batch=4))


def rearranged(path: Path) -> Path:
    """The same file as PyTorch's exporter writes it: what the operator takes is cut out of weights and joined again."""
    model = onnx.load(path)
    (cell,) = model.graph.node
    arrays = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    made: list[onnx.NodeProto] = []
    del model.graph.initializer[:]
    numbers = {"axes": [0], "first": [0], "half": [HIDDEN], "end": [2**62]}
    for place in (1, 2, 3):
        name, directions = cell.input[place], []
        for i, one in enumerate(arrays[name]):
            part = f"{name}{i}"
            # Its second part comes first.
            model.graph.initializer.append(
                numpy_helper.from_array(np.concatenate([one[-HIDDEN:], one[:-HIDDEN]]), part)
            )
            made += [
                helper.make_node("Slice", [part, "half", "end", "axes"], [f"{part}_a"]),
                helper.make_node("Slice", [part, "first", "half", "axes"], [f"{part}_b"]),
                helper.make_node("Concat", [f"{part}_a", f"{part}_b"], [f"{part}_c"], axis=0),
                helper.make_node("Unsqueeze", [f"{part}_c", "axes"], [f"{part}_d"]),
            ]
            directions.append(f"{part}_d")
        made.append(helper.make_node("Concat", directions, [f"{name}_whole"], axis=0))
        cell.input[place] = f"{name}_whole"
    model.graph.initializer.extend(numpy_helper.from_array(np.array(held), one) for one, held in numbers.items())
    made.append(cell)
    model.graph.ClearField("node")
    model.graph.node.extend(made)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operator", "settings"),
    [("LSTM", {"direction": "bidirectional", "directions": 2}), ("GRU", {"linear_before_reset": 1})],
)
def test_gates_that_were_put_in_another_order(tmp_path: Path, operator: str, settings: dict[str, Any]) -> None:
    """Sizes of one name are equal in what both files are compared on, those of initial states too."""
    source = rearranged(recurrent(tmp_path / "a.onnx", operator, initial=True, **settings))
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert [(row.name, row.form) for row in report.rows] == [
        (name, "condensed, its steps in a Scan") for name in ("w0", "r0")
    ]
    assert report.library_error is not None
    assert {node.op_type for node in onnx.load(report.path).graph.node}.isdisjoint({"Slice", operator})
    assert_same(source, report.path, feeds_for(source, steps=3, batch=2))


def test_one_of_the_two_weights_may_be_dense(tmp_path: Path) -> None:
    source = recurrent(tmp_path / "a.onnx", "GRU", density=(0.2, 0.9), linear_before_reset=1, sizes=(3, 2))
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert condensed(report.path) == ["CondensedLinear", "CondensedLinear"]
    assert [(row.name, row.condensed) for row in report.rows] == [("w", True), ("r", False)]
    assert "min_sparsity" in report.rows[1].reason
    assert_same(source, report.path, feeds_for(source, steps=3, batch=2))


@pytest.mark.parametrize(
    ("operator", "settings", "reason"),
    [
        ("LSTM", {"clip": 1.0}, "it has clip or input_forget"),
        ("LSTM", {"input_forget": 1}, "it has clip or input_forget"),
        ("GRU", {"activations": ["HardSigmoid", "Tanh"]}, "its activations are HardSigmoid, Tanh, and"),
        ("GRU", {"activations": ["Sigmoid", "Tanh"], "activation_alpha": [0.5]}, "its activations have parameters"),
        ("LSTM", {"direction": "bidirectional"}, "are not those of the direction 'bidirectional'"),
        ("LSTM", {"direction": "sideways"}, "are not those of the direction 'sideways'"),
        ("GRU", {"layout": 1}, "its layout is 1, which ONNX Runtime does not compute"),
    ],
)
def test_a_recurrent_layer_that_is_refused_says_why(
    tmp_path: Path, operator: str, settings: dict[str, Any], reason: str
) -> None:
    source = recurrent(tmp_path / "a.onnx", operator)
    model = onnx.load(source)
    model.graph.node[0].attribute.extend(helper.make_attribute(*one) for one in settings.items())
    onnx.save(model, source)
    with pytest.raises(ExportError, match=f"nothing in .* can be condensed: w: .*{reason}.*; r: .*{reason}"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)


def test_peepholes_are_refused_unless_they_are_zero(tmp_path: Path) -> None:
    source = recurrent(tmp_path / "a.onnx", "LSTM", sizes=(2, 3))
    model = onnx.load(source)
    model.graph.node[0].input.extend(["", "", "p"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 3 * HIDDEN), np.float32), "p"))
    onnx.save(model, source)
    assert condense_onnx(source, tmp_path / "b.onnx", min_speedup=0).condensed_layers == 2
    model.graph.initializer[-1].CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 3 * HIDDEN), np.float32), "p"))
    onnx.save(model, source)
    with pytest.raises(ExportError, match="it has peepholes"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "gains"), [(32, False), (1024, True)])
def test_the_cost_model_weighs_a_scan_against_the_operator(tmp_path: Path, hidden: int, gains: bool) -> None:
    arrays = {"w": pruned(3 * hidden, 32)[None], "r": pruned(3 * hidden, hidden)[None]}
    node = helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=hidden, linear_before_reset=1)
    source = write(tmp_path / "a.onnx", [node], arrays, ["t", "n", 32], ["t", 1, "n", hidden])
    if gains:
        assert condense_onnx(source, tmp_path / "b.onnx", verify=False).condensed_layers == 2
    else:
        with pytest.raises(ExportError, match=r"estimated: condensed is 0\.\d+ times as fast as the GRU at batch 1"):
            condense_onnx(source, tmp_path / "b.onnx", verify=False)


@pytest.mark.parametrize("leading", [(4,), (), (1,)])
def test_a_stack_of_experts(tmp_path: Path, leading: tuple[int, ...]) -> None:
    """Each with samples of its own, or all with the same."""
    stack = np.stack([pruned(40, 32, density=0.2, seed=i).T for i in range(4)])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    arrays = {"w": np.ascontiguousarray(stack), "b": random(4, 1, 40)}
    source = write(tmp_path / "a.onnx", nodes, arrays, [*leading, "n", 32], [4, "n", 40])
    report = condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    assert len(condensed(report.path)) == (4 if leading == (4,) else 1)
    form = "4 experts" if leading == (4,) else "all experts at once"
    assert [(row.name, row.shape, row.form) for row in report.rows] == [("w", (4, 40, 32), f"condensed, {form}")]
    for tokens in (1, 9):
        assert_same(source, report.path, {"x": random(*leading, tokens, 32)})


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32])
def test_a_stack_of_another_type_says_why_it_stays(tmp_path: Path, dtype: Any) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stack = np.stack([pruned(40, 32, seed=i).T for i in range(4)])
    x, y = (helper.make_tensor_value_info(name, kind, [4, "n", size]) for name, size in (("x", 32), ("y", 40)))
    weight = numpy_helper.from_array((4 * stack).astype(dtype), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"w: its input is \w+, not float32: export the model in float32"):
        condense_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx", min_speedup=0, verify=False)


def test_experts_of_unknown_samples_are_refused_and_small_ones_do_not_gain(tmp_path: Path) -> None:
    arrays = {"w": np.stack([pruned(40, 32, seed=i).T for i in range(4)])}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    source = write(tmp_path / "a.onnx", nodes, arrays, ["e", "n", 32], [4, "n", 40])
    with pytest.raises(ExportError, match="w: it is not known whether its experts have the same input"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    source = write(tmp_path / "a.onnx", nodes, arrays, [2, 4, "n", 32], [2, 4, "n", 40])
    with pytest.raises(ExportError, match="w: its input is not known to have two or three axes"):
        condense_onnx(source, tmp_path / "b.onnx", min_speedup=0)
    source = write(tmp_path / "a.onnx", nodes, arrays, [4, 1, 32], [4, 1, 40])
    with pytest.raises(ExportError, match=r"estimated: condensed is 0\.\d+ times as fast as the MatMul at batch 1"):
        condense_onnx(source, tmp_path / "b.onnx")
