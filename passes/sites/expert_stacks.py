"""The weights of mixtures of experts that keep all experts in one parameter.

Owns the rule for the expert modules of Hugging Face transformers, known by what they carry rather than by their types,
so that transformers need not be installed. Stacks written by hand are found by their graphs like any other weight.

Rules:
    1. Such a module says how it stores its matrices: ``is_transposed`` for (expert, in, out) rather than (expert, out,
       in), ``has_gate`` for a projection that packs gate and up, ``is_concatenated`` for one after the other.
    2. Every expert is a block of rows; where gate and up are packed one after the other each is a block of its own.
"""

from torch import nn

from srigl_fx.passes.sites.weight_layout import Layout, equal_blocks

_SAYS = ("is_transposed", "has_gate", "is_concatenated")
_MATRICES = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")


def experts(module: nn.Module) -> dict[str, Layout | str] | None:
    """For each parameter of a module of experts its layout, or why it is no weight; None for any other module.

    Source: the ``use_experts_implementation`` interface of transformers 5.

    Example:
        >>> experts(nn.Linear(2, 2)) is None
        True
    """
    if not all(isinstance(getattr(module, name, None), bool) for name in _SAYS):
        return None
    if not hasattr(type(module).forward, "__wrapped__"):
        return None  # its forward is its own
    found: dict[str, Layout | str] = {}
    for name, parameter in module.named_parameters(recurse=False):
        if name in _MATRICES and parameter.dim() == 3:
            gated = name == "gate_up_proj" and bool(module.is_concatenated)
            found[name] = stack_layout(tuple(parameter.shape), transposed=bool(module.is_transposed), gated=gated)
        elif parameter.dim() >= 2 and name.endswith("_bias"):
            found[name] = "a bias of the experts, not a contraction weight"
    return found


def stack_layout(shape: tuple[int, ...], *, transposed: bool, gated: bool) -> Layout:
    """The layout of a stack (experts, out, in), or (experts, in, out) if transposed.

    Example:
        >>> [block.name for block in stack_layout((2, 6, 4), transposed=False, gated=True).blocks]
        ['0.gate', '0.up', '1.gate', '1.up']
    """
    outputs, inputs = (2, 1) if transposed else (1, 2)
    names = [f"{i}{half}" for i in range(shape[0]) for half in ((".gate", ".up") if gated else ("",))]
    return Layout(
        kind="stack",
        view=shape,
        neuron_axes=(0, outputs),
        input_axes=(inputs,),
        blocks=equal_blocks(shape[0] * shape[outputs], names),
    )
