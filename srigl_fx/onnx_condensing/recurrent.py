"""LSTM and GRU as products with their weights, around a loop over time.

Owns the reading of these two operators and the nodes that compute the same. It must not know how sparse a weight is.

Rules:
    1. The product of the inputs with W is taken out of the recurrence: one for all steps and samples. Biases that are
       added to it as they are go with it.
    2. The recurrence becomes a ``Scan`` for each direction, whose body multiplies the state with R; a backward
       direction scans from the end. Neighbouring gates with the same activation are one product, so that a condensed
       operator computes the gates whole: product, addition and activation.
    3. Sequences that are shorter than the longest (``sequence_lens``) keep their state behind their end, in either
       direction, and their outputs there are zero. Of those of no steps the last states are zero, too, whatever the
       first ones are: so ONNX Runtime has it.
    4. Activations without parameters are taken. ``clip``, ``input_forget``, peepholes, other activations and
       ``layout`` 1, which ONNX Runtime does not compute either, are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from srigl_fx.onnx_condensing.constants import Array, attribute, constant, input_of, source_name
from srigl_fx.onnx_condensing.drafts import Draft, Names
from srigl_fx.onnx_condensing.expansion import Expansion, Product

# Gates with the same activation, by their place among all: input, output, forget and cell; update, reset and hidden.
_BLOCKS: Final = {"LSTM": ((0, 3), (3, 4)), "GRU": ((0, 2), (2, 3))}
_ACTIVATIONS: Final = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}
_KNOWN: Final = frozenset({"Sigmoid", "Tanh", "Relu"})
_USUAL_LENGTH: Final = 128  # of a sequence, where it is free
# What a step of a Scan takes beyond its products, and beyond what a step of the operator takes beside its own: about
# what `benchmarks/recurrent_layers.py` finds for the smallest layers.
_STEP_SECONDS: Final = 12e-6


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One direction."""

    operator: str
    reverse: bool
    activations: tuple[str, ...]
    after_reset: bool  # of a GRU: the reset gate is applied to a product rather than to the state
    w: Array  # (gates * hidden, inputs)
    r: Array  # (gates * hidden, hidden)
    w_bias: Array  # (gates * hidden,)
    r_bias: Array

    @property
    def hidden(self) -> int:
        """The size of the state."""
        return int(self.r.shape[1])

    def rows(self, block: int) -> slice:
        """Those of a block of gates."""
        first, end = _BLOCKS[self.operator][block]
        return slice(first * self.hidden, end * self.hidden)


def recurrent(node: ir.Node, names: Names) -> Expansion | None:
    """An LSTM or a GRU with constant weights as products around a loop; None where its weights are computed.

    Example:
        >>> x, w, r = (ir.val(name) for name in "xwr")
        >>> recurrent(ir.node("LSTM", [x, w, r]), Names(ir.Model(ir.Graph([x], [], nodes=[]), ir_version=9))) is None
        True
    """
    w, r = (constant(input_of(node, i)) for i in (1, 2))
    if w is None or r is None or w.ndim != 3 or r.ndim != 3 or constant(node.inputs[0]) is not None:
        return None
    weights = [source_name(input_of(node, i)) for i in (1, 2)]
    expansion = Expansion(
        node=node,
        operator=node.op_type,
        form="its steps in a Scan",
        shapes=dict(zip(weights, (w.shape, r.shape), strict=True)),
    )
    layers = _layers(node, w, r)
    if isinstance(layers, str):
        expansion.refused = layers
        return expansion
    made = _Maker(node, names, layers, weights)
    expansion.draft, expansion.products = made.draft, made.products
    expansion.replaced, expansion.outputs = node.outputs, made.outputs
    expansion.overhead = lambda batch: len(layers) * made.steps * _STEP_SECONDS
    return expansion


def _layers(node: ir.Node, w: Array, r: Array) -> list[_Layer] | str:
    """The directions, or why they are refused (rule 4)."""
    operator, count = node.op_type, len(w)
    gates = _BLOCKS[operator][-1][1]
    hidden, inputs = r.shape[2], w.shape[2]
    direction = attribute(node, "direction", "forward")
    reverse = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}.get(direction, [])
    if (
        len(reverse) != count
        or w.shape != (count, gates * hidden, inputs)
        or r.shape != (count, gates * hidden, hidden)
    ):
        return f"its weights {w.shape} and {r.shape} are not those of the direction {direction!r}"
    if attribute(node, "hidden_size", hidden) != hidden:
        return "its hidden_size is not that of its weights"
    if problem := _unsupported(node):
        return problem
    bias = constant(input_of(node, 3))
    if input_of(node, 3) is not None and (bias is None or bias.shape != (count, 2 * gates * hidden)):
        return "its bias is computed, or not that of its weights"
    bias = np.zeros((count, 2 * gates * hidden), np.float32) if bias is None else bias
    usual = _ACTIVATIONS[operator]
    named = tuple(attribute(node, "activations", None) or usual * count)
    if len(named) != count * len(usual) or not _KNOWN.issuperset(named):
        return f"its activations are {', '.join(map(str, named))}, and {', '.join(sorted(_KNOWN))} are taken"
    return [
        _Layer(
            operator=operator,
            reverse=reverse[i],
            activations=named[i * len(usual) : (i + 1) * len(usual)],
            after_reset=bool(attribute(node, "linear_before_reset", 0)),
            w=w[i],
            r=r[i],
            w_bias=bias[i, : gates * hidden],
            r_bias=bias[i, gates * hidden :],
        )
        for i in range(count)
    ]


def _unsupported(node: ir.Node) -> str:
    x = node.inputs[0]
    if x is None or x.shape is None or len(x.shape) != 3:
        return "the rank of its input is not known to be 3"
    if x.dtype != ir.DataType.FLOAT:
        return "its input is not float32"
    if attribute(node, "layout", 0):
        return "its layout is 1, which ONNX Runtime does not compute"
    if attribute(node, "clip", 0.0) or attribute(node, "input_forget", 0):
        return "it has clip or input_forget"
    if attribute(node, "activation_alpha", None) or attribute(node, "activation_beta", None):
        return "its activations have parameters"
    if (peepholes := input_of(node, 7)) is not None:
        found = constant(peepholes)
        if found is None or found.any():
            return "it has peepholes"
    return ""


class _Maker:
    """The nodes of one operator."""

    def __init__(self, node: ir.Node, names: Names, layers: list[_Layer], weights: list[str]) -> None:
        x = node.inputs[0]
        assert x is not None
        assert x.shape is not None
        self.node, self.names, self.layers, self.weights, self.x = node, names, layers, weights, x
        self.draft = Draft(names, node.name or node.op_type)
        length, batch = x.shape[0], x.shape[1]
        self.steps = length if isinstance(length, int) else _USUAL_LENGTH
        self.products: list[Product] = []
        self.state_names = ("initial_h", "initial_c")[: 2 if node.op_type == "LSTM" else 1]
        # A size without a name could be any: the body compares names.
        unnamed = not isinstance(batch, int) and batch.value is None
        self.length, self.batch = length, ir.SymbolicDim(names.fresh("batch")) if unnamed else batch
        self.masks = self._masks()
        ends = [self._direction(layer, i) for i, layer in enumerate(layers)]
        y = self._joined([end[-1] for end in ends], 1)
        states = [self._joined([end[i] for end in ends], 0) for i in range(len(self.state_names))]
        self.outputs = [y, *states][: len(node.outputs)]

    def _joined(self, parts: list[ir.Value], axis: int) -> ir.Value:
        """Of each direction, along a new axis."""
        shape = list(parts[0].shape or ())
        axes = self.draft.constant(np.array([axis], np.int64), "axis")
        wide = [self.draft.add("Unsqueeze", part, axes, shape=[*shape[:axis], 1, *shape[axis:]]) for part in parts]
        if len(wide) == 1:
            return wide[0]
        return self.draft.add("Concat", *wide, shape=[*shape[:axis], len(parts), *shape[axis:]], axis=axis)

    def _direction(self, layer: _Layer, place: int) -> list[ir.Value]:
        """The states at the end of a direction, and the outputs (length, batch, hidden)."""
        blocks = range(len(_BLOCKS[layer.operator]))
        inputs = [self._inputs(layer, block) for block in blocks]
        states = [self._initial(layer, i, place) for i in range(len(self.state_names))]
        body = Draft(self.names, f"{self.draft.stem}_step")
        inner = [body.value(name, [self.batch, layer.hidden]) for name in self.state_names]
        scanned = [body.value("inputs", list(one.shape or ())[1:]) for one in inputs]
        step = _lstm_step if layer.operator == "LSTM" else _gru_step
        following = step(body, layer, inner, scanned, self._times_state)
        h = following[0]
        masks = [] if self.masks is None else [self.masks]
        if masks:
            mask = body.value("is_within", [self.batch, 1], ir.DataType.BOOL)
            scanned.append(mask)
            shape = [self.batch, layer.hidden]
            h = body.add("Where", mask, following[0], body.constant(np.float32(0), "nothing"), shape=shape)
            following = [
                body.add("Where", mask, new, old, shape=shape) for new, old in zip(following, inner, strict=True)
            ]
        else:
            h = body.add("Identity", h, shape=[self.batch, layer.hidden])
        graph = body.graph(f"{body.stem}s", [*inner, *scanned], [*following, h])
        backwards = int(layer.reverse)
        state_shape = [self.batch, layer.hidden]
        *ends, y = self.draft.add_several(
            "Scan",
            *states,
            *inputs,
            *masks,
            shapes=[*[state_shape] * len(states), [self.length, *state_shape]],
            body=graph,
            num_scan_inputs=len(scanned),
            scan_input_directions=[backwards] * len(scanned),
            scan_output_directions=[backwards],
        )
        return [*(self._ended(end) for end in ends), y]

    def _ended(self, state: ir.Value) -> ir.Value:
        """The last state, which is zero where there was no step."""
        lengths, shape = input_of(self.node, 4), state.shape
        assert shape is not None
        if lengths is None:
            return state
        nothing = self.draft.constant(np.int32(0), "number")
        has_steps = self.draft.add("Greater", lengths, nothing, shape=[self.batch], dtype=ir.DataType.BOOL)
        axes = self.draft.constant(np.array([1]), "axes")
        wide = self.draft.add("Unsqueeze", has_steps, axes, shape=[self.batch, 1], dtype=ir.DataType.BOOL)
        return self.draft.add("Where", wide, state, self.draft.constant(np.float32(0), "nothing"), shape=list(shape))

    def _inputs(self, layer: _Layer, block: int) -> ir.Value:
        """The product with W, for all steps (rule 1)."""
        rows = layer.rows(block)
        bias = layer.w_bias[rows]
        if not _keeps_bias(layer, block):
            bias = bias + layer.r_bias[rows]
        shape = [self.length, self.batch, len(bias)]
        weight = self.draft.constant(layer.w[rows].T, "W")
        product = self.draft.add("MatMul", self.x, weight, shape=shape)
        batch = self.batch if isinstance(self.batch, int) else 1
        self._note(self.draft.nodes[-1], 0, 1, self.steps * batch)
        return self.draft.add("Add", product, self.draft.constant(bias, "bias"), shape=shape)

    def _times_state(self, body: Draft, layer: _Layer, block: int, h: ir.Value) -> ir.Value:
        """The product of a state with R, at one step."""
        rows = layer.rows(block)
        shape = [self.batch, rows.stop - rows.start]
        product = body.add("MatMul", h, body.constant(layer.r[rows].T, "R"), shape=shape)
        self._note(body.nodes[-1], 1, self.steps, self.batch if isinstance(self.batch, int) else 1)
        if _keeps_bias(layer, block):
            product = body.add("Add", product, body.constant(layer.r_bias[rows], "bias"), shape=shape)
        return product

    def _note(self, node: ir.Node, weight: int, runs: int, positions: int) -> None:
        self.products.append(Product(node=node, weight=self.weights[weight], runs=runs, positions=positions))

    def _initial(self, layer: _Layer, state: int, place: int) -> ir.Value:
        """(batch, hidden) of a direction."""
        given, shape = input_of(self.node, 5 + state), [self.batch, layer.hidden]
        if given is not None:
            return self.draft.add("Gather", given, self.draft.constant(np.int64(place), "place"), shape=shape, axis=0)
        size = self.draft.add("Shape", self.x, shape=[1], dtype=ir.DataType.INT64, start=1, end=2)
        hidden = self.draft.constant(np.array([layer.hidden]), "hidden")
        both = self.draft.add("Concat", size, hidden, shape=[2], dtype=ir.DataType.INT64, axis=0)
        return self.draft.add("ConstantOfShape", both, shape=shape)

    def _masks(self) -> ir.Value | None:
        """Which steps are within their sequences, bool (length, batch, 1); None where all are."""
        lengths = input_of(self.node, 4)
        if lengths is None:
            return None
        draft, whole = self.draft, ir.DataType.INT32
        longest = draft.add("Shape", self.x, shape=[1], dtype=ir.DataType.INT64, start=0, end=1)
        scalar = draft.add("Squeeze", longest, shape=[], dtype=ir.DataType.INT64)
        first, one = (draft.constant(np.int64(number), "number") for number in (0, 1))
        wide = draft.add("Range", first, scalar, one, shape=[self.length], dtype=ir.DataType.INT64)
        axes = draft.constant(np.array([1, 2]), "axes")
        steps = draft.add("Cast", wide, shape=[self.length], dtype=whole, to=int(whole))
        steps = draft.add("Unsqueeze", steps, axes, shape=[self.length, 1, 1], dtype=whole)
        last = draft.constant(np.array([1]), "axes")
        lengths = draft.add("Unsqueeze", lengths, last, shape=[self.batch, 1], dtype=whole)
        return draft.add("Less", steps, lengths, shape=[self.length, self.batch, 1], dtype=ir.DataType.BOOL)


def _keeps_bias(layer: _Layer, block: int) -> bool:
    """Whether the bias of R is added within the recurrence: the reset gate multiplies it."""
    return layer.operator == "GRU" and layer.after_reset and block == 1


_Times = Callable[[Draft, _Layer, int, ir.Value], ir.Value]


def _gates(body: Draft, layer: _Layer, state: ir.Value, given: ir.Value, times: _Times) -> list[ir.Value]:
    """All gates of the first block."""
    shape: list[Any] = list(given.shape or ())
    total = body.add("Add", times(body, layer, 0, state), given, shape=shape)
    active = body.add(layer.activations[0], total, shape=shape)
    first, end = _BLOCKS[layer.operator][0]
    parts = [[*shape[:-1], layer.hidden]] * (end - first)
    return body.add_several("Split", active, shapes=parts, axis=1, num_outputs=end - first)


def _lstm_step(
    body: Draft, layer: _Layer, states: list[ir.Value], given: list[ir.Value], times: _Times
) -> list[ir.Value]:
    (h, c), shape = states, list(states[0].shape or ())
    enter, leave, forget = _gates(body, layer, h, given[0], times)
    total = body.add("Add", times(body, layer, 1, h), given[1], shape=shape)
    cell = body.add(layer.activations[1], total, shape=shape)
    kept = body.add("Mul", forget, c, shape=shape)
    entered = body.add("Mul", enter, cell, shape=shape)
    c = body.add("Add", kept, entered, shape=shape)
    shown = body.add(layer.activations[2], c, shape=shape)
    return [body.add("Mul", leave, shown, shape=shape), c]


def _gru_step(
    body: Draft, layer: _Layer, states: list[ir.Value], given: list[ir.Value], times: _Times
) -> list[ir.Value]:
    (h,), shape = states, list(states[0].shape or ())
    update, reset = _gates(body, layer, h, given[0], times)
    if layer.after_reset:
        product = body.add("Mul", reset, times(body, layer, 1, h), shape=shape)
    else:
        product = times(body, layer, 1, body.add("Mul", reset, h, shape=shape))
    hidden = body.add(layer.activations[1], body.add("Add", product, given[1], shape=shape), shape=shape)
    # (1 - update) * hidden + update * h
    change = body.add("Mul", update, body.add("Sub", h, hidden, shape=shape), shape=shape)
    return [body.add("Add", hidden, change, shape=shape)]
