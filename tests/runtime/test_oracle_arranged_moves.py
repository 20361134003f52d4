"""Padding, concatenation and affine maps of tensors whose samples are arranged, in torch and in ONNX Runtime.

Run as they are for this CPU's best instruction set, and by ``test_oracle_isas.py`` for each of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from kernel_support import misaligned
from kernel_support.onnx_models import Operator
from onnx import TensorProto, helper
from torch import Tensor

from srigl_fx.errors import FormatError
from srigl_fx.runtime.arranged import arrange, arrange_back
from srigl_fx.runtime.cpu.threads import torch_threads
from srigl_fx.runtime.ops import AFFINE, ARRANGE, CONCAT, PAD
from srigl_fx.runtime.ort import abi
from srigl_fx.runtime.ort.fallback import IR_VERSION, OPSET_VERSION, fallback_functions

BATCHES = (0, 1, 7, 8, 9, 16, 17, 33)


class Move(NamedTuple):
    """An operator, with tensors to give it; those of rank three or more are arranged before.

    Attributes:
        shapes: Of its inputs, without the batch where they have one.
        operator: That of torch, as a function of the inputs.
        by_hand: What it computes of samples that lie as they were, by NumPy.
        name: That of ONNX.
        attributes: And what it has there.
    """

    shapes: tuple[tuple[int, ...], ...]
    operator: Callable[..., Tensor]
    by_hand: Callable[..., Any]
    name: str
    attributes: dict[str, Any]

    def inputs(self, batch: int) -> list[Tensor]:
        """Random ones; with what is not finite among the samples."""
        found = [torch.randn(*([batch] if len(shape) > 1 else []), *shape) for shape in self.shapes]
        if batch > 1 and found[0].numel():
            found[0][0, 0], found[0][batch - 1, -1] = torch.nan, -torch.inf
        return found

    def arranged(self, inputs: list[Tensor]) -> list[Tensor]:
        return [arrange(one) if one.dim() > 2 else one for one in inputs]

    def model(self, **changes: Any) -> Any:
        """The operator between such as arrange samples, as a model."""
        names = ["x", "other", "shift"][: len(self.shapes)]
        nodes, read = [], []
        for name, shape in zip(names, self.shapes, strict=True):
            read.append(f"{name}_arranged" if len(shape) > 1 else name)
            if len(shape) > 1:
                nodes.append(helper.make_node(abi.ARRANGE, [name], [read[-1]], domain=abi.DOMAIN))
        nodes += [
            helper.make_node(self.name, read, ["moved"], "move", domain=abi.DOMAIN, **{**self.attributes, **changes}),
            helper.make_node(abi.ARRANGE, ["moved"], ["y"], domain=abi.DOMAIN, back=1),
        ]
        inputs = [helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in names]
        return helper.make_model(
            helper.make_graph(nodes, "graph", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]),
            opset_imports=[helper.make_opsetid("", OPSET_VERSION), helper.make_opsetid(abi.DOMAIN, 1)],
            ir_version=IR_VERSION,
            functions=fallback_functions([abi.ARRANGE, self.name]),
        )


def padding(shape: tuple[int, ...], before: list[int], after: list[int], value: float = 0.0) -> Move:
    pairs = [(0, 0), (0, 0), *zip(before, after, strict=True)]
    return Move(
        (shape,),
        lambda x: PAD(x, before, after, value),
        lambda x: np.pad(x, pairs, constant_values=value),
        abi.PAD,
        {"pads": [p[0] for p in pairs] + [p[1] for p in pairs], "value": value},
    )


def joined(shape: tuple[int, ...], others: int) -> Move:
    return Move((shape, (others, *shape[1:])), CONCAT, lambda x, other: np.concatenate((x, other), 1), abi.CONCAT, {})


def affine(shape: tuple[int, ...]) -> Move:
    each = (-1, *[1] * (len(shape) - 1))
    by_hand = lambda x, scale, shift: x * scale.reshape(each) + shift.reshape(each)  # noqa: E731
    return Move((shape, shape[:1], shape[:1]), AFFINE, by_hand, abi.AFFINE, {})


MOVES = {
    "padded": padding((5, 4, 7), [1, 2], [3, 0]),
    "padded by what is not a number's neighbour": padding((17, 3, 2), [0, 1], [1, 5], -np.inf),
    "padded, one axis": padding((3, 9), [2], [4], 1.5),
    "not padded": padding((4, 3, 3), [0, 0], [0, 0]),
    "padded from nothing": padding((3, 0, 2), [1, 0], [1, 0], 2.0),
    "joined": joined((5, 4, 7), 3),
    "joined, one axis": joined((16, 19), 1),
    "joined, three axes": joined((2, 2, 3, 4), 33),
    "joined with nothing": joined((3, 2, 2), 0),
    "an affine map": affine((5, 4, 7)),
    "an affine map, one axis": affine((17, 11)),
    "an affine map of one channel": affine((1, 3, 3, 2)),
}
every_move = pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)


@every_move
def test_moves(move: Move) -> None:
    for batch in BATCHES:
        inputs = move.inputs(batch)
        expected = move.by_hand(*[one.numpy() for one in inputs])
        for given in (move.arranged(inputs), [misaligned(one) for one in move.arranged(inputs)]):
            y = move.operator(*given)
            np.testing.assert_allclose(arrange_back(y), expected, rtol=1e-6, atol=1e-6)
            assert y.is_contiguous()


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_what_is_moved(threads: int) -> None:
    with torch_threads(threads):
        for move in (padding((24, 30, 31), [2, 0], [1, 3]), joined((24, 40, 40), 8), affine((24, 40, 40))):
            inputs = move.inputs(19)
            expected = move.by_hand(*[one.numpy() for one in inputs])
            y = arrange_back(move.operator(*move.arranged(inputs)))
            np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


@every_move
@pytest.mark.parametrize("by_library", [True, False], ids=["library", "fallback"])
def test_moves_in_onnxruntime(move: Move, by_library: bool, request: pytest.FixtureRequest) -> None:
    if by_library:
        request.getfixturevalue("library")  # built, or the test is skipped
    operator = Operator(move.model(), library=by_library, threads=2)
    names = ["x", "other", "shift"]
    for batch in (0, 1, 16, 35):
        inputs = move.inputs(batch)
        expected = move.by_hand(*[one.numpy() for one in inputs])
        y = operator(**dict(zip(names, inputs, strict=False)))
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


@every_move
def test_gradients_of_moves(move: Move) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*([17] if len(shape) > 1 else []), *shape, requires_grad=True) for shape in move.shapes]
    y = ARRANGE(move.operator(*[ARRANGE(one) if one.dim() > 2 else one for one in inputs]), True)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    for place, grad in enumerate(grads):
        # Each operator is linear in each of its inputs: the gradient's product with a change is what the change does.
        change = torch.randn_like(inputs[place])
        moved = [one.detach().double() for one in inputs]
        low = move.by_hand(*[one.numpy() for one in moved])
        moved[place] = moved[place] + change.double()
        with np.errstate(invalid="ignore"):  # of borders that are not finite, which do not change
            difference = np.nan_to_num(move.by_hand(*[one.numpy() for one in moved]) - low)
        expected = (torch.from_numpy(difference) * weights).sum()
        torch.testing.assert_close((grad * change).sum().double(), expected.double(), rtol=1e-4, atol=1e-3)


REFUSED: dict[str, tuple[Callable[[], Tensor], str]] = {
    "padding of another rank": (lambda: PAD(torch.randn(8, 2, 3, 3), [1], [1]), "before is"),
    "padding by less than nothing": (lambda: PAD(torch.randn(8, 2, 3, 3), [1, 0], [0, -1]), "after is"),
    "three axes": (lambda: PAD(torch.randn(8, 2, 3, 3, 3), [1, 0, 0], [0, 1, 0]), "before is"),
    "bytes": (lambda: CONCAT(torch.zeros(8, 2, 3).byte(), torch.zeros(8, 2, 3).byte()), "must be float32"),
    "other sizes": (lambda: CONCAT(torch.zeros(8, 2, 3), torch.zeros(8, 2, 4)), "differ in more than channels"),
    "other samples": (lambda: CONCAT(torch.zeros(8, 2, 3), torch.zeros(7, 2, 3)), "differ in more than channels"),
    "few scales": (lambda: AFFINE(torch.zeros(8, 2, 3), torch.zeros(1), torch.zeros(2)), "scale must be"),
    "wide shifts": (lambda: AFFINE(torch.zeros(8, 2, 3), torch.zeros(2), torch.zeros(2).double()), "shift must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_moves_that_are_refused(name: str) -> None:
    call, words = REFUSED[name]
    with pytest.raises(FormatError, match=words):
        call()


PADS = {
    "no pads": ([], "'pads' is missing"),
    "uneven": ([0] * 7, "'pads' has 7 entries"),
    "of channels": ([0, 1, 0, 0, 0, 0, 0, 0], "'pads' pads samples or channels by 1"),
    "less than nothing": ([0, 0, 0, 0, 0, 0, -1, 0], "'pads' holds -1"),
    "very many": ([0, 0, 0, 0, 0, 0, 2**40, 0], "'pads' holds 1099511627776"),
    "of another rank": ([0, 0, 1, 0, 0, 1], "'x' has rank 4, expected 3"),
}


@pytest.mark.parametrize("name", PADS)
@pytest.mark.usefixtures("library")
def test_pads_that_are_refused(name: str) -> None:
    pads, words = PADS[name]
    move = MOVES["padded"]
    model = move._replace(attributes={}).model(**({"pads": pads} if pads else {}))
    with pytest.raises(Exception, match=f"PadSamples node 'move': .*{words}"):
        Operator(model, library=True, threads=1)(x=torch.randn(8, 5, 4, 7))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("name", "inputs", "words"),
    [
        ("joined", ((8, 5, 4, 7), (8, 3, 4, 6)), "'other' has a dimension of 6, expected 7"),
        ("joined", ((8, 5, 4, 7), (9, 3, 4, 7)), "'other' has a dimension of 9, expected 8"),
        ("joined", ((8, 5, 4, 7), (8, 3, 4)), "'other' has rank 3, expected 4"),
        ("an affine map", ((8, 5, 4, 7), (4,), (5,)), "'scale' has 4 entries, expected 5"),
        ("an affine map", ((8, 5, 4, 7), (5,), (5, 1)), "'shift' has rank 2, expected 1"),
    ],
)
def test_inputs_that_are_refused(name: str, inputs: tuple[tuple[int, ...], ...], words: str) -> None:
    operator = Operator(MOVES[name].model(), library=True, threads=1)
    given = dict(zip(("x", "other", "shift"), (torch.randn(shape) for shape in inputs), strict=False))
    with pytest.raises(Exception, match=words):
        operator(**given)
