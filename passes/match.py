"""Which nodes of the captured graph a condensed operator can replace.

Owns :class:`MatchWeights`: from masked tensors to the nodes that contract with them. It must not know formats, kernels
or timings, nor how a tensor came to be masked.
"""

from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.masks.records import sparse_weights
from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.program import Layer, Program, Use, operands, tensor_at

aten = torch.ops.aten

_CONVOLUTIONS: dict[Any, tuple[Any, int]] = {aten.conv1d.default: ("conv1d", 3), aten.conv2d.default: ("conv2d", 4)}
_WORDS = {
    "conv3d": "3-D convolutions",
    "conv_transpose1d": "transposed convolutions",
    "conv_transpose2d": "transposed convolutions",
    "conv_transpose3d": "transposed convolutions",
    "rnn_gates": "recurrent gates",
    "stack": "stacks of experts",
    "einsum": "weights of an einsum",
}


class MatchWeights(Pass[Program]):
    """Make one :class:`~srigl_fx.passes.program.Layer` of every mask-managed weight.

    1. ``linear`` on a masked (out, in) matrix is a use that a condensed linear operator can replace.
    2. ``conv2d`` and ``conv1d`` on batches are uses that a condensed convolution can replace.
    3. The data must be float32 and depend on the inputs.
    4. Any other node that reads the weight is remembered by its operator; it keeps the dense tensor.
    5. A weight without a use that can be condensed stays dense, and its layer says why.
    """

    def run(self, subject: Program) -> PassResult[Program]:
        """Fill in ``subject.layers``."""
        readers: dict[str, list[fx.Node]] = {}
        for node in subject.module.graph.find_nodes(op="get_attr"):
            if masked := subject.masked.get(str(node.target)):
                readers.setdefault(masked.fqn, []).append(node)
        subject.layers = [Layer(weight=handle) for handle in sparse_weights(subject.model)]
        for layer in subject.layers:
            _match(subject, layer, readers.get(layer.weight.fqn, []))
        notes = tuple(Note(where=layer.weight.fqn, reason=layer.reason) for layer in subject.layers if layer.reason)
        return PassResult(subject=subject, changed=False, notes=notes)


def _match(program: Program, layer: Layer, readers: list[fx.Node]) -> None:
    refused: list[str] = []
    for reader in readers:
        for user in reader.users:
            found = _use(program, user, reader, layer.weight.record.site.kind)
            if isinstance(found, Use):
                layer.uses.append(found)
            else:
                layer.others.append(_name(user))
                refused.append(found)
    if not readers:
        layer.reason = program.folded.get(layer.weight.fqn, "not used by the captured graph")
    elif layer.weight.record.structure == "unstructured":
        layer.reason = "unstructured masks have no condensed form"
    elif not layer.uses:
        layer.reason = refused[0] if refused else "read by nothing the captured graph computes"
    if layer.reason:
        layer.others += [_name(use.node) for use in layer.uses]
        layer.uses = []


def _no_operator(kind: str) -> str:
    return f"{_WORDS.get(kind, 'such weights')} have no condensed operator yet"


def _name(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _use(program: Program, user: fx.Node, operand: fx.Node, kind: str) -> Use | str:
    """``user`` as a use of the masked ``operand``, or why it is none."""
    target = str(operand.target)
    tensor, mask = tensor_at(program.module, target).detach(), program.masked[target].mask
    form: Any = "linear"
    dimensions = 0
    if user.target in _CONVOLUTIONS:
        form, dimensions = _CONVOLUTIONS[user.target]
    elif user.target in {aten.conv1d.padding, aten.conv2d.padding}:
        return "an even kernel with padding 'same' pads unevenly; give the padding in numbers"
    elif user.target is not aten.linear.default:
        known = kind in ("linear", "linear_in_out", "attention_in", "conv1d", "conv2d")
        return f"read by {_name(user)}, which has no condensed form" if known else _no_operator(kind)
    x, weight, bias = operands(user)
    if weight is not operand or operand in (x, bias):
        return "also the data of the operator that reads it"
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return "its input is not float32"
    if dimensions and value.dim() != dimensions:
        return "its input has no batch dimension"
    rows = mask.shape[0]
    return Use(
        node=user,
        target=target,
        form=form,
        weight=tensor.reshape(rows, -1),
        mask=mask.reshape(rows, -1),
        kernel=tuple(mask.shape[2:]) if form != "linear" else (),
    )
