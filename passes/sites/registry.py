"""The module types whose weights are known without looking at a graph.

Owns the table from types to weight layouts; it must not know how the rest is discovered.

Rules:
    1. A type counts only while ``type(module).forward`` is the registered forward: a subclass with its own forward (a
       weight-standardising convolution, say) is looked at like any other module.
    2. Only parameters the module itself holds count, and those that a parametrisation or an old-style hook computes
       (:mod:`srigl_fx.passes.sites.parametrised_weights`).
    3. The packed in-projection of ``nn.MultiheadAttention`` is one weight with three blocks q, k and v; separate
       projections are three weights. None of them is ablated.
    4. A recurrent layer's or cell's weights have one block a gate. None of them is ablated: a neuron lives as long as
       one of its gates does.
    5. A stack of experts has one block an expert (:mod:`srigl_fx.passes.sites.expert_stacks`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from srigl_fx.masks.records import Block, Kind
from srigl_fx.passes.sites.contractions import GATES, PACKED
from srigl_fx.passes.sites.expert_stacks import experts
from srigl_fx.passes.sites.parametrised_weights import computed_names
from srigl_fx.passes.sites.weight_layout import Layout, equal_blocks


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the registry says of one parameter: its layout, or the reason it can only stay dense."""

    kind: Kind = "other"
    groups: int = 1
    blocks: tuple[Block, ...] = ()
    layout: Layout | None = None
    reason: str = ""

    def layout_of(self, parameter: Tensor) -> Layout:
        """The layout of this parameter: the one given, else what is usual for the kind."""
        return self.layout or Layout.usual(self.kind, parameter.shape, groups=self.groups, blocks=self.blocks)


_CONVS: dict[type[nn.Module], Kind] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}


def _has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and type(module).forward is kind.forward  # rule 1


def _attention(module: nn.MultiheadAttention) -> dict[str, Known]:
    found: dict[str, Known] = {}
    # Rule 3; ablated rows of q would need the same rows of k to go, head by head.
    if module.in_proj_weight is not None:
        blocks = equal_blocks(module.in_proj_weight.shape[0], PACKED, ablatable=False)
        found["in_proj_weight"] = Known(kind="attention_in", blocks=blocks)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = getattr(module, name)
        if weight is not None:
            found[name] = Known(kind="linear", blocks=equal_blocks(weight.shape[0], (), ablatable=False))
    for name in ("bias_k", "bias_v"):
        if getattr(module, name) is not None:
            found[name] = Known(reason="a bias of the attention, not a contraction weight")
    return found


_RECURRENT: dict[type[nn.Module], str] = {
    nn.RNN: "rnn_tanh",
    nn.LSTM: "lstm",
    nn.GRU: "gru",
    nn.RNNCell: "rnn_tanh",
    nn.LSTMCell: "lstm",
    nn.GRUCell: "gru",
}


def _recurrent(module: nn.Module, cell: str) -> dict[str, Known]:
    found: dict[str, Known] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 2:  # rule 4
            gates = () if name.startswith("weight_hr") else GATES[cell]  # an LSTM's projection has no gates
            blocks = equal_blocks(parameter.shape[0], gates, ablatable=False)
            found[name] = Known(kind="rnn_gates", blocks=blocks)
    return found


def _is_hugging_face_conv1d(module: nn.Module) -> bool:
    """By its name and shape, so that transformers need not be installed."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") and hasattr(module, "nf")


def _constant_reason(reason: str) -> Callable[[nn.Module], dict[str, Known]]:
    def known(module: nn.Module) -> dict[str, Known]:
        return {name: Known(reason=reason) for name, _ in module.named_parameters(recurse=False)}

    return known


_DENSE: dict[type[nn.Module], Callable[[nn.Module], dict[str, Known]]] = {
    nn.Embedding: _constant_reason("an embedding table is looked up, not multiplied"),
    nn.EmbeddingBag: _constant_reason("an embedding table is looked up, not multiplied"),
    nn.Bilinear: _constant_reason("a bilinear form contracts two inputs"),
    nn.LayerNorm: _constant_reason("a normalisation scale is not a contraction weight"),
}


def lookup(module: nn.Module) -> dict[str, Known] | None:
    """What is known of the parameters of ``module`` by its type, or None where its forward must be looked at.

    Example:
        >>> lookup(nn.Conv2d(4, 8, 3, groups=2))
        {'weight': Known(kind='conv2d', groups=2, blocks=(), layout=None, reason='')}
        >>> lookup(nn.Sequential()) is None
        True
    """
    found: dict[str, Known] | None = None
    if _has_forward_of(module, nn.Linear):
        found = {"weight": Known(kind="linear")}
    elif isinstance(module, nn.MultiheadAttention) and _has_forward_of(module, nn.MultiheadAttention):
        found = _attention(module)
    elif _is_hugging_face_conv1d(module):
        found = {"weight": Known(kind="linear_in_out")}
    elif (stack := experts(module)) is not None:  # rule 5
        found = {
            name: Known(reason=fact) if isinstance(fact, str) else Known(kind="stack", layout=fact)
            for name, fact in stack.items()
        }
    else:
        for cls, cell in _RECURRENT.items():
            if _has_forward_of(module, cls):
                found = _recurrent(module, cell)
        for cls, kind in _CONVS.items():
            if _has_forward_of(module, cls):
                found = {"weight": Known(kind=kind, groups=_groups(module))}
        for cls, describe in _DENSE.items():
            if _has_forward_of(module, cls):
                found = describe(module)
    if found is None:
        return None
    # Rule 2; a parameter that was deleted, or made a buffer, is none.
    held = {*dict(module.named_parameters(recurse=False)), *computed_names(module)}
    return {attr: known for attr, known in found.items() if attr in held}


def _groups(module: Any) -> int:
    return int(module.groups)
