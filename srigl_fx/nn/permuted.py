"""Layers that read their inputs in another order: y = S P x.

Owns how a masked layer applies its matrix or its order, how the one becomes the other, and what becomes of them when a
state_dict is loaded or the masks are taken away. It must not know how an order is learned.

The layer's own forward stays: a hook in front of it exchanges its inputs. The hook is a function of this module, so
that copies and pickles of the layer have it, too, and ``torch.export`` sees what it does.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srigl_fx.masks.input_orders import MATRIX, ORDER, matrix_of, order_of, order_problem, ordered_layers
from srigl_fx.masks.records import MASK_SUFFIX, plain, records_on

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MIX = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def why_not(module: nn.Module) -> str:
    """Why a layer's inputs cannot be put in another order; "" where they can.

    Example:
        >>> why_not(nn.Conv1d(4, 4, 1, groups=2)), why_not(nn.Linear(3, 2))
        ('its groups of channels read inputs of their own', '')
    """
    if not isinstance(module, _KINDS):
        kind = getattr(type(module), "_srigl_fx_dense_class", type(module)).__name__
        return f"it is no linear layer or convolution, but {kind}"
    if "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if getattr(module, "groups", 1) != 1:
        return "its groups of channels read inputs of their own"
    if module.get_parameter("weight").shape[1] < 2:
        return "it has one input"
    return ""


def _permute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of the layer's forward, the inputs in the layer's order."""
    x, rest = (args[0], args[1:]) if args else (kwargs["input"], ())
    others = {name: value for name, value in kwargs.items() if name != "input"} if not args else kwargs
    spatial = module.get_parameter("weight").dim() - 2
    if (matrix := module._parameters.get(MATRIX)) is not None:
        x = _MIX[spatial](x, matrix.reshape(*matrix.shape, *[1] * spatial))
    elif (order := module._buffers.get(ORDER)) is not None:
        x = x.index_select(x.dim() - 1 - spatial, order)
    return (x, *rest), others


def soften(module: nn.Module, matrix: Tensor) -> nn.Parameter:
    """Have a layer read mixtures of its inputs: input j becomes the sum over i of ``matrix[j, i]`` times input i.

    Args:
        module: A masked layer for which :func:`why_not` has no reason.
        matrix: (d, d), of the weight's dtype and on its device.

    Returns:
        The parameter that the layer has for it.

    Example:
        >>> import srigl_fx as sx
        >>> layer = sx.sparsify(nn.Sequential(nn.Linear(64, 8)), sparsity=0.5)[0]
        >>> soften(layer, torch.eye(64)).shape, [name for name, _ in layer.named_parameters()]
        (torch.Size([64, 64]), ['weight', 'bias', 'weight_permutation'])
    """
    parameter = nn.Parameter(matrix)
    module.register_parameter(MATRIX, parameter)
    _hook(module)
    return parameter


@torch.no_grad()
def settle(module: nn.Module, order: Tensor) -> None:
    """Have a layer read its inputs in this order from now on; a matrix that it had is emptied, and is its own no more.

    Args:
        module: A masked layer for which :func:`why_not` has no reason.
        order: (d,) int64, each input once.

    Example:
        >>> import srigl_fx as sx
        >>> layer = sx.sparsify(nn.Sequential(nn.Linear(64, 8)), sparsity=0.5)[0]
        >>> before, x = layer(torch.arange(64.0)), torch.arange(64.0).flip(0)
        >>> settle(layer, torch.arange(63, -1, -1))
        >>> torch.equal(layer(x), before)
        True
    """
    if (matrix := module._parameters.get(MATRIX)) is not None:
        delattr(module, MATRIX)
        # An optimizer goes on holding it, at its place in its group, so that its saved state keeps its form.
        matrix.requires_grad_(False)
        matrix.grad = None
        matrix.data = matrix.data.new_empty(0)
    module.register_buffer(ORDER, order.to(module.get_parameter("weight").device, torch.int64, copy=True))
    _hook(module)


def fit_loaded(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, errors: list[str]) -> None:
    """Make a layer fit the order that a state_dict has for it: one that is decided there is decided here.

    What cannot be loaded is reported in ``errors``, from which torch makes its RuntimeError.
    """
    order = state_dict.get(prefix + ORDER)
    if order is not None and not (reason := why_not(module)):
        if problem := order_problem(order, module.get_parameter("weight").shape[1]):
            errors.append(f"{prefix}{ORDER}: {problem}")
        elif order_of(module) is None and records_on(module):
            settle(module, order)
    elif order is not None and records_on(module) and prefix + "weight" + MASK_SUFFIX in state_dict:
        errors.append(f"{prefix}{ORDER}: this layer's inputs have no order of their own: {reason}")
    elif state_dict.get(prefix + MATRIX) is not None and order_of(module) is not None:
        errors.append(
            f"{prefix}{MATRIX}: the order of this layer's inputs is decided here, and still learned there: load "
            "into a model that was built anew"
        )


def as_saved(live: "OrderedDict[str, Any]", saved: Mapping[str, Any], model: nn.Module) -> "OrderedDict[str, Any]":
    """What ``live``, the state_dict of ``model``, has once orders that are decided in ``saved`` are decided here, too.

    Args:
        live: The model's state_dict, by its own names.
        saved: Another one, by the names of the unwrapped model.
        model: The model.

    Example:
        >>> dict(as_saved(OrderedDict(a=1), {"a": 1}, nn.Linear(3, 2)))
        {'a': 1}
    """
    fitted = OrderedDict(live)
    if hasattr(live, "_metadata"):
        fitted._metadata = live._metadata  # type: ignore[attr-defined]
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        order = saved.get(plain(prefix + ORDER))
        if order is None or not records_on(module) or why_not(module) or prefix + ORDER in live:
            continue
        if not order_problem(order, module.get_parameter("weight").shape[1]):
            fitted.pop(prefix + MATRIX, None)
            fitted[prefix + ORDER] = order
    return fitted


@torch.no_grad()
def fold_orders(model: nn.Module) -> None:
    """Write the orders of a model's layers into their weights, which compute the same without them from then on.

    The masks are left as they are, and so do not fit the weights any more.

    Example:
        >>> fold_orders(nn.Linear(3, 2))
    """
    for module in ordered_layers(model).values():
        weight, order = module.get_parameter("weight"), order_of(module)
        assert order is not None
        weight.copy_(weight.index_select(1, order.argsort()))
        delattr(module, ORDER)
        remove_hook(module)


def _hook(module: nn.Module) -> None:
    if _permute not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_permute, with_kwargs=True)


def remove_hook(module: nn.Module) -> None:
    """Have a layer read its inputs as they come.

    Example:
        >>> remove_hook(nn.Linear(3, 2))
    """
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _permute]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def drop(module: nn.Module) -> None:
    """Take a matrix that is still learned away from a layer, which reads its inputs as they come again.

    Example:
        >>> drop(nn.Linear(3, 2))
    """
    if matrix_of(module) is not None:
        delattr(module, MATRIX)
        remove_hook(module)
