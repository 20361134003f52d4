"""The class swap: a module that owns mask-managed weights becomes an instance of a generated subclass of its class.

Owns the generated classes and what they add: a repr that shows the sparsity, projection of loaded weights, a word to
the trainer where parameters may have been exchanged, and pickling. A class that torch made for a parametrised module
stays the outermost one, as torch needs it to be. It must not know how masks are found or trained.
The forward is the base class's own, untouched: the stored weight is exactly zero off the mask, so there is nothing to
do there, except where a weight is transformed before it is used (:mod:`srigl_fx.nn.effective` adds to the class then).
"""

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from srigl_fx.errors import InvariantError
from srigl_fx.masks.attached import follow
from srigl_fx.masks.invariants import disagreements
from srigl_fx.masks.presence import remember_chain
from srigl_fx.masks.records import MASK_SUFFIX, WeightRecord, records_on, set_records, sparse_weights
from srigl_fx.masks.shards import local, part
from srigl_fx.nn import following, permuted, weight_norm

if TYPE_CHECKING:
    from srigl_fx.runtime.format import CondensedWeight

_CLASSES: "weakref.WeakKeyDictionary[type[nn.Module], dict[type[SparseModule], type[nn.Module]]]" = (
    weakref.WeakKeyDictionary()
)
_OWN = "_srigl_fx_"  # what our attributes begin with
_TORCHS = "_srigl_fx_torchs_class"  # the class that torch made for a parametrised module


class SparseModule:
    """What every module with a mask-managed weight can do; mixed in before the module's own class."""

    def extra_repr(self) -> str:
        """The base class's repr, then fan-in and active neurons of each masked weight."""
        module = cast(nn.Module, self)
        base = super().extra_repr()  # type: ignore[misc]
        parts = [describe(module, attr, record) for attr, record in records_on(module).items() if record.sparse]
        return ", ".join([base, *parts] if base else parts)

    def condense(self) -> "dict[str, CondensedWeight]":
        """The masked weights in condensed form, by parameter name, without biases.

        Raises:
            FormatError: A mask has no constant fan-in.

        Example:
            >>> import srigl_fx as sx
            >>> layer = sx.sparsify(nn.Sequential(nn.Linear(64, 8)), sparsity=0.75)[0]
            >>> layer.condense()["weight"].values.shape
            (8, 16)
        """
        from srigl_fx.runtime.format import CondensedWeight

        module = cast(nn.Module, self)
        found = {}
        for attr, record in records_on(module).items():
            if record.sparse:
                weight, mask = module.get_parameter(attr).detach(), module.get_buffer(attr + MASK_SUFFIX)
                found[attr] = CondensedWeight.from_dense(
                    record.site.to_matrix(weight).cpu().numpy(), record.site.to_matrix(mask).cpu().numpy()
                )
        return found

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        project_loaded(cast(nn.Module, self), state_dict, prefix, error_msgs)
        permuted.fit_loaded(cast(nn.Module, self), state_dict, prefix, error_msgs)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        follow(cast(nn.Module, self))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._apply(*args, **kwargs)  # type: ignore[misc]
        finally:
            follow(cast(nn.Module, self))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's; a parameter that was computed from a masked one until now gets the mask.

        Raises:
            InvariantError: ``torch.nn.utils.prune`` begins to prune a weight that has a mask.
        """
        module = cast(nn.Module, self)
        following.refuse_pruning(module, name, param)
        super().register_parameter(name, param)  # type: ignore[misc]
        following.take_over(module, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A generated class cannot be pickled by name: rebuild it from its base.
        state = cast(Any, self).__getstate__()
        # A weight computed before the forward (old weight_norm) is no leaf then, and torch copies none but leaves.
        state = {name: value.detach() if _is_computed(value) else value for name, value in state.items()}
        cls = cast(Any, type(self))
        return _blank, (dense_class(cls), cls._srigl_fx_mixin), state

    @classmethod
    def _members(cls, base: type[nn.Module]) -> dict[str, Any]:
        """What the class generated from ``base`` has besides."""
        return {}


def describe(module: nn.Module, attr: str, record: WeightRecord) -> str:
    """A few words on one masked weight, for a repr; of one on the meta device there is little to tell."""
    mask = getattr(module, attr + MASK_SUFFIX)
    name = "" if attr == "weight" else f"{attr} "
    if mask.is_meta:
        return f"{name}masked"
    counts = record.site.to_matrix(mask).sum(1)
    active = int((counts > 0).sum())
    shared = f", group_size={record.group_size}" if record.group_size > 1 else ""
    shared += f", block_width={record.block_width}" if record.block_width > 1 else ""
    return f"{name}fan_in={int(counts.max())}/{record.site.matrix_shape[1]}, active={active}/{len(counts)}{shared}"


def project_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
    """Make a state_dict fit ``module`` before it is loaded: masks that are missing stay, weights are masked.

    So a dense checkpoint loads into a sparse model, and stored weights are zero off the mask whatever the file held.
    What cannot be a mask, and a weight that is not zero off the mask that comes with it, is reported in ``errors``,
    from which torch makes its RuntimeError; that weight and its mask are left as they are.
    """
    for name, record in records_on(module).items():
        if not record.sparse:
            continue
        key = prefix + name
        own = module.get_buffer(name + MASK_SUFFIX)
        mask = state_dict.setdefault(key + MASK_SUFFIX, own)
        if not _can_be_mask(mask, own):
            found = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            errors.append(
                f"{key + MASK_SUFFIX} must be a bool tensor {tuple(own.shape)}, not {found}: masks come from a model "
                "that was sparsified as this one; to keep those it has, load srigl_fx.masks.strip(state_dict)"
            )
            state_dict[key + MASK_SUFFIX], state_dict[key] = own, module.get_parameter(name)
        elif mask is not own and (problems := list(disagreements(state_dict, {key: key}))):
            errors += problems
            state_dict[key + MASK_SUFFIX], state_dict[key] = own, module.get_parameter(name)
        elif isinstance(weight := state_dict.get(key), Tensor) and weight.shape == mask.shape:
            projected = weight.detach().clone()
            local(projected).masked_fill_(~part(mask.to(weight.device, torch.bool), weight), 0)
            state_dict[key] = nn.Parameter(projected) if isinstance(weight, nn.Parameter) else projected


def _is_computed(value: object) -> bool:
    return isinstance(value, Tensor) and value.grad_fn is not None


def sparse_class(base: type[nn.Module], mixin: type[SparseModule] = SparseModule) -> type[nn.Module]:
    """The mask-managed subclass of ``base``: one for each class and mixin, made on first use.

    It carries its base's ``__module__``, so that tracers which treat torch's own layers as leaves still do.

    Example:
        >>> sparse_class(nn.Linear).__name__, issubclass(sparse_class(nn.Linear), nn.Linear)
        ('SparseLinear', True)
    """
    classes = _CLASSES.setdefault(base, {})
    if mixin not in classes:
        namespace = {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "_srigl_fx_dense_class": base,
            "_srigl_fx_mixin": mixin,
            **mixin._members(base),
        }
        classes[mixin] = type(f"Sparse{base.__name__}", (mixin, base), namespace)
    return classes[mixin]


def dense_class(cls: type) -> type[nn.Module]:
    """The class that ``cls`` was made from by :func:`sparse_class`."""
    return cast("type[nn.Module]", cls._srigl_fx_dense_class)  # type: ignore[attr-defined]


def _blank(base: type[nn.Module], mixin: type[SparseModule] = SparseModule) -> nn.Module:
    cls = sparse_class(base, mixin)
    return cls.__new__(cls)


def attach_masks(
    module: nn.Module,
    masks: dict[str, Tensor],
    records: dict[str, WeightRecord],
    mixin: type[SparseModule] = SparseModule,
) -> None:
    """Give ``module`` its masks and records, by the weight's name relative to it, and swap its class.

    A GraphModule's class is its own, made anew with its code: it keeps a hook on loading instead.
    """
    for name, mask in masks.items():
        path, _, attr = name.rpartition(".")
        module.get_submodule(path).register_buffer(attr + MASK_SUFFIX, mask)
    set_records(module, records)
    if masks and isinstance(module, fx.GraphModule):
        module.register_load_state_dict_pre_hook(_project_hook)  # type: ignore[no-untyped-call]
    elif masks:
        make_sparse(module, mixin)
        remember_chain(module)
        weight_norm.guard(module, True, set(masks))


def attach_holder(holder: nn.Module, attr: str, parametrizations: nn.Module) -> None:
    """Have ``holder`` keep the mask of a parametrised weight when the parametrisation is removed."""
    make_sparse(holder)
    following.watch(holder, attr, parametrizations)


def check_loading(model: nn.Module) -> None:
    """Have the model look at a state_dict as a whole, before any of it is loaded."""
    model.register_load_state_dict_pre_hook(_check_hook)  # type: ignore[no-untyped-call]


def detach_masks(module: nn.Module) -> None:
    """Undo :func:`attach_masks`: the module's own class, no mask buffers, no records."""
    for name, record in records_on(module).items():
        if record.sparse:
            path, _, attr = name.rpartition(".")
            delattr(module.get_submodule(path), attr + MASK_SUFFIX)
    weight_norm.guard(module, False, set(records_on(module)))
    set_records(module, {})
    make_plain(module)


def make_sparse(module: nn.Module, mixin: type[SparseModule] = SparseModule) -> None:
    """Swap the module's class for its mask-managed subclass."""
    cls = _own_class(module)
    _set_own_class(module, sparse_class(dense_class(cls) if issubclass(cls, SparseModule) else cls, mixin))


def make_plain(module: nn.Module) -> None:
    """Give the module its own class back, without our attributes and hooks on loading."""
    cls = _own_class(module)
    if issubclass(cls, SparseModule):
        _set_own_class(module, dense_class(cls))
    for name in [name for name in vars(module) if name.startswith(_OWN)]:
        del vars(module)[name]
    for key, hook in list(module._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) in (_project_hook, _check_hook):
            del module._load_state_dict_pre_hooks[key]


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, below the one that torch makes for a parametrised module."""
    return parametrize.type_before_parametrizations(module)


def _set_own_class(module: nn.Module, cls: type[nn.Module]) -> None:
    if not parametrize.is_parametrized(module):
        module.__class__ = cls
        return
    # torch looks for the properties of parametrised weights on the class itself, and for the former class as its base.
    former = type(module)
    members = {key: value for key, value in vars(former).items() if key not in ("__dict__", "__weakref__", _TORCHS)}
    torchs = vars(former).get(_TORCHS, former)
    if torchs.__bases__ == (cls,) and vars(torchs).keys() - {"__dict__", "__weakref__"} == members.keys():
        module.__class__ = torchs
    else:
        module.__class__ = type(f"Parametrized{cls.__name__}", (cls,), {**members, _TORCHS: torchs})


def _project_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
    project_loaded(module, state_dict, prefix, more[-1])


def _check_hook(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    weights = {prefix + handle.fqn: handle for handle in sparse_weights(module)}
    masks = {key: state_dict.get(key + MASK_SUFFIX) for key in weights}
    if any(mask is not None and not _can_be_mask(mask, weights[key].mask) for key, mask in masks.items()):
        return  # all that is wrong is reported together
    for problem in disagreements(state_dict, {key: handle.fqn for key, handle in weights.items()}):
        raise InvariantError(problem)


def _can_be_mask(mask: object, own: Tensor) -> bool:
    return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == own.shape
