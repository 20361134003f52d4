"""Batch norms with stored statistics, folded into the layers before them.

Owns :class:`FoldBatchNorm`. It must not know formats, kernels, or which rows of a mask are empty.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from srigl_fx.passes.base import Note, Pass, PassResult
from srigl_fx.passes.operators import operator_of
from srigl_fx.passes.program import MaskedTensor, Program, arguments, attribute_at, drop_unread, new_buffer, tensor_at

aten = torch.ops.aten

TUPLE_NORM = aten._native_batch_norm_legit_no_training.default
NORMS = frozenset({TUPLE_NORM, aten.batch_norm.default})
_LAYERS = frozenset({"linear", "convolution", "transposed convolution"})


class FoldBatchNorm(Pass[Program]):
    """Fold batch norms into the convolutions and linear layers whose outputs they normalise.

    With s = scale / sqrt(var + eps), a number for each row::

        s (W x + b - mean) + shift  =  (s W) x + ((b - mean) s + shift)

    1. A batch norm with stored statistics, directly after a convolution (1d to 3d, grouped, transposed) or a linear
       layer on (N, features), disappears: row o of the weight is scaled by s[o] = scale[o] / sqrt(var[o] + eps), and
       the bias becomes (bias[o] - mean[o]) s[o] + shift[o]. A missing bias or shift counts as 0, a missing scale as 1.
    2. Weight and bias are new buffers, computed in float64 and rounded once; the model's own parameters stay. Zeros of
       the weight stay zeros and the new weight keeps the mask of the old one, so a row without weights is left with its
       folded bias alone.
    3. Not folded, with a note: a layer whose output is used elsewhere too, a weight that other nodes read (two copies
       would be stored), weights or statistics that are computed from the input, a scale that is not finite, another
       dtype than the layer's, and a batch norm after anything else.
    """

    only_improves = True

    def run(self, subject: Program) -> PassResult[Program]:
        """Rewrite the graph in place."""
        module, notes, changed = subject.module, [], False
        readers = _readers(module)
        for node in [node for node in module.graph.nodes if node.target in NORMS]:
            given = arguments(node)
            if given.get("training"):
                continue
            reason = _refusal(module, node, given, readers)
            if reason:
                notes.append(Note(where=_origin(node), reason=f"batch norm not folded: {reason}"))
                continue
            _fold(subject, node, given)
            changed = True
        if changed:
            drop_unread(subject)
        return PassResult(subject=subject, changed=changed, notes=tuple(notes))


def _readers(module: fx.GraphModule) -> dict[int, set[fx.Node]]:
    """The nodes that read each tensor of the module, by the tensor's identity."""
    found: dict[int, set[fx.Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found.setdefault(id(attribute_at(module, str(node.target))), set()).update(node.users)
    return found


def _origin(node: fx.Node) -> str:
    """The module that a node comes from, or the node's own name."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else node.name


def _outputs(norm: fx.Node) -> Iterator[fx.Node]:
    """The nodes that hold the normalised tensor; all else that uses the batch norm has to stay."""
    if norm.target is not TUPLE_NORM:
        yield norm
        return
    yield from (user for user in norm.users if user.args[1] == 0)


def is_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a batch norm has stored statistics and parameters, and a finite map of each channel."""
    given = arguments(node)
    constants = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if given.get("training") or given["running_mean"] is None:
        return False
    if any(node is not None and node.op != "get_attr" for node in constants):
        return False
    return all(bool(part.isfinite().all()) for part in scale_and_shift(module, given))


def _refusal(
    module: fx.GraphModule, norm: fx.Node, given: dict[str, Any], readers: dict[int, set[fx.Node]]
) -> str | None:
    """Why ``norm`` cannot be folded, or None if it can."""
    layer = given["input"]  # rule 3, one condition after the other
    if operator_of(layer.target).family not in _LAYERS:
        return "it does not follow a convolution or linear layer"
    operands = arguments(layer)
    value = layer.meta.get("val")
    rank = 2 if layer.target is aten.linear.default else operands["weight"].meta["val"].dim()
    if not isinstance(value, Tensor) or value.dim() != rank:
        return f"its channels are not the features of {layer.name}"
    if len(layer.users) > 1 or (norm.target is TUPLE_NORM and len(list(_outputs(norm))) != len(norm.users)):
        return f"the output of {layer.name} is used elsewhere too"
    names = ("weight", "bias", "running_mean", "running_var")
    constants = [operands["weight"], operands["bias"], *(given[name] for name in names)]
    if any(node is not None and node.op != "get_attr" for node in constants):
        return "its parameters, or the layer's, are computed from the input"
    if given["running_mean"] is None:
        return "it has no stored statistics"
    tensors = [tensor_at(module, str(node.target)) for node in constants if node is not None]
    if len(readers.get(id(tensors[0]), ())) > 1:
        return f"the weight {operands['weight'].target} is read by other nodes too"
    if len({tensor.dtype for tensor in tensors}) > 1:
        return "its dtype is not the layer's"
    scale, shift = scale_and_shift(module, given)
    return None if bool(scale.isfinite().all() and shift.isfinite().all()) else "its scale is not finite"


def scale_and_shift(module: fx.GraphModule, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The affine map of each channel, in float64."""

    def read(name: str, default: float) -> Tensor:
        if given[name] is None:
            return torch.full_like(mean, default)
        return tensor_at(module, str(given[name].target)).detach().double()

    mean = tensor_at(module, str(given["running_mean"].target)).detach().double()
    scale = read("weight", 1.0) / (read("running_var", 1.0) + given["eps"]).sqrt()
    return scale, read("bias", 0.0) - mean * scale


def _fold(program: Program, norm: fx.Node, given: dict[str, Any]) -> None:
    module, layer = program.module, given["input"]
    operands = arguments(layer)
    target = str(operands["weight"].target)
    old = tensor_at(module, target).detach()
    scale, shift = scale_and_shift(module, given)
    weight = old.double()
    if (
        operator_of(layer.target).family == "transposed convolution"
    ):  # (in, out / groups, ...): the groups lie along the inputs
        groups = weight.view(operands["groups"], -1, *weight.shape[1:])
        rows = scale.view(operands["groups"], 1, -1, *[1] * (weight.dim() - 2))
        weight = (groups * rows).view(weight.shape)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift
    if operands["bias"] is not None:
        bias = bias + tensor_at(module, str(operands["bias"].target)).detach().double() * scale
    stem = target.rpartition(".")[0]
    with module.graph.inserting_before(layer):
        new_weight = new_buffer(module, target, weight.to(old.dtype))
        new_bias = new_buffer(module, f"{stem}.bias" if stem else "bias", bias.to(old.dtype))
    if target in program.masked:
        masked = program.masked[target]
        program.masked[str(new_weight.target)] = MaskedTensor(fqn=masked.fqn, mask=masked.mask)
    layer.args = (operands["input"], new_weight, new_bias, *layer.args[3:])
    layer.kwargs = {name: value for name, value in layer.kwargs.items() if name not in {"input", "weight", "bias"}}
    for output in list(_outputs(norm)):
        output.replace_all_uses_with(layer)
        module.graph.erase_node(output)
    if norm.target is TUPLE_NORM:
        module.graph.erase_node(norm)
