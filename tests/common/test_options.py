"""Unknown options of constructors: the error says where the option lives, or which one is near."""

import abc
import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest
import torch

import cmap_defense
from cmap_defense import CMAPSettings, PurifiedClassifier, attacks, gradients
from cmap_defense.attacks import PGD, Attack, NoiseAndDenoise, Shortened, ThreatModel, Transfer
from cmap_defense.common.options import NamedOptions
from cmap_defense.errors import CmapError, OptionError, SettingsError
from cmap_defense.gradients import Implicit, Unrolled
from cmap_defense.purifiers import ADP, GDMP, GNSP, Chain, DiffPure, Identity, LikelihoodMaximisation, OneStep

NAMES = {**vars(attacks), **vars(gradients), **vars(cmap_defense), "torch": torch}


def error_of(kind: type, *given: Any, **options: Any) -> str:
    with pytest.raises(OptionError) as caught:
        kind(*given, **options)
    assert isinstance(caught.value, CmapError)
    assert isinstance(caught.value, TypeError)
    return str(caught.value)


HOMES: list[tuple[type, dict[str, Any], str]] = [
    (PurifiedClassifier, {"n_latents": 4}, "PurifiedClassifier(..., settings=CMAPSettings(n_latents=4))"),
    (PurifiedClassifier, {"n_latents": 4}, "and of OneStep: PurifiedClassifier(..., purifier=OneStep(n_latents=4))"),
    (PurifiedClassifier, {"iterations": 7}, "PurifiedClassifier(..., settings=CMAPSettings(iterations=7))"),
    (PurifiedClassifier, {"k": 4}, "PurifiedClassifier(..., settings=CMAPSettings(n_latents=4))"),
    (PurifiedClassifier, {"steps": 7}, "PurifiedClassifier(..., settings=CMAPSettings(iterations=7))"),
    (PurifiedClassifier, {"lr": 0.1}, "PurifiedClassifier(..., settings=CMAPSettings(learning_rate=0.1))"),
    (PurifiedClassifier, {"n_latent": 4}, "PurifiedClassifier(..., settings=CMAPSettings(n_latents=4))"),
    (PurifiedClassifier, {"last": 3}, "PurifiedClassifier(..., gradient=Unrolled(last=3))"),
    (PurifiedClassifier, {"batch_size": 8}, "PurifiedClassifier(..., max_parallel=8)"),
    (PurifiedClassifier, {"normalise": (0.5, 0.5)}, "PurifiedClassifier(..., normalize=(0.5, 0.5))"),
    (PurifiedClassifier, {"level": 0.5}, "of OneStep: PurifiedClassifier(..., purifier=OneStep(level=0.5))"),
    (PGD, {"eps": 0.1}, "PGD(ThreatModel(eps=0.1), ...)"),
    (PGD, {"norm": "linf", "steps": 3}, "PGD(ThreatModel(norm='linf'), ...)"),
    (PGD, {"epsilon": 0.1}, "PGD(ThreatModel(eps=0.1), ...)"),
    (PGD, {"iterations": 3}, "PGD(..., steps=3)"),
    (PGD, {"restart": 3}, "PGD(..., restarts=3)"),
    (PGD, {"last": 3}, "PGD(..., gradient=Unrolled(last=3))"),
    (Transfer, {"eps": 0.1}, "Transfer(PGD(ThreatModel(eps=0.1), ...), ...)"),
    (CMAPSettings, {"n_latent": 3}, "CMAPSettings(n_latents=3)"),
    (CMAPSettings, {"k": 3}, "CMAPSettings(n_latents=3)"),
    (ThreatModel, {"epsilon": 0.1}, "ThreatModel(eps=0.1)"),
    (Unrolled, {"max_grow": 2.0}, "Unrolled(max_growth=2.0)"),
    (Shortened, {"iteration": 2}, "Shortened(iterations=2)"),
]


@pytest.mark.parametrize(
    ("kind", "options", "expected"), HOMES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_the_error_has_the_call_that_sets_the_option(kind: type, options: dict[str, Any], expected: str) -> None:
    message = error_of(kind, **options)
    assert message.startswith(f"{kind.__name__} has no option {next(iter(options))!r}.")
    assert expected in message
    for call in re.findall(r"(?:CMAPSettings|ThreatModel|Unrolled|Shortened)\([^().]*(?:\.\d+)?\)", message):
        eval(call, NAMES)


@pytest.mark.parametrize(
    "kind", [k for k in vars(attacks).values() if type(k) is abc.ABCMeta and issubclass(k, Attack)]
)
def test_every_attack_says_where_eps_is(kind: type[Attack]) -> None:
    assert "ThreatModel(eps=0.1)" in error_of(kind, eps=0.1)


@pytest.mark.parametrize("field", dataclasses.fields(CMAPSettings), ids=lambda field: field.name)
def test_every_setting_of_the_loop_is_found(field: dataclasses.Field[Any]) -> None:
    assert f"settings=CMAPSettings({field.name}=" in error_of(PurifiedClassifier, **{field.name: field.default})


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (PurifiedClassifier, "mean", r"normalize=\(mean, std\)"),
        (PurifiedClassifier, "std", r"normalize=\(mean, std\)"),
        (PurifiedClassifier, "device", r"\.to\(device\)"),
        (PurifiedClassifier, "eps", "ThreatModel.*CMAPSettings"),
        (PurifiedClassifier, "queries", "option of AutoAttack, Square"),
        (Identity, "level", r"option of CMAPSettings, (\w+, )*OneStep\.$"),
        (GNSP, "level", r"GNSP\(rounds=\(30, 50\)\)"),
        (GNSP, "t", r"GNSP\(rounds=\(30, 50\)\)"),
        (ADP, "sigma", r"ADP\(noise=level / 2\)"),
        (LikelihoodMaximisation, "level", "sigmas"),
        (LikelihoodMaximisation, "lr", r"It is called 'learning_rate': LikelihoodMaximisation\(learning_rate=1\)"),
        (GDMP, "K", r"It is called 'n_latents': GDMP\(n_latents=1\)"),
        (CMAPSettings, "K", r"It is called 'n_latents': CMAPSettings\(n_latents=1\)"),
        (Chain, "purifiers", r"one by one, without a name: Chain\(DiffPure\(t=100\), CMAP\(\)\)"),
        (DiffPure, "level", r"choose t so that .*vp_sigma\(t\)"),
        (DiffPure, "steps", r"Did you mean DiffPure\(step="),
        (OneStep, "t", r"level=vp_sigma\(t\)"),
        (OneStep, "sigma", r"It is called 'level': OneStep\(level="),
        (PurifiedClassifier, "xyzzy", "Known: 'backbone'"),
        (PGD, "targeted", "targets=..."),
        (ThreatModel, "beta", "option of ConsistencyDisruption"),
    ],
)
def test_names_that_are_no_option_of_an_object_within_reach(kind: type, name: str, words: str) -> None:
    assert re.search(words, error_of(kind, **{name: 1}))


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (DiffPure, "level", r"DiffPure has no setting 'level'\. Its noise is t of 1000"),
        (DiffPure, "timestep", r"DiffPure has no setting 'timestep'\. It is called 't'\."),
        (OneStep, "K", r"OneStep has no setting 'K'\. It is called 'n_latents'\."),
        (CMAPSettings, "N", r"CMAPSettings has no setting 'N'\. It is called 'iterations'\."),
        (DiffPure, "stp", r"DiffPure has no setting 'stp'\. Did you mean 'step'"),
    ],
)
def test_settings_by_other_names_are_known_to_a_mapping_too(kind: Any, name: str, words: str) -> None:
    """As on a command line, and by ``replace``."""
    for make in (kind.from_dict, lambda values: kind().replace(**values)):
        with pytest.raises(SettingsError, match=f"^{words}"):
            make({name: 1})


def test_a_long_value_is_left_out() -> None:
    assert "n_latents=...)" in error_of(PurifiedClassifier, n_latents=list(range(100)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(PGD):
    """An attack of a user's."""

    patience: int = 3


def test_the_attacks_of_others_take_part() -> None:
    assert Mine(ThreatModel(), patience=4).patience == 4
    assert "Mine(..., patience=4)" in error_of(Mine, patienc=4)
    assert "Mine(ThreatModel(eps=4), ...)" in error_of(Mine, eps=4)


class Anything(NamedOptions):
    """Takes whatever comes."""

    def __init__(self, **options: Any) -> None:
        self.options = options


def test_classes_that_take_any_option_are_left_alone() -> None:
    assert Anything(eps=1).options == {"eps": 1}


@pytest.mark.parametrize(
    "value", [PGD(ThreatModel(eps=0.1), steps=3), CMAPSettings(n_latents=3), Implicit(iterations=3), NoiseAndDenoise()]
)
def test_copies_pickles_and_replacements_are_as_before(value: Any) -> None:
    assert copy.deepcopy(value) == value
    assert pickle.loads(pickle.dumps(value)) == value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        assert dataclasses.replace(value) == value
        with pytest.raises(OptionError):
            dataclasses.replace(value, nonsense=1)
