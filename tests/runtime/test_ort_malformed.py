"""Model files are untrusted: whatever is in them ends in a Python exception, never in a crash."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from ort_support.models import WEIGHTS, Array, Node, conv, linear
from ort_support.mutations import INT64_MAX, INT64_MIN, attempt, mutated, shared, write
from ort_support.mutations import SAMPLES as X

from srigl_fx.runtime.quantisation import LARGEST_FAN_IN, LARGEST_FILTER


def _changed(array: Array, position: tuple[int, ...], value: float) -> Array:
    array = array.copy()
    array[position] = value
    return array


def _weight_faults(node: Node) -> dict[str, tuple[Node, str]]:
    """Faults in the weight inputs: name -> the node and what the message must hold."""
    w = node.weights
    indices, active, values, bias = (w[name] for name in ("indices", "active", "values", "bias"))
    wide = indices.astype(np.int32)
    limit = node.attributes["in_features"]
    n = len(bias)
    return {
        "index_too_large": (node.with_weights(indices=_changed(indices, (1, 2), limit)), "row 1"),
        "index_65535": (node.with_weights(indices=_changed(indices, (3, 2), 65535)), "'indices'"),
        "index_negative": (node.with_weights(indices=_changed(wide, (0, 0), -1)), "'indices'"),
        "index_int32_min": (node.with_weights(indices=_changed(wide, (0, 0), -(2**31))), "'indices'"),
        "index_int32_max": (node.with_weights(indices=_changed(wide, (3, 2), 2**31 - 1)), "'indices'"),
        "index_twice": (node.with_weights(indices=_changed(indices, (2, 1), indices[2, 0])), "ascend"),
        "index_twice_at_the_end": (
            node.with_weights(indices=_changed(indices, (2, -1), indices[2, -2])),
            "only zeros at its end",
        ),
        "index_descending": (node.with_weights(indices=indices[:, ::-1].copy()), "ascend"),
        "index_int64": (node.with_weights(indices=indices.astype(np.int64)), "'indices' must be uint16 or int32"),
        "index_int16": (node.with_weights(indices=indices.astype(np.int16)), "'indices' must be uint16 or int32"),
        "index_float": (node.with_weights(indices=indices.astype(np.float32)), "'indices' must be uint16 or int32"),
        "index_string": (node.with_weights(indices=indices.astype(object).astype(str)), "'indices' must be"),
        "index_rank_1": (node.with_weights(indices=indices.reshape(-1)), "'indices'"),
        "index_rank_3": (node.with_weights(indices=indices[None]), "'indices'"),
        "index_rank_0": (node.with_weights(indices=indices[0, 0].reshape(())), "'indices'"),
        "index_narrower": (node.with_weights(indices=indices[:, :-1].copy()), "'values'"),
        "index_wider_than_features": (
            node.with_weights(
                indices=np.tile(np.arange(limit + 1, dtype=np.uint16), (4, 1)),
                values=np.ones((4, limit + 1), values.dtype),
            ),
            "in_features",
        ),
        "rows_more_than_neurons": (
            node.with_weights(
                indices=np.tile(indices[:1], (n + 1, 1)),
                values=np.tile(values[:1], (n + 1, 1)),
                active=np.arange(n + 1, dtype=np.int32),
            ),
            f"has {n + 1} rows, more than {n} neurons",
        ),
        "values_fewer_rows": (node.with_weights(values=values[:-1].copy()), "'values'"),
        "values_transposed": (node.with_weights(values=values.T.copy()), "'values'"),
        "values_rank_1": (node.with_weights(values=values.reshape(-1)), "'values'"),
        "values_empty": (node.with_weights(values=values[:0].copy()), "'values'"),
        "values_double": (node.with_weights(values=values.astype(np.float64)), ""),
        "active_short": (node.with_weights(active=active[:-1].copy()), "'active'"),
        "active_too_large": (node.with_weights(active=_changed(active, (-1,), n)), "'active'"),
        "active_negative": (node.with_weights(active=_changed(active, (0,), -1)), "'active'"),
        "active_int32_min": (node.with_weights(active=_changed(active, (0,), -(2**31))), "'active'"),
        "active_twice": (node.with_weights(active=_changed(active, (1,), active[0])), "'active'"),
        "active_int64": (node.with_weights(active=active.astype(np.int64)), ""),
        "active_rank_2": (node.with_weights(active=active[:, None]), "'active'"),
        "active_rank_0": (node.with_weights(active=active[0].reshape(())), "'active'"),
        "bias_short": (node.with_weights(bias=bias[:-1].copy()), "'bias'"),
        "bias_long": (node.with_weights(bias=np.append(bias, bias)), "'bias'"),
        "bias_empty": (node.with_weights(bias=bias[:0].copy()), "'bias'"),
        "bias_rank_2": (node.with_weights(bias=bias[None]), "'bias'"),
        "bias_rank_0": (node.with_weights(bias=bias[0].reshape(())), "'bias'"),
        "bias_double": (node.with_weights(bias=bias.astype(np.float64)), ""),
    } | _shared_faults(shared(node))


def _shared_faults(node: Node) -> dict[str, tuple[Node, str]]:
    """Faults of who reads which row of indices."""
    indices, active = node.weights["indices"], node.weights["active"]
    limit = node.attributes["in_features"]

    def reading(*rows: int) -> Node:
        return node.with_weights(active=np.stack([active[0], np.array(rows, np.int32)]))

    names = "'active' names the row"
    return {
        "shared_late": (reading(1, 1, 1, 1), names),
        "shared_jump": (reading(0, 0, 2, 2), names),
        "shared_back": (reading(0, 1, 0, 1), names),
        "shared_negative": (reading(-1, 0, 0, 1), names),
        "shared_int32_min": (reading(0, -(2**31), 0, 1), names),
        "shared_int32_max": (reading(0, 0, 1, 2**31 - 1), names),
        "shared_too_far": (reading(0, 1, 2, 3), "'active' names 4 of 2 rows of indices"),
        "shared_not_all": (reading(0, 0, 0, 0), "'active' names 1 of 2 rows of indices"),
        "shared_not_said": (node.with_weights(active=active[0].copy()), "'active' has 4 entries, 'indices' has 2 rows"),
        "shared_three": (node.with_weights(active=np.concatenate([active, active[1:]])), "'active' must be"),
        "shared_short": (node.with_weights(active=active[:, :3].copy()), "'active' has 3 entries, 'values' has 4"),
        "shared_rank_3": (node.with_weights(active=active[None]), "'active' must be"),
        "shared_rows_descend": (node.with_weights(active=active[:, ::-1].copy()), "'active'"),
        "shared_index_too_large": (node.with_weights(indices=_changed(indices, (1, 2), limit)), "row 2"),
        "shared_index_twice": (node.with_weights(indices=_changed(indices, (1, 1), indices[1, 0])), "ascend"),
        "shared_index_missing": (node.with_weights(indices=indices[:1].copy()), "'active' names 2 of 1 rows"),
    }


def _float_faults(node: Node) -> dict[str, tuple[Node, str]]:
    """Faults of an operator without scales."""
    values = node.weights["values"]
    return {
        "values_int8": (node.with_weights(values=values.astype(np.int8)), "must be float32, bfloat16 or float16"),
        "scales": (node.with_weights(scales=np.ones(4, np.float32)).replace(inputs=(*node.inputs, "scales")), ""),
    }


def _scale_faults(node: Node) -> dict[str, tuple[Node, str]]:
    """Faults of an operator with values of eight bits."""
    values, scales = node.weights["values"], node.weights["scales"]
    wide = linear(n=2, in_features=LARGEST_FAN_IN + 9, k=LARGEST_FAN_IN + 1, n_active=1, index_type="int32")
    number = "'scales' holds a number at position 1 that is negative or not finite"
    faults = {
        f"scale_{value}": (node.with_weights(scales=_changed(scales, (1,), value)), number)
        for value in (-1.0, -1e-45, np.nan, -np.nan, np.inf, -np.inf)
    }
    wrong = "'values' must be int8"
    return faults | {
        "scales_short": (node.with_weights(scales=scales[:-1].copy()), "'scales' has 3 entries, 'values' has 4 rows"),
        "scales_long": (node.with_weights(scales=np.append(scales, scales)), "'scales' has 8 entries"),
        "scales_empty": (node.with_weights(scales=scales[:0].copy()), "'scales' has 0 entries"),
        "scales_rank_0": (node.with_weights(scales=scales[0].reshape(())), "'scales' must be (n_active,)"),
        "scales_rank_2": (node.with_weights(scales=scales[:, None]), "'scales' must be (n_active,)"),
        "scales_double": (node.with_weights(scales=scales.astype(np.float64)), ""),
        "scales_half": (node.with_weights(scales=scales.astype(np.float16)), ""),
        "scales_int8": (node.with_weights(scales=np.ones(4, np.int8)), ""),
        "values_float32": (node.with_weights(values=values.astype(np.float32)), wrong),
        "values_float16": (node.with_weights(values=values.astype(np.float16)), wrong),
        "values_uint8": (node.with_weights(values=values.astype(np.uint8)), wrong),
        "values_int32": (node.with_weights(values=values.astype(np.int32)), wrong),
        "fan_in": (wide.of_eight_bits(), f"'indices' has {LARGEST_FAN_IN + 1} columns, more than the {LARGEST_FAN_IN}"),
    }


def _attribute_faults(node: Node) -> dict[str, tuple[Node, str]]:
    shape = node.attributes["weight_shape"]
    faults: dict[str, tuple[Node, str]] = {}
    for name in ("in_features", "weight_shape", "flat_size"):
        faults[f"no_{name}"] = (node.with_attributes(**{name: None}), f"'{name}'")
        faults[f"{name}_float"] = (node.with_attributes(**{name: 3.5}), f"'{name}'")
        faults[f"{name}_text"] = (node.with_attributes(**{name: "many"}), f"'{name}'")
    for name in ("in_features", "flat_size"):
        for value in (0, -1, 1, 2**31, 2**32, 2**62, INT64_MAX, INT64_MIN):
            faults[f"{name}_{value}"] = (node.with_attributes(**{name: value}), "attribute")
        faults[f"{name}_list"] = (node.with_attributes(**{name: [3, 4]}), f"'{name}'")
    bad_shapes: dict[str, Any] = {
        "int": 5,
        "empty": [],
        "long": [1] * 17,
        "huge": [1] * 100_000,
        "flattened": [shape[0] * shape[1], *shape[2:]],
        "negative": [-shape[0], -shape[1], *shape[2:]],
        "zero": [0, *shape[1:]],
        "zero_inside": [shape[0], 0, *shape[2:]],
        "other_n": [shape[0] + 1, *shape[1:]],
        "wrap_to_zero": [2**32, 2**32, *shape[2:]],
        "wrap_to_same": [shape[0], shape[1] + 2**61, *shape[2:]],
        "int64_max": [INT64_MAX] * len(shape),
        "int64_min": [INT64_MIN] * len(shape),
        "rank_plus": [*shape, 1, 1, 1, 1],
    }
    for name, value in bad_shapes.items():
        faults[f"weight_shape_{name}"] = (node.with_attributes(weight_shape=value), "attribute")
    return faults


def _conv_faults() -> dict[str, tuple[Node, str]]:
    node = conv()
    faults: dict[str, tuple[Node, str]] = {}
    for name, good in (("strides", [1, 1]), ("dilations", [1, 1]), ("pads", [0, 0, 0, 0])):
        values: dict[str, Any] = {
            "short": good[:-1],
            "long": [*good, 1],
            "endless": good * 5000,
            "negative": [-1, *good[1:]],
            "int64_max": [INT64_MAX] * len(good),
            "int64_min": [INT64_MIN] * len(good),
            "beyond_bound": [2**20 + 1, *good[1:]],
            "float": 1.5,
            "floats": helper.make_attribute(name, [1.5] * len(good)),
            "text": "two",
        }
        if name != "pads":
            values["zero"] = [0, *good[1:]]
        for fault, value in values.items():
            faults[f"{name}_{fault}"] = (node.with_attributes(**{name: value}), f"'{name}'")
    for value in (0, -1, 4, 5, 7, 2**31, 2**40, INT64_MAX, INT64_MIN, 1.5, "two"):
        faults[f"group_{value}"] = (node.with_attributes(group=value), "'group'")
    faults["group_too_many_channels"] = (
        node.with_attributes(in_features=2**30, weight_shape=[6, 2**30, 1, 1], flat_size=6 * 2**30, group=6),
        "channels",
    )
    for value in (2, -1, INT64_MAX, INT64_MIN, 1.5, "two"):
        faults[f"arranged_{value}"] = (node.with_attributes(arranged=value), "'arranged'")
    faults["arranged_3d"] = (conv(kernel=(3, 3, 3)).with_attributes(arranged=1), "'arranged'")
    faults["arranged_transposed"] = (node.replace(op="CondensedConvTranspose").with_attributes(arranged=1), "")
    wide = conv(kernel=(1, 9)).with_attributes(arranged=1, dilations=[1, 2**20])
    faults["arranged_too_far_apart"] = (wide, "'arranged'")
    faults["pads_huge_output"] = (
        conv(kernel=(3, 3, 3)).with_attributes(pads=[2**20] * 6),
        "too large",
    )
    return faults


def _graph_faults() -> dict[str, tuple[Node, str]]:
    faults: dict[str, tuple[Node, str]] = {}
    nodes = {"linear": linear(), "conv": conv()}
    nodes |= {f"{op}_int8": node.of_eight_bits() for op, node in nodes.items()}
    for op, node in nodes.items():
        for position, name in enumerate(node.inputs):
            absent = list(node.inputs)
            absent[position] = ""
            faults[f"{op}_absent_{name}"] = (node.replace(inputs=absent), "")
            faults[f"{op}_only_{position}_inputs"] = (node.replace(inputs=node.inputs[:position]), "")
        faults[f"{op}_one_input_more"] = (node.replace(inputs=(*node.inputs, "bias")), "")
        swapped = ("x", "values", "active", "indices", *node.inputs[4:])
        faults[f"{op}_swapped_inputs"] = (node.replace(inputs=swapped), "")
        swapped = ("x", "bias", *node.inputs[2:])
        faults[f"{op}_bias_for_values"] = (node.replace(inputs=swapped), "'values'")
        faults[f"{op}_x_double"] = (node.replace(x_type=TensorProto.DOUBLE), "")
        faults[f"{op}_x_half"] = (node.replace(x_type=TensorProto.FLOAT16), "")
    return faults


def _given_faults(node: Node) -> dict[str, tuple[Node, str]]:
    """What is wrong with the scale that samples are rounded with."""
    wrong = "'x_scale' must be 0 or a finite number of at least 2**-100"
    faults = {
        f"scale_{value}": (node.with_attributes(x_scale=value), wrong)
        for value in (-1.0, -0.0, math.inf, -math.inf, math.nan, 1e-31, 1e-45)
    }
    return faults | {
        "scale_int": (node.with_attributes(x_scale=1), "attribute 'x_scale' must be a float"),
        "scale_list": (node.with_attributes(x_scale=[1]), "attribute 'x_scale' must be a float"),
        "offset_1": (node.with_attributes(x_scale=1.0, x_offset=1), "attribute 'x_offset' is 1, expected 0 or 128"),
        "offset_negative": (node.with_attributes(x_scale=1.0, x_offset=-(2**63)), "attribute 'x_offset' is -92233"),
        "offset_float": (node.with_attributes(x_offset=1.0), "attribute 'x_offset' must be an int"),
    }


def _cases() -> dict[str, tuple[Node, str, Array]]:
    cases: dict[str, tuple[Node, str, Array]] = {}
    linear_int8, conv_int8 = linear().of_eight_bits(), conv().of_eight_bits()
    groups = {
        "linear": {**_weight_faults(linear()), **_float_faults(linear()), **_attribute_faults(linear())},
        "conv": {**_weight_faults(conv()), **_float_faults(conv()), **_attribute_faults(conv()), **_conv_faults()},
        "linear_int8": {**_weight_faults(linear_int8), **_scale_faults(linear_int8), **_attribute_faults(linear_int8)},
        "conv_int8": {
            **_weight_faults(conv_int8),
            **_scale_faults(conv_int8),
            "filter": (
                conv(channels=LARGEST_FILTER + 1, kernel=(1, 1), index_type="int32").of_eight_bits(),
                f"'in_features' is {LARGEST_FILTER + 1}, too much for values of int8",
            ),
        },
        "linear_int8_given": _given_faults(linear_int8),
        "conv_int8_given": _given_faults(conv_int8),
        "graph": _graph_faults(),
        # The same contents behind inputs of the graph: only the run can tell.
        "linear_run": {
            name: (node.replace(not_constant=frozenset(WEIGHTS)), message)
            for name, (node, message) in _weight_faults(linear()).items()
            if name != "index_string"
        },
        "conv_run": {
            name: (node.replace(not_constant=frozenset({"indices", "active"})), message)
            for name, (node, message) in _weight_faults(conv()).items()
            if name != "index_string"
        },
        "linear_int8_run": {
            name: (node.replace(not_constant=frozenset((*WEIGHTS, "scales"))), message)
            for name, (node, message) in (_weight_faults(linear_int8) | _scale_faults(linear_int8)).items()
            if name != "index_string"
        },
        "conv_int8_run": {
            name: (node.replace(not_constant=frozenset({"scales"})), message)
            for name, (node, message) in _scale_faults(conv_int8).items()
        },
    }
    for group, faults in groups.items():
        for name, (node, message) in faults.items():
            x_type = helper.tensor_dtype_to_np_dtype(node.x_type)
            shape = X.get(node.x_rank, (1, 4, 5, 6, 7))
            cases[f"{group}-{name}"] = (node, message, np.ones(shape, x_type))
    for name, shape in {"narrow": (3, 9), "wide": (3, 11), "empty_width": (3, 0), "huge_batch": (0, 2**40)}.items():
        cases[f"x-linear_{name}"] = (linear(), "'x'", np.ones(shape, np.float32))
    cases["x-linear_scalar"] = (linear(x_rank=0), "'x'", np.ones((), np.float32))
    conv_shapes = {
        "channels": (1, 5, 5, 6),
        "no_channels": (1, 0, 5, 6),
        "small": (1, 4, 2, 6),
        "no_pixels": (1, 4, 0, 6),
        "huge_pixels": (0, 4, 2**40, 6),
    }
    for name, x_shape in conv_shapes.items():
        cases[f"x-conv_{name}"] = (conv(), "'x'", np.ones(x_shape, np.float32))
    for rank in (0, 1, 3, 5):
        cases[f"x-conv_rank_{rank}"] = (conv().replace(x_rank=rank), "'x'", np.ones((4,) * rank, np.float32))
    return cases


@pytest.mark.long
def test_every_fault_is_refused_by_name(library: Path, tmp_path: Path) -> None:
    cases = _cases()
    for name, (node, _, x) in cases.items():
        write(tmp_path, name, node.model(fallback=False), node.feeds(x))
    outcomes = attempt(tmp_path, library)
    assert outcomes.keys() == cases.keys()
    accepted = [name for name, found in outcomes.items() if found["stage"] == "ok"]
    assert not accepted
    wrong = {
        name: outcomes[name]["message"]
        for name, (node, message, _) in cases.items()
        if message and not (message in outcomes[name]["message"] and node.op in outcomes[name]["message"])
    }
    assert not wrong
    at_load = "linear-", "conv-", "linear_int8-", "conv_int8-"
    constant_faults = [name for name in cases if name.startswith(at_load) and "huge_output" not in name]
    assert [name for name in constant_faults if outcomes[name]["stage"] != "load"] == []


@pytest.mark.long
def test_well_formed_twins_are_accepted(library: Path, tmp_path: Path) -> None:
    """What the faults above are one change away from."""
    nodes = {"linear": linear(), "conv": conv()}
    nodes |= {f"{name}_int8": node.of_eight_bits() for name, node in nodes.items()}
    nodes |= {f"{name}_shared": shared(node) for name, node in nodes.items()}
    for name, node in nodes.items():
        everything = frozenset(node.weights)
        for not_constant in (frozenset(), everything, frozenset({"indices"}), frozenset({"values", "bias"})):
            case = node.replace(not_constant=not_constant)
            write(
                tmp_path,
                "_".join((name, *sorted(not_constant))),
                case.model(),
                case.feeds(np.ones(X[node.x_rank], np.float32)),
            )
    missing_defaults = conv().with_attributes(strides=None, pads=None, dilations=None, group=None)
    write(tmp_path, "conv_defaults", missing_defaults.model(), {"x": np.ones(X[4], np.float32)})
    outcomes = attempt(tmp_path, library)
    assert len(outcomes) == 33
    assert {name: found["message"] for name, found in outcomes.items() if found["stage"] != "ok"} == {}


@pytest.mark.long
@pytest.mark.parametrize("eight_bits", [False, True])
def test_random_changes_never_crash(library: Path, tmp_path: Path, eight_bits: bool) -> None:
    nodes = mutated(600, int(eight_bits), eight_bits)
    for name, node in nodes.items():
        write(tmp_path, name, node.model(fallback=False), node.feeds(np.ones(X[node.x_rank], np.float32)))
    outcomes = attempt(tmp_path, library)
    assert outcomes.keys() == nodes.keys()
    stages = [found["stage"] for found in outcomes.values()]
    assert stages.count("ok") < len(stages)
