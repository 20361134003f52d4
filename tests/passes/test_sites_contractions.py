"""The table of contractions: every operation's operands, by hand; what its letters say, against torch itself."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor

from srigl_fx.passes.sites.contractions import Operand, name_of, operands

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
LSTM = ("i", "f", "g", "o")
QKV = ("q", "k", "v")

# The call, and for each operand (value, roles).
ROLES: dict[str, tuple[Call, list[tuple[Any, str]]]] = {
    "linear": (("linear", ("x", "w", "b"), {}), [("w", "ni")]),
    "linear, named": (("linear", ("x",), {"weight": "w"}), [("w", "ni")]),
    "conv1d": (("conv1d", ("x", "w"), {}), [("w", "nii")]),
    "conv2d": (("conv2d", ("x", "w"), {}), [("w", "niii")]),
    "conv3d": (("conv3d", ("x",), {"weight": "w"}), [("w", "niiii")]),
    "conv_transpose1d": (("conv_transpose1d", ("x", "w"), {}), [("w", "ini")]),
    "conv_transpose2d": (("conv_transpose2d", ("x", "w"), {}), [("w", "inii")]),
    "conv_transpose3d": (("conv_transpose3d", ("x", "w"), {}), [("w", "iniii")]),
    "matmul": (("matmul", ("a", "b"), {}), [("a", "*ni"), ("b", "*in")]),
    "matmul, named": (("matmul", (), {"input": "a", "other": "b"}), [("a", "*ni"), ("b", "*in")]),
    "mm": (("mm", ("a",), {"mat2": "b"}), [("a", "*ni"), ("b", "*in")]),
    "bmm": (("bmm", ("a", "b"), {}), [("a", "*ni"), ("b", "*in")]),
    "@": (("__matmul__", ("a", "b"), {}), [("a", "*ni"), ("b", "*in")]),
    "@, from the right": (("__rmatmul__", ("b", "a"), {}), [("b", "*in"), ("a", "*ni")]),
    "addmm": (("addmm", ("bias", "a", "b"), {}), [("a", "*ni"), ("b", "*in")]),
    "addmm, named": (("addmm", ("bias",), {"mat1": "a", "mat2": "b"}), [("a", "*ni"), ("b", "*in")]),
    "baddbmm": (("baddbmm", ("bias",), {"batch1": "a", "batch2": "b"}), [("a", "*ni"), ("b", "*in")]),
    "addbmm": (("addbmm", ("bias", "a", "b"), {}), [("a", "*ni"), ("b", "*in")]),
    "mv": (("mv", ("a",), {"vec": "b"}), [("a", "ni"), ("b", "i")]),
    "addmv": (("addmv", ("bias", "a", "b"), {}), [("a", "ni"), ("b", "i")]),
    "inner": (("inner", ("a", "b"), {}), [("a", "ni"), ("b", "ni")]),
    "einsum": (("einsum", ("bi,oi->bo", "x", "w"), {}), [("x", "ni"), ("w", "ni")]),
    "einsum of a list": (("einsum", ("bi, oi -> bo", ["x", "w"]), {}), [("x", "ni"), ("w", "ni")]),
    "einsum without an arrow": (("einsum", ("oi,bi", "w", "x"), {}), [("w", "ni"), ("x", "ni")]),
    "einsum of three": (
        ("einsum", ("bi,oi,bo->bo", "x", "w", "y"), {}),
        [("x", "bi"), ("w", "bi"), ("y", "bb")],
    ),
    "einsum with dots": (("einsum", ("...i,hio->...ho", "x", "w"), {}), [("x", "*i"), ("w", "nin")]),
    "einsum with dots in each": (("einsum", ("...i,...oi->...o", "x", "w"), {}), [("x", "*i"), ("w", "*ni")]),
    "einsum that sums over dots": (("einsum", ("...i,oi->o", "x", "w"), {}), [("w", "ni")]),
    "einsum with dots behind": (("einsum", ("i...,oi->o...", "x", "w"), {}), [("w", "ni")]),
    "einsum of one": (("einsum", ("ij->ji", "w"), {}), []),
    "einsum by numbers": (("einsum", (torch.ones(1, 1), [0, 1], "w", [2, 1]), {}), []),
    "packed attention": (
        ("multi_head_attention_forward", tuple("abcdefghijklmnopqrstuvwxyz"), {}),
        [("f", "ni"), ("l", "ni"), ("s", "ni"), ("t", "ni"), ("u", "ni")],
    ),
    "attention, named": (
        (
            "multi_head_attention_forward",
            tuple("abcdefghijkl"),
            {"q_proj_weight": "q", "v_proj_weight": "v", "in_proj_weight": "none"},
        ),
        [("f", "ni"), ("l", "ni"), ("q", "ni"), (None, "ni"), ("v", "ni")],
    ),
    "gru_cell": (("gru_cell", ("x", "h", "w", "u", "b", "b"), {}), [("w", "ni"), ("u", "ni")]),
    "grouped": (("_grouped_mm", ("x", "w"), {"offs": "o"}), [("w", "bin")]),
    "grouped, named": (("grouped_mm", ("x",), {"mat_b": "w"}), [("w", "bin")]),
    "grouped, of transformers": (("grouped_mm_fallback", ("x",), {"weight": "w"}), [("w", "bin")]),
}


def contraction(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Operand]:
    """The operands of what contracts something."""
    found = operands(name, args, kwargs)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ROLES)
def test_roles_of_operands(name: str) -> None:
    call, expected = ROLES[name]
    assert [(each.value, each.roles) for each in contraction(*call)] == expected


def test_of_a_product_either_operand_may_be_the_weight() -> None:
    either = {name for name, (call, _) in ROLES.items() if (found := operands(*call)) and all(o.either for o in found)}
    one = {name for name in ROLES if name.startswith(("linear", "conv", "packed", "attention", "gru", "grouped"))}
    assert either == ROLES.keys() - one - {"einsum of one", "einsum by numbers"}
    assert not any(each.either for name in one for each in operands(*ROLES[name][0]) or ())


@pytest.mark.parametrize(
    ("dims", "contracted"),
    [
        (1, [(-1,), (0,)]),
        (2, [(-2, -1), (0, 1)]),
        (([1, 2], [2, 0]), [(1, 2), (2, 0)]),
        ([(0,), (1,)], [(0,), (1,)]),
        ("axes", []),
        ([0, 1], []),
        ([(0,)], []),
    ],
    ids=repr,
)
def test_axes_that_tensordot_sums_over(dims: Any, contracted: list[tuple[int, ...]]) -> None:
    for args, kwargs in ((("a", "b", dims), {}), ((), {"a": "a", "other": "b", "dims": dims})):
        found = contraction("tensordot", args, kwargs)
        assert [(each.value, each.contracted) for each in found] == [*zip("ab", contracted, strict=False)]
    default = contraction("tensordot", ("a", "b"), {})
    assert [each.contracted for each in default] == [(-2, -1), (0, 1)]


@pytest.mark.parametrize(
    ("name", "args", "values", "gates"),
    [
        ("lstm", ("x", ("h", "c"), ["w", "u"], True), ["w", "u"], LSTM),
        ("lstm", ("x", "sizes", ("h", "c"), ["w", "u"], True), ["w", "u"], LSTM),  # of a packed sequence
        ("gru", ("x", "hx", ["w"]), ["w"], ("r", "z", "n")),
        ("rnn_tanh", ("x", "hx", ["w"]), ["w"], ()),
        ("rnn_relu", ("x", "hx", ["w"]), ["w"], ()),
        ("lstm", ("x", ("h", "c")), [], LSTM),
        ("lstm_cell", ("x", ["h", "c"], "w", "u", "b", "b"), ["w", "u"], LSTM),
        ("gru_cell", ("x", "h", "w", "u"), ["w", "u"], ("r", "z", "n")),
        ("rnn_tanh_cell", ("x", "h", "w", "u"), ["w", "u"], ()),
        ("rnn_relu_cell", ("x", "h", "w", "u"), ["w", "u"], ()),
    ],
)
def test_weights_of_recurrent_layers(name: str, args: tuple[Any, ...], values: list[str], gates: Any) -> None:
    found = contraction(name, args, {})
    assert [each.value for each in found] == values
    assert all((each.blocks, each.kind, each.ablatable) == (gates, "rnn_gates", False) for each in found)


def test_what_else_is_said_of_operands() -> None:
    packed, out, *separate = contraction(*ROLES["packed attention"][0])
    assert (packed.kind, packed.blocks, packed.ablatable) == ("attention_in", QKV, False)
    assert (out.kind, out.blocks, out.ablatable) == ("linear", (), True)
    assert [(each.kind, each.ablatable) for each in separate] == [("linear", False)] * 3
    for args, kwargs, groups in (
        (("x", "w"), {}, 1),
        (("x", "w", None, 1, 0, 1, 4), {}, 4),
        (("x", "w"), {"groups": 2}, 2),
        (("x", "w"), {"groups": "known later"}, 0),
    ):
        (conv,) = contraction("conv2d", args, kwargs)
        assert (conv.kind, conv.groups) == ("conv2d", groups)
    assert [each.kind for each in contraction("linear", ("x", "w"), {})] == ["linear"]
    assert [each.kind for each in contraction("_grouped_mm", ("x", "w"), {})] == ["stack"]
    for name in ("relu", "add", "embedding", "bilinear", ""):
        assert operands(name, ("x", "w"), {}) is None


@pytest.mark.parametrize(
    ("roles", "rank", "expected", "loosely"),
    [
        ("ni", 2, "ni", "ni"),
        ("ni", 3, None, None),
        ("ni", 1, None, "i"),  # not to be told: of a loose view, the last ones are known
        ("niii", 3, None, "iii"),
        ("*ni", 2, "ni", "ni"),
        ("*ni", 4, "bbni", "bbni"),
        ("*in", 1, "i", "i"),
        ("*ni", 1, "i", "i"),
        ("*i", 1, "i", "i"),
        ("*n", 1, "n", "n"),
        ("bin", 2, None, "in"),
    ],
)
def test_letters_for_dimensions(roles: str, rank: int, expected: str | None, loosely: str | None) -> None:
    operand = Operand(value=None, roles=roles)
    assert operand.roles_of(rank) == expected
    assert operand.roles_of(rank, loose=True) == loosely


def test_letters_of_contracted_axes() -> None:
    assert Operand(value=None, contracted=(-1, 0)).roles_of(4) == "inni"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("conv2d", "conv2d"),
        (torch.matmul, "matmul"),
        (torch.nn.functional.linear, "linear"),
        (operator.matmul, "matmul"),
        (operator.add, "add"),
        (Tensor.matmul, "matmul"),
        (Tensor.__matmul__, "__matmul__"),
        (Tensor.T.__get__, "T"),  # type: ignore[attr-defined]
        (torch.ops.aten.mm.default, "mm"),
        (torch.ops.aten.mm, "mm"),
        (max, ""),
        (str.join, ""),
        (object(), ""),
    ],
)
def test_plain_names(target: Any, name: str) -> None:
    assert name_of(target) == name


def test_a_users_function_has_no_name_that_could_be_mistaken() -> None:
    def linear(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    assert name_of(linear) == ""
    linear.__module__ = None  # type: ignore[assignment]
    assert name_of(linear) == ""
    linear.__module__ = "torchvision.ops"
    assert name_of(linear) == ""
