"""Which operations multiply data with a weight, and what they do with each of its dimensions.

Owns the table of contractions; it must not know where operands come from. It serves graphs (functions, tensor methods,
ATen operators) and functions seen while a model runs alike: an operation goes by its plain name.

A dimension's role is one letter: ``n`` it appears in the output, ``i`` it is summed over with the data, ``b`` it is
matched with a dimension of the data and appears in the output (the batch of a batched product: one weight each).

In the words of einsum, with x for data, w for the weight and the letters of its dimensions behind it:

====================  =====================================  ==========================================
operation             what it computes                       roles of w
====================  =====================================  ==========================================
linear                ``...i,ni->...n``                      ``ni``
conv, 1d to 3d        a linear of every window               ``n`` and ``i`` for channels and kernel
transposed conv       each place adds a window               ``i``, ``n``, and ``i`` for the kernel
matmul and the like   ``*ni,*in->*nn``, either may be w      ``*ni`` on the left, ``*in`` on the right
inner                 ``ni,mi->nm``                          ``ni`` on both sides
einsum                as its equation says                   not in the output ``i``; else shared ``b``; else ``n``
tensordot             over the axes that are named           those ``i``, all others ``n``
grouped product       a matrix for each run of rows          ``bin``
====================  =====================================  ==========================================
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from srigl_fx.masks.records import Kind


@dataclass(frozen=True, kw_only=True)
class Operand:
    """An operand of a contraction that may be a weight.

    Attributes:
        value: The operand.
        roles: One letter for each of its dimensions; a leading ``*`` stands for any number of ``b``.
        contracted: In place of roles: the dimensions that are summed over, all others being ``n``.
        kind: The layout, if the operand is a parameter as it is.
        groups: Groups of a convolution.
        blocks: Row blocks, by name; they are of equal size.
        ablatable: Whether an all-zero row is a neuron that is gone.
        either: Whether the other operand could be the weight just as well.
    """

    value: Any
    roles: str = ""
    contracted: tuple[int, ...] = ()
    kind: Kind = "other"
    groups: int = 1
    blocks: tuple[str, ...] = ()
    ablatable: bool = True
    either: bool = False

    def roles_of(self, rank: int, *, loose: bool = False) -> str | None:
        """One letter for each of the ``rank`` (last, if ``loose``) dimensions; None where they do not fit.

        Example:
            >>> Operand(value="w", roles="*in").roles_of(4), Operand(value="w", roles="ni").roles_of(3)
            ('bbin', None)
        """
        if self.contracted:
            summed = {dim % rank for dim in self.contracted}
            return "".join("i" if dim in summed else "n" for dim in range(rank))
        roles = self.roles.removeprefix("*")
        if rank == 1 and self.roles in ("*in", "*ni"):  # a product with a vector, which torch sums over
            return "i"
        if rank < len(roles):  # a convolution of one sample, say; where leading ones are unknown, the last are told
            return roles[len(roles) - rank :] if loose else None
        if rank > len(roles) and not self.roles.startswith("*"):
            return None
        return "b" * (rank - len(roles)) + roles


_CONVS: dict[str, tuple[Kind, str]] = {
    "conv1d": ("conv1d", "nii"),
    "conv2d": ("conv2d", "niii"),
    "conv3d": ("conv3d", "niiii"),
    "conv_transpose1d": ("conv_transpose1d", "ini"),
    "conv_transpose2d": ("conv_transpose2d", "inii"),
    "conv_transpose3d": ("conv_transpose3d", "iniii"),
}
GATES = {
    "lstm": ("i", "f", "g", "o"),
    "gru": ("r", "z", "n"),
    "rnn_tanh": (),
    "rnn_relu": (),
}
PACKED = ("q", "k", "v")
LOOKUPS = frozenset({"embedding", "embedding_bag"})
OPAQUE = {
    "bilinear": "a bilinear form contracts two inputs",
    "multi_dot": "it stands in a chain of products",
    "chain_matmul": "it stands in a chain of products",
}


def name_of(target: Any) -> str:
    """The plain name of a function, tensor method or operator of torch; "" for anything else.

    Example:
        >>> [name_of(f) for f in (torch.nn.functional.linear, torch.ops.aten.mm.default, "matmul", len)]
        ['linear', 'mm', 'matmul', '']
    """
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target.__name__)
    name = getattr(target, "__name__", "")
    if name == "__get__":  # a property of tensors: .T, .mT
        return str(getattr(getattr(target, "__self__", None), "__name__", ""))
    home = getattr(target, "__module__", None) or ""
    own = home.partition(".")[0] in ("torch", "_operator", "operator")
    if own or getattr(target, "__objclass__", object) in torch.Tensor.__mro__[:-1]:
        return str(name)
    return ""


def operands(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Operand] | None:
    """The operands of the operation that may be weights, or None where it contracts nothing.

    Example:
        >>> [(o.value, o.roles) for o in operands("linear", ("x", "w"), {})]
        [('w', 'ni')]
    """
    reader = _READERS.get(name)
    return None if reader is None else reader(name, _Arguments(args, kwargs))


class _Arguments:
    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def __call__(self, position: int, *names: str, default: Any = None) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), default)


def _linear(name: str, at: _Arguments) -> list[Operand]:
    return [Operand(value=at(1, "weight"), roles="ni", kind="linear")]


def _conv(name: str, at: _Arguments) -> list[Operand]:
    kind, roles = _CONVS[name]
    groups = at(6, "groups", default=1)
    return [Operand(value=at(1, "weight"), roles=roles, kind=kind, groups=groups if isinstance(groups, int) else 0)]


def _product(first: int, left: str, right: str) -> Callable[[str, _Arguments], list[Operand]]:
    """A product of two matrices, or stacks of them, at two neighbouring positions."""

    def read(name: str, at: _Arguments) -> list[Operand]:
        return [
            Operand(value=at(first, "self", "input", "mat1", "batch1"), roles=left, either=True),
            Operand(value=at(first + 1, "other", "mat2", "vec", "batch2", "tensor2"), roles=right, either=True),
        ]

    return read


def _swapped(name: str, at: _Arguments) -> list[Operand]:
    return [
        Operand(value=at(0), roles="*in", either=True),
        Operand(value=at(1), roles="*ni", either=True),
    ]


def _einsum(name: str, at: _Arguments) -> list[Operand]:
    equation, *tensors = at.args
    if len(tensors) == 1 and isinstance(tensors[0], tuple | list):
        tensors = list(tensors[0])
    if not isinstance(equation, str) or len(tensors) < 2:
        return []
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:  # as torch has it: the letters that occur once, in alphabetical order
        letters = inputs.replace(",", "").replace(".", "")
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    found = []
    for position, (term, tensor) in enumerate(zip(terms, tensors, strict=False)):
        others = "".join(terms[:position] + terms[position + 1 :])
        letters = term.removeprefix("...")
        # Dots elsewhere than in front, or summed over, have no letters to go by.
        if "." in letters or (letters != term and "..." not in output):
            continue
        roles = "*" if letters != term else ""
        roles += "".join("i" if letter not in output else "b" if letter in others else "n" for letter in letters)
        found.append(Operand(value=tensor, roles=roles, kind="einsum", either=True))
    return found


def _tensordot(name: str, at: _Arguments) -> list[Operand]:
    first, second, dims = at(0, "a", "self"), at(1, "b", "other"), at(2, "dims", default=2)
    if isinstance(dims, int):
        return [
            Operand(value=first, contracted=tuple(range(-dims, 0)), kind="einsum", either=True),
            Operand(value=second, contracted=tuple(range(dims)), kind="einsum", either=True),
        ]
    if isinstance(dims, tuple | list) and len(dims) == 2 and all(isinstance(d, tuple | list) for d in dims):
        return [
            Operand(value=value, contracted=tuple(axes), kind="einsum", either=True)
            for value, axes in zip((first, second), dims, strict=True)
        ]
    return []


def _attention(name: str, at: _Arguments) -> list[Operand]:
    # By the positions in the signature of torch's multi_head_attention_forward.
    separate = [
        at.kwargs.get(f"{part}_proj_weight", at.args[18 + i] if len(at.args) > 18 + i else None)
        for i, part in enumerate(PACKED)
    ]
    return [
        Operand(value=at(5, "in_proj_weight"), roles="ni", kind="attention_in", blocks=PACKED, ablatable=False),
        Operand(value=at(11, "out_proj_weight"), roles="ni", kind="linear"),
        *(Operand(value=value, roles="ni", kind="linear", ablatable=False) for value in separate),
    ]


def _recurrent(name: str, at: _Arguments) -> list[Operand]:
    gates = GATES[name.removesuffix("_cell")] if not name.endswith("tanh_cell") else ()
    # A layer's weights are the last sequence: before them stands its state, which of an LSTM is one of two tensors.
    sequences = (a for a in reversed(at.args[2:]) if isinstance(a, list | tuple))
    weights = at.args[2:4] if name.endswith("_cell") else next(sequences, ())
    return [Operand(value=value, roles="ni", kind="rnn_gates", blocks=gates, ablatable=False) for value in weights]


def _grouped(name: str, at: _Arguments) -> list[Operand]:
    return [Operand(value=at(1, "mat_b", "weight", "mat2", "other"), roles="bin", kind="stack")]


_READERS: dict[str, Callable[[str, _Arguments], list[Operand]]] = {
    "linear": _linear,
    **dict.fromkeys(_CONVS, _conv),
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _product(0, "*ni", "*in")),
    "__rmatmul__": _swapped,
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), _product(1, "*ni", "*in")),
    "mv": _product(0, "ni", "i"),
    "addmv": _product(1, "ni", "i"),
    "inner": _product(0, "ni", "ni"),
    "einsum": _einsum,
    "tensordot": _tensordot,
    "multi_head_attention_forward": _attention,
    **dict.fromkeys((*GATES, *(f"{cell}_cell" for cell in GATES)), _recurrent),
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped),
}
