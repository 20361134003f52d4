"""Which rule carries labels through which operator.

Owns the table of rules, by the families of :mod:`srigl_fx.passes.operators`. It must not know what a rule does.
"""

import operator
from typing import Any

from torch import fx

from srigl_fx.passes.channels import propagate_contractions as contractions
from srigl_fx.passes.channels import propagate_elements as elements
from srigl_fx.passes.channels.propagate import Propagation, Rule
from srigl_fx.passes.operators import operator_of

RULES: dict[str, Rule] = {
    # -- by channel, copies, creates, measures
    "prelu": elements.prelu,
    **dict.fromkeys(("copy", "same", "cast", "dropout"), elements.copied),
    **dict.fromkeys(("like", "filled"), elements.made_alike),
    **dict.fromkeys(("new", "constant", "size"), elements.made),
    # -- moves, pads
    **dict.fromkeys(
        ("reshape", "one", "axes", "expand", "repeat", "part", "split", "order", "shuffle", "window", "put"),
        elements.moved,
    ),
    **dict.fromkeys(("diagonal", "grid"), elements.moved),
    "join": elements.joined,
    "pick": elements.picked,
    "patches": elements.windows,
    "pad": elements.added_around,
    # -- pools, along, reduces, normalises
    **dict.fromkeys(("pool", "resize", "sample"), elements.over_last_axes),
    **dict.fromkeys(("softmax", "scan", "sort"), elements.along_axis),
    "gate": elements.gated,
    **dict.fromkeys(("sum", "spread", "other"), elements.reduced),
    "layer norm": elements.layer_norm,
    "rms norm": elements.rms_norm,
    "group norm": elements.group_norm,
    **dict.fromkeys(("instance norm", "batch norm"), elements.norm_by_channel),
    # -- multiplies, looks up
    "linear": contractions.linear,
    **dict.fromkeys(("convolution", "transposed convolution"), contractions.convolution),
    "product": contractions.product,
    "sum of products": contractions.sum_of_products,
    "einsum": contractions.einsum,
    "attention": contractions.attention,
    "lookup": contractions.lookup,
}
"""The rule of each family; of those that are pointwise it is one for all."""

KEEPS_ALL: frozenset[str] = frozenset({"quantize", "fold", "matrix", "any convolution", "vector product", "assertion"})
"""Families without a rule: all that they read and make stays."""


def rule_of(target: object) -> Rule | None:
    """The rule of an operator; None where there is none.

    Example:
        >>> import torch
        >>> rule_of(torch.ops.aten.swapaxes.default).__name__, rule_of(torch.ops.aten.col2im.default)
        ('moved', None)
    """
    if target is operator.getitem:
        return _item
    row = operator_of(target)
    return elements.element_by_element if row.does == "pointwise" else RULES.get(row.family)


def _item(propagation: Propagation, node: fx.Node) -> Any:
    """One of several values, which have labels each."""
    source, index = node.args
    found = propagation.labels(source) if isinstance(source, fx.Node) else None
    return found[index] if isinstance(found, list | tuple) and isinstance(index, int) else None
