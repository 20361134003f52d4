"""Which trainer's engine is attached to which model.

Owns the register of attached engines. It must not know what an engine does.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import nn

from srigl_fx.masks.records import SparseWeight, sparse_weights


class Attached(Protocol):
    """What can be attached to a model."""

    def detach(self) -> None:
        """Remove every hook."""

    def follow(self, owner: nn.Module) -> None:
        """Look at the parameters of ``owner`` again, which something has exchanged or written."""

    def faults(self) -> Iterator[str]:
        """What keeps the engine from keeping the model sparse, and what it has left wrong."""


# Owner module of a masked weight -> the engine attached to it. A copy of the module is another key: it has no trainer.
_ATTACHED: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attached]]" = weakref.WeakKeyDictionary()


def attach(owner: nn.Module, engine: Attached) -> None:
    """Note that ``engine`` manages a weight of ``owner``.

    Example:
        >>> class Nothing:
        ...     def detach(self):
        ...         print("detached")
        >>> layer, engine = nn.Linear(3, 2), Nothing()
        >>> attach(layer, engine)
        >>> engine_of(layer) is engine
        True
        >>> forget(layer, engine)
    """
    _ATTACHED[owner] = weakref.ref(engine)


def forget(owner: nn.Module, engine: Attached) -> None:
    """Take that back, unless another engine has taken over.

    Example:
        >>> forget(nn.Linear(3, 2), None)
    """
    if engine_of(owner) is engine and owner in _ATTACHED:
        del _ATTACHED[owner]


def engine_of(owner: nn.Module) -> Attached | None:
    """The engine that manages the weights of ``owner`` itself.

    Example:
        >>> engine_of(nn.Linear(3, 2))
    """
    reference = _ATTACHED.get(owner)
    return None if reference is None else reference()


def engines(model: nn.Module, weights: Sequence[SparseWeight] | None = None) -> list[Attached]:
    """The engines attached to ``model`` or a part of it.

    Args:
        model: Any model.
        weights: Its masked weights, where they have been looked up.

    Example:
        >>> engines(nn.Linear(3, 2))
        []
    """
    attached = (engine_of(handle.owner) for handle in (sparse_weights(model) if weights is None else weights))
    return list({id(engine): engine for engine in attached if engine is not None}.values())


def follow(owner: nn.Module) -> None:
    """Tell the trainer of ``owner``, if it has one, that something may have exchanged its parameters.

    Example:
        >>> follow(nn.Linear(3, 2))
    """
    if (engine := engine_of(owner)) is not None:
        engine.follow(owner)
