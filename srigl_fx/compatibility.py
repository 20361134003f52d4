"""Which releases of PyTorch the library was tested with, and the names in PyTorch that it uses without a promise.

Owns the range, the list of private names that have no public counterpart, and what is said where a release outside the
range lacks one. It must not know who uses them. ``tests/test_private_names.py`` tries each of them, and finds those
that are not listed here.
"""

import functools
import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from srigl_fx.errors import VersionError

OLDEST, NEWEST = (2, 13), (2, 14)
"""The oldest and the newest minor release of PyTorch that were tried; docs/versions.md says with which tests."""

PRIVATE: dict[str, tuple[str, ...]] = {
    "torch": ("_weight_norm",),
    "torch._C": ("_get_tracing_state", "_len_torch_dispatch_stack", "_len_torch_function_stack", "_storage_Use_Count"),
    "torch._C._autograd": ("_profiler_enabled",),
    "torch._C._functorch": ("peek_interpreter_stack",),
    "torch._dispatch.python": ("enable_python_dispatcher",),
    "torch._ops": ("OpOverload", "OpOverloadPacket"),
    "torch._decomp": ("decomposition_table",),
    "torch._subclasses": ("FakeTensor", "FakeTensorMode"),
    "torch.autograd.forward_ad": ("_current_level",),
    "torch.fx.graph": ("_PyTreeCodeGen", "_PyTreeInfo"),
    "torch.nn.modules.batchnorm": ("_NormBase",),
    "torch.nn.utils.parametrizations": ("_SpectralNorm", "_WeightNorm"),
    "torch.utils._python_dispatch": ("TorchDispatchMode",),
    "torch.utils._pytree": (
        *("TreeSpec", "tree_flatten", "tree_flatten_with_path", "tree_leaves", "tree_map", "tree_map_only"),
        *("tree_structure", "tree_unflatten"),
    ),
    "a graph": ("_codegen",),
    "a module": (
        *("_buffers", "_forward_hooks", "_forward_pre_hooks", "_load_from_state_dict", "_load_state_dict_pre_hooks"),
        *("_forward_pre_hooks_with_kwargs", "_modules", "_non_persistent_buffers_set", "_parameters"),
    ),
    "a module's state_dict": ("_metadata",),
    "a pruning hook": ("_tensor_name",),
    "a storage": ("_cdata",),
    "a tensor": ("_backward_hooks", "_indices", "_post_accumulate_grad_hooks", "_values", "_version"),
    "an operator": ("_dispatch_cache", "_schema"),
    "an optimizer": ("_optimizer_step_post_hooks",),
    "torch.ops.aten": (
        *("_assert_async", "_assert_scalar", "_assert_tensor_metadata", "_native_batch_norm_legit_functional"),
        *("_native_batch_norm_legit_no_training", "_softmax", "_to_copy", "_unsafe_view"),
    ),
}
"""Names by where they are: a module, or an object of a public class."""

LATE: dict[str, tuple[str, ...]] = {
    "torch.distributed.tensor._utils": ("compute_local_shape_and_global_offset",),
    "a captured module": ("_in_spec", "_out_spec"),
}
"""Likewise, where looking would need several processes or a capture: an error there says so when it is used."""

P = ParamSpec("P")
R = TypeVar("R")


def untested(version: str) -> bool:
    """Whether no release of PyTorch with this minor version was tested.

    Example:
        >>> untested("2.14.7+cpu"), untested("3.0.0.dev1")
        (False, True)
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and not OLDEST <= (int(found[1]), int(found[2])) <= NEWEST


def known_good() -> str:
    """What to say of a release outside the range.

    Example:
        >>> known_good()
        "srigl_fx is known to work with PyTorch 2.13 to 2.14: pip install 'torch>=2.13,<2.15'"
    """
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    after = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    return f"srigl_fx is known to work with PyTorch {oldest} to {newest}: pip install 'torch>={oldest},<{after}'"


def missing() -> list[str]:
    """The private names that the installed PyTorch lacks.

    Example:
        >>> missing()
        []
    """
    lacking = []
    for where, names in PRIVATE.items():
        try:
            found = holder(where)
        except Exception:  # whatever a foreign release may raise
            lacking.append(where)
            continue
        lacking += [f"{where}: {name}" for name in names if not hasattr(found, name)]
    return lacking


def holder(where: str) -> Any:
    """The module or object that has the names which :data:`PRIVATE` lists there.

    Example:
        >>> holder("torch._ops").__name__
        'torch._ops'
    """
    import torch

    makers: dict[str, Callable[[], Any]] = {
        "a graph": torch.fx.Graph,
        "a module": torch.nn.Module,
        "a module's state_dict": lambda: torch.nn.Module().state_dict(),
        "a pruning hook": _pruning_hook,
        "a storage": lambda: torch.zeros(1).untyped_storage(),
        "a tensor": lambda: torch.zeros(1),
        "an operator": lambda: torch.ops.aten.add.Tensor,
        "an optimizer": lambda: torch.optim.SGD([torch.zeros(1)]),
        "torch.ops.aten": lambda: torch.ops.aten,
    }
    return makers[where]() if where in makers else importlib.import_module(where)


def _pruning_hook() -> Any:
    """What ``torch.nn.utils.prune`` leaves on a module."""
    from torch.nn import Linear
    from torch.nn.utils import prune

    pruned: Any = prune.identity(Linear(1, 1), "weight")  # type: ignore[no-untyped-call]
    return next(iter(pruned._forward_pre_hooks.values()))


def check_torch() -> None:
    """Look for what the library needs in a PyTorch that it was not tested with; in any other, look for nothing.

    Raises:
        VersionError: A private name is missing.

    Example:
        >>> check_torch()
    """
    version = _installed()
    if not untested(version):
        return
    if lacking := missing():
        raise VersionError(f"PyTorch {version} lacks what srigl_fx needs ({', '.join(lacking[:3])}). {known_good()}")


def noted(call: Callable[P, R]) -> Callable[P, R]:
    """``call``, whose unexpected errors carry a note where the installed PyTorch is one that was not tested.

    Example:
        >>> noted(len)([1, 2])
        2
    """
    version = _installed()
    if not untested(version):
        return call

    @functools.wraps(call)
    def with_note(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            error.add_note(f"PyTorch {version} was not tested. {known_good()}")
            raise

    return with_note


def _installed() -> str:
    """The version of the installed PyTorch, which is not imported for it; empty where it cannot be told."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
