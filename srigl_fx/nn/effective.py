"""Weights that are transformed before they are used: the mask holds for what the contraction reads.

Owns the mask of the effective weight, in a module whose forward transforms a weight (weight standardisation, say) and
in a parametrisation; it must not know how either was recognised. The stored parameter is the mask-managed one, exactly
zero off its mask like any other; a transform of it need not be, so the effective weight is masked again right behind
the transform.

Two things need care. A neuron all of whose weights are zero has no direction to normalise: its effective weights are
its stored ones, zeros, and their gradient is that of the effective weights, so that it can be revived. And growth ranks
gradients off the mask, which a masked effective weight would not have: while the engine asks for dense gradients, the
forward computes the transform a second time in such a way that gradients off the mask arrive, and only those.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from srigl_fx.masks.records import MASK_SUFFIX, records_on
from srigl_fx.nn import regenerated, weight_norm
from srigl_fx.nn.sparse_module import SparseModule, make_sparse

_TRANSFORMS = "_srigl_fx_transforms"
_PROGRAMS = "_srigl_fx_programs"
_DENSE_GRADIENT = "_srigl_fx_dense_gradient"


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How the effective weight is masked.

    Attributes:
        elementwise: Whether each effective value depends on its own stored value alone.
        zero_dims: The dimensions over which a neuron's weights lie, where all-zero neurons are to be left as they are;
            empty where the transform of zeros needs no care.
        node: Of the forward's graph, the node whose value is the effective weight; "" in a parametrisation.
    """

    elementwise: bool
    zero_dims: tuple[int, ...] = ()
    node: str = ""


@dataclass(frozen=True, kw_only=True)
class Transform:
    """A weight that a module's forward transforms before it is used.

    Attributes:
        reader: FQN of the module whose forward it is: a ParametrizationList, or any other.
        path: The stored weight's name relative to it.
        evaluation: The masking in evaluation mode.
        training: The masking in training mode.
    """

    reader: str
    path: str
    evaluation: Masking
    training: Masking


def masked(
    weight: Tensor,
    mask: Tensor,
    transform: Callable[[Tensor], Tensor],
    masking: Masking,
    *,
    dense_gradient: bool = False,
) -> Tensor:
    """The effective weight: the transform of ``weight``, exactly zero off ``mask``.

    Args:
        weight: The stored weight, zero off the mask; any shape and floating dtype.
        mask: Bool tensor of its shape.
        transform: Gives a tensor of the same shape.
        masking: What is known of the transform.
        dense_gradient: Whether the gradient off the mask is that of the unmasked effective weight, too: by it weights
            are grown. On the mask, the gradient is the same either way.

    Source: growth by the gradient of inactive weights is that of RigL (Evci et al., 2020), section 3.

    Example:
        >>> weight, mask = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[True, False], [False, False]])
        >>> masked(weight, mask, lambda w: w - w.mean(1, keepdim=True), Masking(elementwise=False, zero_dims=(1,)))
        tensor([[1., 0.],
                [0., 0.]])
    """

    def safe(weight: Tensor) -> Tensor:
        return weight_norm.zeros_kept(weight, transform, masking.zero_dims) if masking.zero_dims else transform(weight)

    effective = safe(weight)
    if not dense_gradient:
        return torch.where(mask, effective, 0.0)
    # Zero in value off the mask, but with the gradient of the transform there.
    off = effective if masking.elementwise else safe(torch.where(mask, weight.detach(), weight))
    return torch.where(mask, effective, off - off.detach())


class EffectiveModule(SparseModule):
    """A module whose forward transforms a masked weight: it is regenerated, with the mask behind the transform."""

    @classmethod
    def _members(cls, base: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            program, weights = self._srigl_fx_programs[self.training]
            return program(self, *[effective(self) for effective in weights], *args, **kwargs)

        return {"forward": forward, "_srigl_fx_dense_forward": base.forward}

    def __reduce_ex__(self, protocol: Any) -> Any:
        blank, arguments, state = super().__reduce_ex__(protocol)
        return blank, arguments, {**state, _PROGRAMS: None}  # code is made anew, not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        _regenerate(cast(nn.Module, self))


def _regenerate(module: nn.Module) -> None:
    """Make the module's forward anew, for both modes."""
    transforms: tuple[Transform, ...] = vars(module)[_TRANSFORMS]
    programs: dict[bool, Any] = {}
    shown = ""
    for training in (False, True):
        graph = regenerated.trace(module, training=training, forward_name="_srigl_fx_dense_forward")
        if shown == (shown := str(graph)):
            programs[True] = programs[False]
            continue
        maskings = [transform.training if training else transform.evaluation for transform in transforms]
        program = regenerated.with_values(graph, tuple(masking.node for masking in maskings))
        weights = [
            _Effective(transform.path, regenerated.between(graph, transform.path, masking.node), masking)
            for transform, masking in zip(transforms, maskings, strict=True)
        ]
        programs[training] = program, weights
    vars(module)[_PROGRAMS] = programs


@dataclass(frozen=True)
class _Effective:
    """The effective weight of a module, in one mode."""

    path: str
    transform: Callable[[nn.Module, Tensor], Tensor]
    masking: Masking

    def __call__(self, module: nn.Module) -> Tensor:
        path, _, attr = self.path.rpartition(".")
        owner = module.get_submodule(path)
        return masked(
            getattr(owner, attr),
            getattr(owner, attr + MASK_SUFFIX),
            functools.partial(self.transform, module),
            self.masking,
            dense_gradient=getattr(owner, _DENSE_GRADIENT),
        )

    def unmasked(self, module: nn.Module) -> Tensor:
        """What the module's own forward would use."""
        return self.transform(module, module.get_parameter(self.path))


class EffectiveParametrizations(SparseModule):
    """A ParametrizationList that holds a masked original."""

    def forward(self) -> Tensor:
        """The effective weight."""
        parametrizations = cast(ParametrizationList, self)
        first: Any = parametrizations[0]
        if weight_norm.is_weight_norm(first):
            g, v = cast(Tensor, parametrizations.original0), cast(Tensor, parametrizations.original1)
            value = weight_norm.weight_norm(v, g, first.dim)
            return _chain(parametrizations, value, first=1)
        transforms: tuple[Transform, ...] = getattr(self, _TRANSFORMS, ())
        if not transforms:
            return _chain(parametrizations, parametrizations.original)
        return masked(
            parametrizations.original,
            cast(Tensor, parametrizations.original_mask),
            functools.partial(_chain, parametrizations),
            transforms[0].training if parametrizations.training else transforms[0].evaluation,
            dense_gradient=getattr(self, _DENSE_GRADIENT),
        )


def _chain(parametrizations: ParametrizationList, value: Tensor, first: int = 0) -> Tensor:
    for part in list(parametrizations)[first:]:
        value = weight_norm.whole_kept(value, part) if weight_norm.is_spectral_norm(part) else part(value)
    return value


def mixin_for(module: nn.Module) -> type[SparseModule]:
    """What a module that owns a masked weight is to be.

    Example:
        >>> mixin_for(nn.Linear(3, 2)).__name__
        'SparseModule'
    """
    return EffectiveParametrizations if isinstance(module, ParametrizationList) else SparseModule


def attach_transforms(reader: nn.Module, transforms: tuple[Transform, ...]) -> None:
    """Have the effective weights of these transforms masked; the stored weights must have their masks already.

    Raises:
        RegenerationError: The forward does more than its graph shows.
    """
    vars(reader)[_TRANSFORMS] = transforms
    if not isinstance(reader, ParametrizationList):
        make_sparse(reader, EffectiveModule)
        _regenerate(reader)
    for transform in transforms:
        vars(reader.get_submodule(transform.path.rpartition(".")[0]))[_DENSE_GRADIENT] = False


def want_dense_gradient(owner: nn.Module, wanted: bool) -> None:
    """Say whether gradients of the masked weights of ``owner`` are to arrive off the mask, too.

    Only weights that are transformed before they are used need to be told; of all others they always do.

    Example:
        >>> want_dense_gradient(nn.Linear(3, 2), True)
    """
    if _DENSE_GRADIENT in vars(owner):
        vars(owner)[_DENSE_GRADIENT] = wanted


@torch.no_grad()
def irreplaceable(module: nn.Module) -> Iterator[str]:
    """The masked weights, relative to ``module``, whose effective values its own forward would not compute from zeros.

    Example:
        >>> list(irreplaceable(nn.Linear(3, 2)))
        []
    """
    transforms: tuple[Transform, ...] = vars(module).get(_TRANSFORMS, ())
    yield from weight_norm.without_spectrum(module, set(records_on(module)))
    if isinstance(module, ParametrizationList):
        for transform in transforms:
            if not torch.equal(module(), _chain(module, module.original)):
                yield transform.path
    elif transforms:
        for effective in vars(module)[_PROGRAMS][False][1]:
            if not torch.equal(effective(module), effective.unmasked(module)):
                yield effective.path


def prepare_plain(module: nn.Module) -> None:
    """Write values with which the module's own forward gives what it gives now, before its masks are taken away.

    Example:
        >>> prepare_plain(nn.Linear(3, 2))
    """
    for name, record in records_on(module).items():
        if record.sparse:
            weight_norm.write_zero_magnitudes(module, name)
