"""Weight and spectral normalisation of a masked weight, in both forms torch has.

Owns what happens to ``g * v / ||v||`` where ``v``, the masked parameter, has a norm of zero, and to ``W / sigma(W)``
where all of ``W`` is zero. It must not know of any other transform. Under weight normalisation, off the mask ``v`` is
zero and so is the effective weight, and the gradient of ``v`` there is that of the effective weight times
``g / ||v||``: nothing else needs masking, and growth has its dense gradient.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from srigl_fx.nn.following import move_mask

_PARAMETRIZATION: type[nn.Module] = parametrizations._WeightNorm
_SPECTRAL: type[nn.Module] = parametrizations._SpectralNorm


def is_weight_norm(parametrization: nn.Module) -> bool:
    """Whether this is what :func:`torch.nn.utils.parametrizations.weight_norm` registers.

    Example:
        >>> is_weight_norm(nn.Identity())
        False
    """
    return type(parametrization) is _PARAMETRIZATION


def is_spectral_norm(parametrization: nn.Module) -> bool:
    """Whether this is what :func:`torch.nn.utils.parametrizations.spectral_norm` registers.

    Example:
        >>> is_spectral_norm(nn.Identity())
        False
    """
    return type(parametrization) is _SPECTRAL


def zeros_kept(weight: Tensor, transform: Callable[[Tensor], Tensor], dims: tuple[int, ...]) -> Tensor:
    """The transform of ``weight``, but where all values along ``dims`` are zero they stay as they are.

    Their gradient is that of what is returned, and finite: a neuron without weights can be revived.

    Args:
        weight: Any shape and floating dtype.
        transform: Gives a tensor of the same shape.
        dims: The dimensions over which a neuron's weights lie; all of them: the weight as a whole.

    Example:
        >>> zeros_kept(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), lambda w: w / w.norm(dim=1, keepdim=True), (1,))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    dead = weight.detach().abs().amax(dims, keepdim=True) == 0
    # Values that differ from each other, so that the transform is finite there, as is its gradient: it is multiplied
    # by zero, and zero times infinity would not be zero.
    filler = torch.arange(1, weight.numel() + 1, device=weight.device).to(torch.float32).sin()
    filled = torch.where(dead, filler.reshape(weight.shape).to(weight.dtype), weight)
    return torch.where(dead, weight, transform(filled))


def whole_kept(weight: Tensor, transform: Callable[[Tensor], Tensor]) -> Tensor:
    """The transform of ``weight``, but a weight that is zero everywhere stays as it is.

    Example:
        >>> whole_kept(torch.zeros(2), lambda w: w / w.norm())
        tensor([0., 0.])
    """
    return zeros_kept(weight, transform, tuple(range(weight.dim())))


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

    def remove(self, module: nn.Module) -> None:
        """As torch's; the mask of the direction becomes that of the weight, whose rows it scales."""
        super().remove(module)
        move_mask(module, f"{self.name}_v", module, self.name)


class GuardedSpectralNorm(SpectralNorm):
    """The hook of the old ``torch.nn.utils.spectral_norm``, for which a weight of zeros stays as it is."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        """The effective weight; the singular vectors, which the iteration writes, never become zero."""
        stored, u, v = (f"{self.name}_{part}" for part in ("orig", "u", "v"))

        def normalised(weight: Tensor) -> Tensor:
            view: Any = SimpleNamespace(**{stored: weight, u: getattr(module, u), v: getattr(module, v)})
            return SpectralNorm.compute_weight(self, view, do_power_iteration)

        return whole_kept(getattr(module, stored), normalised)

    def remove(self, module: nn.Module) -> None:
        """As torch's; the mask of the stored weight becomes that of the weight, which is a multiple of it."""
        super().remove(module)
        move_mask(module, f"{self.name}_orig", module, self.name)


def hooks_on(module: nn.Module) -> dict[str, WeightNorm]:
    """The old-style weight normalisations of a module, by the name of the direction.

    Example:
        >>> hooks_on(nn.Linear(3, 2))
        {}
    """
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, WeightNorm)]
    return {f"{hook.name}_v": hook for hook in hooks}


def spectral_hooks_on(module: nn.Module) -> list[SpectralNorm]:
    """The old-style spectral normalisations of a module.

    Example:
        >>> spectral_hooks_on(nn.Linear(3, 2))
        []
    """
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]


def without_spectrum(module: nn.Module, masked: set[str]) -> list[str]:
    """Those of the ``masked`` weights that are zero everywhere, and that torch would divide by their spectral norm.

    Example:
        >>> without_spectrum(nn.Linear(3, 2), {"weight"})
        []
    """
    names = {f"{hook.name}_orig" for hook in spectral_hooks_on(module)}
    if isinstance(module, ParametrizationList) and any(map(is_spectral_norm, module)):
        names = {"original", "original1"}
    return [name for name in sorted(names & masked) if not module.get_parameter(name).any()]


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
    for spectral in spectral_hooks_on(module):
        if f"{spectral.name}_orig" in masked:
            spectral.__class__ = GuardedSpectralNorm if wanted else SpectralNorm


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
