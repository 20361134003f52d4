"""Whether a weight still lies where its mask expects it; if not, what took it away.

Owns the look at one module for a parameter, and the words for what torch's own transforms of weights do to it. It must
not know records or masks.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_CHAIN = "_srigl_fx_chain"


def parameter_on(owner: nn.Module, attr: str) -> nn.Parameter | None:
    """The parameter that a module itself holds under this name; None where it holds none, or computes it.

    Example:
        >>> parameter_on(nn.Linear(3, 2), "bias").shape, parameter_on(nn.Linear(3, 2), "wait")
        (torch.Size([2]), None)
    """
    held = owner._parameters
    return held[attr] if attr in held else None  # noqa: SIM401 - that of a ScriptModule has no get


def parameter_at(model: nn.Module, fqn: str) -> nn.Parameter | None:
    """The parameter of this fully-qualified name, where there is one; no property is asked.

    Example:
        >>> parameter_at(nn.Sequential(nn.Linear(3, 2)), "0.weight").shape
        torch.Size([2, 3])
    """
    *path, attr = fqn.split(".")
    module: nn.Module | None = model
    for name in path:
        if module is None or name not in module._modules:
            return None
        module = module._modules[name]
    return None if module is None else parameter_on(module, attr)


def why_missing(owner: nn.Module, attr: str) -> str:
    """Why a module that had a parameter of this name has none now, and what to do.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> del layer.weight
        >>> why_missing(layer, "weight")
        'it was deleted from its module, or has another name there now'
    """
    if parametrize.is_parametrized(owner, attr):
        lists: Any = owner.parametrizations
        how = ", leave_parametrized=False" if lists[attr].is_tensor else ""
        return _computed(
            f"the parametrisation {' after '.join(reversed(chain_of(lists[attr])))}",
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {attr!r}{how})",
        )
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm) and hook.name == attr:
            return _computed("torch.nn.utils.weight_norm", f"torch.nn.utils.remove_weight_norm(layer, {attr!r})")
        if isinstance(hook, SpectralNorm) and hook.name == attr:
            return _computed("torch.nn.utils.spectral_norm", f"torch.nn.utils.remove_spectral_norm(layer, {attr!r})")
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == attr:
            return _computed("torch.nn.utils.prune", f"torch.nn.utils.prune.remove(layer, {attr!r})")
    if isinstance(getattr(owner, attr, None), Tensor):
        return "it is a plain tensor now, which no optimizer trains: make it a torch.nn.Parameter again"
    return "it was deleted from its module, or has another name there now"


def _computed(by: str, remedy: str) -> str:
    return (
        f"{by} was put on it after sparsify and computes it from other tensors: take that off, {remedy}. What is there "
        "before sparsify is understood: to have both, finalize the model, put it on and sparsify again"
    )


def pruned_by_torch(module: nn.Module) -> dict[str, str]:
    """The weights that ``torch.nn.utils.prune`` computes on a module: the name of each, by that of the parameter.

    Example:
        >>> from torch.nn.utils import prune
        >>> pruned_by_torch(prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5))
        {'weight_orig': 'weight'}
    """
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, BasePruningMethod)]
    return {f"{hook._tensor_name}_orig": hook._tensor_name for hook in hooks}


def chain_of(parametrizations: nn.Module) -> tuple[str, ...]:
    """What computes a parametrised weight, first to last; empty for any other module.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        >>> chain_of(layer.parametrizations.weight)
        ('WeightNorm',)
    """
    if not isinstance(parametrizations, ParametrizationList):
        return ()
    return tuple(type(part).__name__.lstrip("_") for part in parametrizations)


def remember_chain(parametrizations: nn.Module) -> None:
    """Note what computes a parametrised weight as its mask is made.

    Example:
        >>> remember_chain(nn.Linear(3, 2))
    """
    if chain := chain_of(parametrizations):
        vars(parametrizations)[_CHAIN] = chain


def added_since(parametrizations: nn.Module) -> tuple[str, ...]:
    """What was registered on top of a parametrised weight after its mask was made.

    Example:
        >>> added_since(nn.Linear(3, 2))
        ()
    """
    chain = chain_of(parametrizations)
    return chain[len(vars(parametrizations).get(_CHAIN, chain)) :]
