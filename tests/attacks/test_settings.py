"""Settings of attacks: which are refused, attacks as values and as JSON, and suites by name."""

import json
from typing import Any

import pytest

from attack_toys import EVERY, NAMES, THREATS, Linear, linear, suite
from cmap_defense import attacks
from cmap_defense.attacks import (
    APGD,
    PGD,
    SPSA,
    AutoAttack,
    ConsistencyDisruption,
    FrozenResidual,
    LatentAttack,
    Margin,
    NoiseAndDenoise,
    Overpowered,
    ShortCMAP,
    Shortened,
    Square,
    TargetSteer,
    ThreatModel,
    Transfer,
    Undefended,
    VoteMargin,
)
from cmap_defense.errors import SettingsError

NAN, INF = float("nan"), float("inf")
BASE = {
    "threat": ["linf", 8 / 255, None],
    "restarts": [0, -1, 1.5, True],
    "seed": [0.5, None, "0"],
    "noise": ["frozen", None],
}
STEPS = {
    "steps": [0, -1, 2.0, True],
    "step_size": [-0.1, NAN, "1/255"],
    "schedule": ["linear", None],
    "random_start": [1, "yes"],
    "momentum": [-0.1, INF],
    "sign_steps": [0],
    "keep": ["first"],
}
LATENTS = {
    "steps": [0, 1.5],
    "learning_rate": [0.0, -1.0],
    "latents": [0],
    "start": ["clean"],
    "penalty": [0.0, NAN],
    "confidence": [-1.0],
}
REFUSED: dict[type, dict[str, list[Any]]] = {
    PGD: STEPS | {"eot": [0, 1.0], "balanced": [1], "loss": ["margin", Margin], "gradient": ["bpda", PGD]},
    SPSA: STEPS
    | {
        "pairs": [0, 1.5],
        "delta": [0.0, -0.01, "small"],
        "common_noise": [1, None],
        "loss": [VoteMargin(), "margin", None],
    },
    FrozenResidual: STEPS
    | {
        "every": [0, 1.5, None],
        "purifications": [0, True],
        "memory": [0, 2.0, "all"],
        "loss": ["vote", VoteMargin, None],
    },
    ShortCMAP: STEPS | {"iterations": [0], "refresh": [0, 1.5], "gradient": ["unrolled", None], "loss": [3]},
    TargetSteer: STEPS | {"target": ["latent", PGD(ThreatModel())], "gradient": [None]},
    LatentAttack: LATENTS | {"growth": [0.5]},
    Overpowered: LATENTS,
    ConsistencyDisruption: {"steps": [0, 2.5], "beta": [-1.0, INF, "2e6"], "penalty": [-0.1, None], "released": ["no"]},
    APGD: {"steps": [0], "eot": [0], "loss": ["mse"], "gradient": ["bpda"]},
    Square: {"queries": [0], "samples": [0], "p_init": [0.0, 1.1], "confidence": [-1.0]},
    AutoAttack: {
        "version": ["custom"],
        "eot": [0],
        "rounds": [0],
        "confirmations": [0],
        "batch_size": [0],
        "gradient": [3],
    },
}


@pytest.mark.parametrize(
    ("attack", "name"), [(attack, name) for attack, settings in REFUSED.items() for name in BASE | settings]
)
def test_wrong_settings_are_refused_by_name(attack: Any, name: str):
    for value in (BASE | REFUSED[attack])[name]:
        with pytest.raises(SettingsError, match=rf"{attack.__name__}\.{name}"):
            attack(**{"threat": ThreatModel()} | {name: value})


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Transfer("PGD"), "Transfer.attack"),
        (lambda: Transfer(PGD), "Transfer.attack"),
        (lambda: Transfer(PGD(ThreatModel()), source="undefended"), "Transfer.source"),
        (lambda: Transfer(PGD(ThreatModel()), source=None), "Transfer.source"),
        (lambda: Transfer(PGD(ThreatModel()), source=Undefended), "Transfer.source"),
        (lambda: Shortened(0), "Shortened.iterations"),
        (lambda: Shortened(1.5), "Shortened.iterations"),
        (lambda: NoiseAndDenoise(0.0), "NoiseAndDenoise.sigma"),
        (lambda: NoiseAndDenoise(-1.0), "NoiseAndDenoise.sigma"),
        (lambda: NoiseAndDenoise(steps=0), "NoiseAndDenoise.steps"),
    ],
)
def test_wrong_sources_and_combinations_are_refused_by_name(make: Any, named: str):
    with pytest.raises(SettingsError, match=named):
        make()


@EVERY
def test_attacks_are_values(name: str):
    first, again, other = (suite(THREATS["linf"], seed=seed)[name] for seed in (1, 1, 2))
    assert first == again != other
    assert hash(first) == hash(again)
    assert repr(first) == repr(again)
    assert "seed=1" in repr(first)
    with pytest.raises(AttributeError):
        first.seed = 3


def test_attacks_that_differ_have_different_dictionaries_of_json_values():
    found = [attack for eps in (0.1, 0.2) for attack in suite(ThreatModel(eps=eps)).values()]
    found += [attack for name in attacks.SUITES for attack in attacks.suite(name, ThreatModel()).values()]
    found += [Transfer(PGD(ThreatModel()), source=source) for source in (Linear(1.0), Linear(2.0), linear)]
    by_text: dict[str, Any] = {}
    for attack in found:
        text = json.dumps(attack.to_dict(), allow_nan=False)
        assert by_text.setdefault(text, attack) == attack
    assert len(by_text) == len(set(found))
    again = json.dumps(Transfer(PGD(ThreatModel()), source=Linear(1.0)).to_dict())
    assert again in by_text, "a network is described by its weights, not by its address"


def test_suites_have_their_names_and_sizes():
    assert set(attacks.SUITES) == {"standard", "paper", "exact", "full"}
    threat = ThreatModel(eps=0.1)
    assert attacks.suite("standard", threat, steps=3) == attacks.standard_suite(threat, steps=3)
    assert attacks.suite("full", threat).items() > attacks.suite("standard", threat).items()
    assert set(attacks.suite("full", threat)) > set(attacks.suite("exact", threat))
    with pytest.raises(SettingsError, match="Did you mean 'standard'"):
        attacks.suite("standart", threat)


def test_the_step_size_grows_with_the_threat_where_there_is_something_to_grow_from() -> None:
    wide, none = ThreatModel(eps=0.2), ThreatModel(eps=0.0)
    assert PGD(ThreatModel(eps=0.1), step_size=0.03).under(wide).step_size == pytest.approx(0.06)
    assert PGD(none, step_size=0.03).under(wide) == PGD(wide)


def test_threat_restarts_seed_and_noise_of_a_transfer_are_the_inner_attacks():
    inner = SPSA(THREATS["l2"], restarts=3, seed=9, noise="known")
    attack = Transfer(inner)
    assert (attack.threat, attack.restarts, attack.seed, attack.noise) == (THREATS["l2"], 3, 9, "known")
    for name in ("threat", "restarts", "seed", "noise"):
        with pytest.raises(TypeError):
            Transfer(inner, **{name: getattr(inner, name)})
    assert attack.under(THREATS["linf"]).threat == THREATS["linf"]
    assert Transfer(inner) == Transfer(inner, source=Undefended()) != Transfer(inner, source=Shortened())
    assert len({Transfer(inner), Transfer(inner), Transfer(inner, source=Shortened(3))}) == 2
    for part in ("Transfer(", "attack=SPSA(", "source=Shortened(iterations=3)", "seed=9"):
        assert part in repr(Transfer(inner, source=Shortened(3)))


def test_every_attack_of_the_package_is_in_these_tests():
    here = {type(attack) for attack in suite(ThreatModel()).values()} | {APGD, Square, AutoAttack}
    full = {type(a) for name in attacks.SUITES for a in attacks.suite(name, ThreatModel()).values()}
    assert full <= here == {*REFUSED, Transfer}
    assert len(NAMES) == len(set(NAMES))
