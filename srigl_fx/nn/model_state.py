"""Running a model so that it is afterwards as it was before.

Owns what a forward pass may change besides its results, and that it is given back: buffers, however they are written,
plain attributes, lists, dicts and sets among them, and what it is given. It must not know what a run is for.
"""

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils import _pytree as pytree

from srigl_fx.masks.records import MASK_SUFFIX

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_OWN = frozenset(vars(nn.Module()))  # what every module keeps: parameters, hooks and the like
_CONTAINERS = frozenset({list, dict, set, OrderedDict, defaultdict, deque})
_PLAIN = (Tensor, bool, int, float, complex, str, type(None))  # what state is kept in, where not in buffers


class State:
    """What a model's buffers and attributes were when a run began, and what has become of them.

    Masks of the library are left out: no forward writes them.
    """

    def __init__(self, model: nn.Module, *, copied: bool) -> None:
        """Keep what ``model`` holds; with ``copied``, put copies in the place of tensors."""
        self._model = model
        self._saved: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a tensor that was there, and a copy of its values
        self._placed: dict[int, Tensor] = {}  # by id of a tensor that was there: what is in its place during the run
        self._open: list[tuple[str, nn.Module]] = []
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._transient: list[set[str]] = []
        self._containers: dict[int, tuple[str, Any, Any]] = {}  # by id: where it is kept, itself, what was in it
        for name, module in model.named_modules():
            if isinstance(module, LazyModuleMixin):  # its first run gives it sizes, which stay
                continue
            if isinstance(module, torch.jit.ScriptModule):  # its dictionaries are compiled, the tensors stay in place
                for buffer in module.buffers(recurse=False):
                    self._save(buffer)
                continue
            before: tuple[dict[str, Any], dict[str, Any]] = dict(module._buffers), dict(vars(module))
            self._open.append((name, module))
            self._before.append(before)
            self._transient.append(set(module._non_persistent_buffers_set))
            for key, value in before[1].items():
                if key not in _OWN:
                    self._keep(_joined(name, key), value)
            for store, held in zip((module._buffers, vars(module)), before, strict=True):
                for key, value in held.items():
                    if isinstance(value, Tensor) and not _is_mask(module, key, value) and self._save(value) and copied:
                        store[key] = self._placed.setdefault(id(value), value.detach().clone())

    def _keep(self, name: str, value: Any) -> None:
        """Keep what is in a container, and in those inside it."""
        if type(value) not in _CONTAINERS or id(value) in self._containers:
            return
        self._containers[id(value)] = name, value, copy.copy(value)
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, Tensor):
                self._save(item)
            else:
                self._keep(name, item)

    def _save(self, tensor: Tensor) -> bool:
        """Keep a tensor's values, if it has such."""
        if tensor.is_meta or tensor.layout is not torch.strided or isinstance(tensor, nn.parameter.UninitializedBuffer):
            return False
        self._saved.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        return True

    def written(self) -> dict[str, str]:
        """The buffers that have been written, by name, and how their type or sizes changed ("" where they did not)."""
        found: dict[str, str] = {}
        seen: dict[int, Tensor | None] = {}  # by id of a buffer that was there: what is there now
        for (path, module), (before, _) in zip(self._open, self._before, strict=True):
            for key in {**before, **module._buffers}:
                was, now = before.get(key), module._buffers.get(key)
                if id(was) in seen and now is seen[id(was)]:  # the same buffer under another name
                    continue
                if now is not self._placed.get(id(was), was) or (id(was) not in seen and self._touched(was)):
                    found[_joined(path, key)] = "" if _kind(was) == _kind(now) else f"{_kind(was)} to {_kind(now)}"
                if was is not None:
                    seen.setdefault(id(was), now)
        return found

    def changed_attributes(self) -> list[str]:
        """The names of attributes that hold other tensors or numbers than before."""
        found = []
        for (path, module), (_, before) in zip(self._open, self._before, strict=True):
            for key, now in vars(module).items():
                was = before.get(key)
                placed = self._placed.get(id(was), was)
                changed = now is not placed and isinstance(now, _PLAIN) and not _same(now, placed)
                if changed or (isinstance(was, Tensor) and self._touched(was)):
                    found.append(_joined(path, key))
        found += [name for name, now, was in self._containers.values() if self._refilled(now, was)]
        return list(dict.fromkeys(found))

    def _refilled(self, now: Any, was: Any) -> bool:
        """Whether a container holds other things than before, or tensors in it were written to."""
        items = [list(one.values() if isinstance(one, dict) else one) for one in (now, was)]
        if len(items[0]) != len(items[1]) or (isinstance(now, dict) and list(now) != list(was)):
            return True
        if any(isinstance(item, Tensor) and self._touched(item) for item in items[1]):
            return True
        return any(
            one is not other and not (isinstance(one, _PLAIN) and _same(one, other))
            for one, other in zip(*items, strict=True)
        )

    def values(self) -> dict[str, Tensor]:
        """Copies of the buffers as they are now, by name."""
        return {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}

    def _touched(self, was: Tensor | None) -> bool:
        """Whether the tensor itself, or what is in its place, was written to."""
        if id(was) not in self._saved:
            return False
        original, values = self._saved[id(was)]
        placed = self._placed.get(id(was), original)
        in_place = placed is not original and placed._version > 0
        return in_place or not _same(placed, values) or not _same(original, values)

    @torch.no_grad()
    def restore(self) -> None:
        """Give everything back."""
        for (_, module), both, transient in zip(self._open, self._before, self._transient, strict=True):
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(transient)
            for store, before in zip((module._buffers, vars(module)), both, strict=True):
                for key in store.keys() - before.keys():
                    del store[key]
                for key, value in before.items():
                    if store.get(key, store) is not value:
                        store[key] = value
        for _, container, contents in self._containers.values():
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(contents)
        for tensor, values in self._saved.values():
            if not _same(tensor, values):
                tensor.copy_(values)


@contextmanager
def restored(model: nn.Module, *, copied: bool = True) -> Iterator[State]:
    """Let the block run ``model``; afterwards, also after an error, its buffers and plain attributes are as before.

    Args:
        model: The model.
        copied: Put copies in the place of buffers meanwhile: outputs that share their memory then keep their values.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with restored(norm) as state:
        ...     _ = norm(torch.ones(3, 2))
        ...     list(state.written())
        ['running_mean', 'running_var', 'num_batches_tracked']
        >>> norm.running_mean
        tensor([0., 0.])
    """
    state = State(model, copied=copied)
    try:
        yield state
    finally:
        state.restore()


def copies(inputs: _Inputs) -> _Inputs:
    """Copies of the inputs, for a run that may write into them: of tensors, of containers, of other objects.

    What cannot be copied is given as it is.

    Example:
        >>> x = torch.zeros(2)
        >>> (copied,), _ = copies(((x,), {}))
        >>> copied.add_(1), x
        (tensor([1., 1.]), tensor([0., 0.]))
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        try:
            return copy.deepcopy(leaf)
        except Exception:  # an object of any kind, with any reason not to be copied
            return leaf

    copied: _Inputs = pytree.tree_map(one, inputs)
    return copied


def _is_mask(module: nn.Module, key: str, value: Tensor) -> bool:
    return value.dtype is torch.bool and key.endswith(MASK_SUFFIX) and hasattr(module, key.removesuffix(MASK_SUFFIX))


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; NaN is equal to itself."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (one is other or bool(one == other))
    if _kind(one) != _kind(other):
        return False
    return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
