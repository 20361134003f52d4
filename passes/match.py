"""Which nodes of the captured graph a condensed operator can replace.

Owns :class:`MatchWeights`: from masked tensors to the nodes that contract with them. It must not know formats, kernels
or timings, nor how a tensor came to be masked.
"""

from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.errors import LoweringError
from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import Geometry, MatchedLayer, Program, Use, arguments, operands, tensor_at
from srigl_fx.runtime.format import padding_problem
from srigl_fx.runtime.row_lengths import masks_by_length

aten = torch.ops.aten

_CONVOLUTIONS = frozenset({"convolution", "transposed convolution", "any convolution"})
_FUSED = {
    "rnn_gates": "recurrent gates are part of one fused operator of torch ({}): they run dense",
    "stack": "a stack of experts is read as one tensor ({}): it runs dense",
}


class MatchWeights(Pass[Program]):
    """Make one :class:`~srigl_fx.passes.program.MatchedLayer` of every mask-managed weight.

    A use is a node that computes y[..., r] = sum over c of W[r, c] x[..., c] + b[r], for the (n, F) matrix view W of
    the weight and a mask of the same shape; for a convolution, x is the window behind one place of y.

    1. ``linear`` on a masked (out, in) matrix is a use that a condensed linear operator can replace.
    2. Convolutions over one to three axes on batches, grouped and transposed ones too, are uses that a condensed
       convolution can replace.
    3. The data must be float32 and depend on the inputs.
    4. Any other node that reads the weight is remembered by its operator; it keeps the dense tensor.
    5. A weight without a use that can be condensed stays dense, and its layer says why. So does an unstructured one
       whose rows would take as many bytes as it does dense, in up to four groups of like length, each padded to its
       longest row.
    6. A weight that the values' dtype cannot hold is an error.
    """

    def requires(self, subject: Program) -> None:
        """No layer is decided so far: of one that was rewritten, the graph has no node left that could be matched.

        Raises:
            LoweringError: A pass before has decided some; the message names them.
        """
        if done := [layer.weight.fqn for layer in subject.layers if layer.decision != "dense"]:
            raise LoweringError(
                f"layers are matched once, before it is decided what they become, and {', '.join(done)} are decided "
                "already: give passes one MatchWeights, in front of Condense; where they have no Condense, all of "
                "CONDENSING follows"
            )

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in ``subject.layers``."""
        readers: dict[str, list[fx.Node]] = {}
        for node in subject.module.graph.find_nodes(op="get_attr"):
            if masked := subject.masked.get(str(node.target)):
                readers.setdefault(masked.fqn, []).append(node)
        subject.layers = [
            MatchedLayer(weight=handle, value_dtype=subject.value_dtypes.get(handle.fqn, subject.value_dtype))
            for handle in sparse_weights(subject.model)
        ]
        for layer in subject.layers:
            _match(subject, layer, readers.get(layer.weight.fqn, []))
        notes = tuple(Note(where=layer.weight.fqn, reason=layer.reason) for layer in subject.layers if layer.reason)
        return PassResult(subject=subject, changed=bool(subject.layers), notes=notes)

    def ensures(self, subject: Program) -> None:
        """Each weight that was found can be stored in its layer's ``value_dtype``.

        Raises:
            LoweringError: A kept weight is finite, but not in that dtype.
        """
        for layer in subject.layers:
            dtype = layer.value_dtype
            # Scales take any finite weight.
            for use in layer.uses if dtype.is_floating_point else ():
                kept = use.weight[use.mask]
                # Rule 6; what is infinite without the cast is as the user trained it.
                if lost := kept[kept.isfinite() & ~kept.to(dtype).isfinite()].tolist():
                    raise LoweringError(
                        f"{layer.weight.fqn} {tuple(layer.weight.weight.shape)} holds {max(lost, key=abs):.5g}, and "
                        f"{dtype} nothing above {torch.finfo(dtype).max:.5g}: lower it "
                        "with value_dtype=torch.bfloat16 or torch.float32 (a batch norm may have been folded into it)"
                    )


def _match(program: Program, layer: MatchedLayer, readers: list[fx.Node]) -> None:
    refused: list[str] = []
    for reader in readers:  # a tied weight has several, and so has one that is read under a transposed name
        for user in reader.users:
            found = _use(program, user, reader, layer.weight.record.site.kind)
            if isinstance(found, Use):
                layer.uses.append(found)
            else:  # rule 4
                layer.others.append(_name(user))
                refused.append(found)
    # Rule 5.
    if not readers:
        layer.reason = program.folded.get(layer.weight.fqn, "not used by the captured graph")
    elif not layer.uses:
        layer.reason = refused[0] if refused else "read by nothing the captured graph computes"
    elif layer.weight.record.structure == "unstructured":
        layer.reason = next(filter(None, (_too_uneven(use, layer.value_dtype) for use in layer.uses)), "")
    if layer.reason:  # what could have been condensed reads the dense tensor after all
        layer.others += [_name(use.node) for use in layer.uses]
        layer.uses = []


def _too_uneven(use: Use, value_dtype: torch.dtype) -> str:
    """Rule 5, where rows of like length may be padded to a length of their own."""
    mask = use.mask.numpy()
    return padding_problem(mask, value_dtype.itemsize, masks_by_length(mask))


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _use(program: Program, user: fx.Node, operand: fx.Node, kind: str) -> Use | str:
    """``user`` as a use of the masked ``operand``, or why it is none."""
    target = str(operand.target)
    tensor, mask = tensor_at(program.module, target).detach(), program.masked[target].mask
    # Rules 1 and 2; the passes before have made ``linear`` of whatever products can be one.
    if operator_of(user.target).family not in _CONVOLUTIONS and user.target is not aten.linear.default:
        return _FUSED.get(kind, "read by {}, which has no condensed form").format(_name(user))
    x, weight, bias = operands(user)
    if weight is not operand or operand in (x, bias):  # rule 3: the masked tensor is the data
        return "also the data of the operator that reads it"
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype != torch.float32:  # rule 3: kernels take nothing else
        return "its input is not float32"
    if user.target is aten.linear.default:
        return Use(node=user, target=target, weight=tensor, mask=mask)
    if value.dim() != tensor.dim():  # rule 2: torch takes one sample without a batch axis too, the kernels do not
        return "its input has no batch dimension"
    geometry = _geometry(user, tuple(tensor.shape[2:]))
    if isinstance(geometry, str):
        return geometry
    return Use(
        node=user,
        target=target,
        weight=geometry.to_matrix(tensor),
        mask=geometry.to_matrix(mask),
        geometry=geometry,
    )


def _geometry(node: fx.Node, kernel: tuple[int, ...]) -> Geometry | str:
    """The settings of a convolution, or why they cannot be stated."""
    given = arguments(node)
    rank = len(kernel)
    settings = {name: given[name] for name in ("stride", "padding", "dilation", "groups")}
    settings["output_padding"] = given.get("output_padding", 0)
    # Kernels are compiled and indices computed for settings that are numbers.
    if any(isinstance(source, fx.Node) for value in settings.values() for source in _flat(value)):
        return "its settings are computed from the input"
    padding = settings["padding"]
    stride, dilation, more = (_numbers(settings[name], rank) for name in ("stride", "dilation", "output_padding"))
    extra = (0,) * rank
    if isinstance(padding, str):
        # "same" without a remainder: torch puts the odd zero on the far side.
        totals = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, kernel, strict=True)]
        padding, extra = tuple(total // 2 for total in totals), tuple(total % 2 for total in totals)
    transposed = given.get("transposed", "transpose" in str(node.target))
    return Geometry(
        kernel=kernel,
        stride=stride,
        padding=_numbers(padding, rank),
        dilation=dilation,
        groups=settings["groups"],
        transposed=transposed,
        output_padding=more if transposed else (),
        extra=extra,
    )


def _flat(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    """A setting for each axis: it may be stored as one number for all."""
    numbers = _flat(value)
    return tuple(numbers * count if len(numbers) == 1 else numbers)
