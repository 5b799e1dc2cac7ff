"""Descriptions of what results depend on: equal where the parts are, different where one has other weights."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attack_toys import Linear, labelled, linear
from cmap_defense import ThreatModel
from cmap_defense.attacks import PGD, Loss, Transfer
from cmap_defense.common.describe import describe, description_text

SOURCES: dict[str, Callable[[Linear], Any]] = {
    "module": lambda network: network,
    "bound method": lambda network: network.forward,
    "partial": lambda network: functools.partial(network),
    "partial of a bound method": lambda network: functools.partial(network.forward),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_runs_a_network_is_described_with_its_weights(name: str) -> None:
    def described(scale: float) -> Any:
        return describe(Transfer(PGD(ThreatModel()), source=SOURCES[name](Linear(scale))))

    assert described(1.0) == described(1.0)
    assert described(1.0) != described(2.0)


def test_methods_of_one_network_differ() -> None:
    network = Linear()
    assert describe(network.forward) != describe(network.train)


def test_other_functions_have_their_names_and_code() -> None:
    found = describe(linear)
    assert found["function"] == "attack_toys.linear"
    assert found["code"] != describe(labelled)["code"]
    assert description_text(found) == "attack_toys.linear"
    assert describe(describe) == "cmap_defense.common.describe.describe"


def test_large_tensors_are_described_by_their_values() -> None:
    """Their text leaves out what is in the middle."""
    plain = torch.zeros(3, 32, 32)
    changed = plain.clone()
    changed[:, 12:20, 12:20] = 0.1
    assert repr(plain) == repr(changed)
    assert describe(plain) == describe(plain.clone()) != describe(changed)
    assert describe(plain.numpy()) == describe(plain.numpy().copy()) != describe(changed.numpy())
    assert describe(plain.numpy()[::-1]) == describe(plain.numpy()[::-1].copy())
    assert describe(torch.zeros(2, device="meta")) == describe(torch.zeros(2, device="meta"))
    assert describe(plain) != describe(plain.view(3, 64, 16))


def source_of(network: Linear) -> Callable[[Any], Any]:
    return lambda images: network(images)


def scaled_by(factor: float) -> Callable[[Any], Any]:
    return lambda images: images * factor


class Holder:
    """Not a module."""

    def __init__(self, network: Linear) -> None:
        self.network = network
        self.calls = 0

    def __call__(self, images: Any) -> Any:
        self.calls += 1
        return self.network(images)


class Weighted(Loss):
    """A loss that keeps its option under another name."""

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._calls = 0
        self._seen: dict[int, bool] = {}

    def __call__(self, logits: Any, goal: Any) -> Any:
        self._calls += 1
        self._seen[self._calls] = True


@pytest.mark.parametrize(
    "make",
    [
        lambda value: source_of(Linear(value)),
        scaled_by,
        lambda value: Holder(Linear(value)),
        lambda value: functools.partial(linear, Linear(value)),
        lambda value: functools.partial(linear, factor=value),
        Weighted,
    ],
    ids=["function", "number", "object", "partial", "keyword", "loss"],
)
def test_what_a_function_or_an_object_keeps_is_described(make: Callable[[float], Any]) -> None:
    assert describe(make(1.0)) == describe(make(1.0)) != describe(make(2.0))


def test_what_an_object_remembers_is_no_part_of_it() -> None:
    holder, loss = Holder(Linear()), Weighted(1.0)
    before = describe([holder, loss])
    holder(labelled(2)[0])
    loss(None, None)
    assert describe([holder, loss]) == before


def test_sets_have_one_order() -> None:
    assert describe({"b", "a", "c"}) == describe(frozenset("cab")) == ["a", "b", "c"]
    assert describe({"a": {2, 1}}) == {"a": [1, 2]}


def test_a_counter_is_no_part_of_a_function() -> None:
    def counted() -> Callable[[], int]:
        count = 0

        def call() -> int:
            nonlocal count
            count += 1
            return count

        return call

    function = counted()
    before = describe(function)
    function()
    assert describe(function) == before
