"""Weight normalisation of a masked weight, in both forms torch has.

Owns what happens to ``g * v / ||v||`` where ``v``, the masked parameter, has a norm of zero. It must not know of any
other transform. Off the mask ``v`` is zero and so is the effective weight, and the gradient of ``v`` there is that of
the effective weight times ``g / ||v||``: nothing else needs masking, and growth has its dense gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

_PARAMETRIZATION: type[nn.Module] = parametrizations._WeightNorm


def is_weight_norm(parametrization: nn.Module) -> bool:
    """Whether this is what :func:`torch.nn.utils.parametrizations.weight_norm` registers.

    Example:
        >>> is_weight_norm(nn.Identity())
        False
    """
    return type(parametrization) is _PARAMETRIZATION


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """``g * v / ||v||``, where a norm of zero counts as 1.

    There the value is 0, and the gradient of ``v`` is finite: a neuron without weights can be revived.

    Args:
        v: The direction, any shape and floating dtype.
        g: The magnitudes: of ``v``'s shape, but 1 in all dimensions other than ``dim``.
        dim: The dimension kept by the norm; -1: the norm is that of all values.

    Source: weight normalisation is that of Salimans and Kingma (2016), equation 2.

    Example:
        >>> weight_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[10.0], [10.0]]), 0)
        tensor([[6., 8.],
                [0., 0.]])
    """
    dead = _dead(v, dim)
    filled = torch.where(dead, 1.0, v)
    return torch.where(dead, g * v, torch._weight_norm(filled, g, dim))


def _dead(v: Tensor, dim: int) -> Tensor:
    """Where the norm is zero; broadcasts to ``v``."""
    dims = [other for other in range(v.dim()) if dim == -1 or other != dim]
    return v.detach().abs().amax(dims, keepdim=True) == 0


class GuardedWeightNorm(WeightNorm):
    """The hook of the old ``torch.nn.utils.weight_norm``, with :func:`weight_norm` for its arithmetic."""

    def compute_weight(self, module: nn.Module) -> Tensor:
        """The effective weight."""
        return weight_norm(getattr(module, self.name + "_v"), getattr(module, self.name + "_g"), self.dim)


def hooks_on(module: nn.Module) -> dict[str, WeightNorm]:
    """The old-style weight normalisations of a module, by the name of the direction.

    Example:
        >>> hooks_on(nn.Linear(3, 2))
        {}
    """
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    return {f"{hook.name}_v": hook for hook in hooks}


def guard(module: nn.Module, wanted: bool, masked: set[str]) -> None:
    """Swap the classes of the old-style hooks whose directions are ``masked``, or swap them back.

    Example:
        >>> guard(nn.Linear(3, 2), True, {"weight_v"})
    """
    for name, hook in hooks_on(module).items():
        if name in masked:
            hook.__class__ = GuardedWeightNorm if wanted else WeightNorm
            with torch.no_grad():
                hook(module, None)  # what the module shows as its weight is up to date


@torch.no_grad()
def write_zero_magnitudes(module: nn.Module, name: str) -> None:
    """Give directions without a norm one, and a magnitude of zero, so that torch's own arithmetic yields zeros there.

    Example:
        >>> write_zero_magnitudes(nn.Linear(3, 2), "weight")
    """
    if name in (hooks := hooks_on(module)):
        hook = hooks[name]
        v, g, dim = getattr(module, name), getattr(module, hook.name + "_g"), hook.dim
    elif isinstance(module, ParametrizationList) and is_weight_norm(module[0]):
        parametrization: Any = module[0]
        v, g, dim = module.original1, module.original0, parametrization.dim
    else:
        return
    dead = _dead(v, dim)
    v.masked_fill_(dead, 1.0)
    g.masked_fill_(dead.reshape(g.shape), 0.0)
