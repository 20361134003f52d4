"""Caches of transformers, told from other objects by what they carry: here of classes that only say they are theirs."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from srigl_fx.passes.hugging_face import register_caches, untold


class Cache:
    __module__ = "transformers.cache_utils"

    def __init__(self, *layers: Any, **attributes: Any) -> None:
        self.layers = list(layers)
        vars(self).update(attributes)

    def get_seq_length(self) -> int:
        return 0


class DerivedCache(Cache):
    __module__ = "users"


class Registered(Cache):
    """One that PyTorch takes apart; how many positions it has seen is in none of the parts."""


pytree.register_pytree_node(
    Registered, lambda cache: ([layer.keys for layer in cache.layers], None), lambda keys, _: Registered(*keys)
)


class Configuration:
    """Has layers, and no positions."""

    __module__ = "transformers.configuration_utils"

    def __init__(self, *layers: Any) -> None:
        self.layers = layers


class Pair:
    """The cache of a decoder with an encoder: two in one, as transformers have it."""

    __module__ = "transformers.cache_utils"

    def __init__(self, own: Cache, cross: Cache, marks: dict[int, bool]) -> None:
        self.self_attention_cache, self.cross_attention_cache, self.is_updated = own, cross, marks

    def get_seq_length(self) -> int:
        return 0


def layer(positions: int | None = 4, **attributes: Any) -> SimpleNamespace:
    keys = None if positions is None else torch.zeros(1, 2, positions, 8)
    return SimpleNamespace(keys=keys, **attributes)


@pytest.fixture(autouse=True)
def _imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))


@pytest.mark.parametrize(
    ("layers", "given", "number"),
    [
        ([layer()], True, None),
        ([layer(cumulative_length=4)], True, None),  # as many as there are keys
        ([layer(cumulative_length=5)], True, 0),
        ([layer(), layer(cumulative_length=5)], True, 1),
        ([layer(cumulative_length=5)], False, 0),
        ([layer(cumulative_length=torch.tensor(5))], True, None),  # a tensor tells
        ([layer(positions=None, cumulative_length=5)], True, None),  # nothing was put into it yet
        ([SimpleNamespace(keys=torch.zeros(1, 8), cumulative_length=5)], True, None),  # no place for positions
        ([layer(cumulative_length=4, sliding_window=6)], True, None),
        ([layer(cumulative_length=4, sliding_window=5)], True, 0),  # the next position fills it
        ([layer(cumulative_length=4, sliding_window=5)], False, None),
        ([layer(cumulative_length=4, sliding_window=None)], True, None),
        ([layer(cumulative_length_int=4)], False, 0),
        ([layer(cumulative_length_int=torch.tensor(4))], True, None),
    ],
)
def test_positions_that_no_tensor_tells(layers: list[Any], given: bool, number: int | None) -> None:
    said = untold({"past": [Cache(*layers)]}, given=given)
    expected = f"a Cache whose layer {number} (SimpleNamespace) counts its positions in a number that is in no tensor"
    assert said == ("" if number is None else expected)


def test_caches_are_told_from_other_objects_of_theirs_and_looked_at_whole() -> None:
    counting = layer(cumulative_length=5)
    for cache in (DerivedCache(counting), Registered(counting)):
        assert untold([Cache(), cache], given=True).startswith(f"a {type(cache).__name__} whose layer 0")
    assert untold(Configuration(counting), given=True) == ""


def test_layers_of_both_parts_are_looked_at() -> None:
    full = Cache(layer(cumulative_length=5))
    for pair in (Pair(Cache(layer()), full, {0: True}), Pair(full, Cache(layer()), {0: True})):
        assert untold(pair, given=False).startswith("a Pair whose layer")


@pytest.mark.parametrize(
    ("cross", "marks", "given", "number"),
    [
        ([layer()], {0: True}, True, None),
        ([layer()], {0: False}, True, 0),
        ([layer()], {}, True, 0),
        ([layer(), layer()], {0: True, 1: False}, True, 1),
        ([layer(positions=None)], {0: False}, True, None),  # nothing is in it
        ([layer(positions=0)], {0: False}, True, None),
        ([layer()], {0: False}, False, None),  # of an output it is what the next call makes of it
    ],
)
def test_layers_that_are_full_and_to_be_filled(
    cross: list[Any], marks: dict[int, bool], given: bool, number: int | None
) -> None:
    said = untold(Pair(Cache(layer()), Cache(*cross), marks), given=given)
    expected = f"a Pair whose layer {number} is full and marked as one that is to be filled"
    assert said == ("" if number is None else expected)


def test_without_transformers_there_is_nothing_to_tell_or_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transformers")
    assert untold(Cache(layer(cumulative_length=5)), given=True) == ""
    assert not register_caches(nn.Linear(2, 2), [Cache()])


def test_caches_are_registered_with_all_that_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, ...]] = []
    model = nn.Linear(2, 2)
    offers = {
        "transformers.integrations.executorch": {},  # another release: it lacks the function
        "transformers.exporters.exporter_dynamo": {"register_cache_pytrees_for_model": lambda *a: called.append(a)},
    }
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(**offers[name]))
    assert not register_caches(model, [torch.ones(1), "text"])
    assert called == []
    assert register_caches(model, [1, DerivedCache()])
    assert called == [(model,)]
    offers["transformers.integrations.executorch"] = {
        "register_dynamic_cache_export_support": lambda *a: called.append(a)
    }
    assert register_caches(model, [Cache()])
    assert called == [(model,), (), (model,)]
