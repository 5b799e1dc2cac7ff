"""Descriptions of what results depend on: equal where the parts are, different where one has other weights."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from attack_toys import Linear, labelled, linear
from cmap_defense import ThreatModel
from cmap_defense.attacks import PGD, Transfer
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
