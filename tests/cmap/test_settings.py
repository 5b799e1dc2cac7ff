"""CMAPSettings: validated when made, exact JSON round trip, the released constants as presets."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmap_defense.cmap.settings import PRESETS, CMAPSettings
from cmap_defense.errors import CmapError, SettingsError, UnknownNameError

POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
AT_LEAST_0 = st.floats(0, allow_infinity=False) | st.integers(0, 10**6)
BETAS = st.floats(0, 1, exclude_max=True)
VALID = st.builds(
    CMAPSettings,
    n_latents=st.integers(1, 2**70),
    iterations=st.integers(1, 2**70),
    learning_rate=POSITIVE,
    betas=st.tuples(BETAS, BETAS) | st.lists(BETAS, min_size=2, max_size=2),
    schedule=st.sampled_from(["constant", "cosine"]),
    eps=POSITIVE,
    ssim_weight=AT_LEAST_0,
    latent_weight=AT_LEAST_0,
    tolerance=AT_LEAST_0,
)

WRONG = [
    ("n_latents", 0),
    ("n_latents", -3),
    ("n_latents", 2.0),
    ("n_latents", True),
    ("n_latents", "10"),
    ("n_latents", None),
    ("iterations", 0),
    ("iterations", -1),
    ("iterations", 1.5),
    ("iterations", True),
    ("iterations", "200"),
    ("learning_rate", 0),
    ("learning_rate", -0.1),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("learning_rate", True),
    ("learning_rate", "0.1"),
    ("schedule", "linear"),
    ("schedule", None),
    ("eps", 0.0),
    ("eps", -1e-8),
    ("eps", float("inf")),
    ("eps", None),
    ("ssim_weight", -1e-9),
    ("ssim_weight", float("nan")),
    ("ssim_weight", float("inf")),
    ("ssim_weight", False),
    ("ssim_weight", [2.0]),
    ("latent_weight", -3.2),
    ("latent_weight", float("nan")),
    ("latent_weight", float("-inf")),
    ("latent_weight", True),
    ("latent_weight", 1j),
    pytest.param("latent_weight", 10**400, id="latent_weight-beyond-float"),
    ("tolerance", -0.1),
    ("betas", 0.9),
    ("betas", (0.9,)),
    ("betas", (0.9, 0.99, 0.999)),
    ("betas", (0.9, 1.0)),
    ("betas", (-0.1, 0.99)),
    ("betas", (0.9, float("nan"))),
    ("betas", (True, 0.99)),
    ("betas", ("0.9", 0.99)),
    ("betas", "ab"),
    ("betas", None),
    ("betas", {0.9: 1, 0.99: 2}),
]


@settings(deadline=None, max_examples=50)
@given(chosen=VALID)
def test_json_round_trip_is_exact(chosen: CMAPSettings):
    assert CMAPSettings.from_json(chosen.to_json()) == chosen


@settings(deadline=None, max_examples=30)
@given(chosen=VALID)
def test_dict_round_trip_is_exact(chosen: CMAPSettings):
    assert CMAPSettings.from_dict(chosen.to_dict()) == chosen


@settings(deadline=None, max_examples=30)
@given(chosen=VALID)
def test_equal_settings_have_equal_hashes(chosen: CMAPSettings):
    assert hash(CMAPSettings.from_json(chosen.to_json())) == hash(chosen)


def test_to_dict_holds_json_values_only():
    values = CMAPSettings().to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(CMAPSettings)}


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_nonsense_is_refused_by_name(name: str, value: object):
    with pytest.raises(SettingsError, match=name):
        CMAPSettings(**{name: value})


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_replace_refuses_the_same_nonsense(name: str, value: object):
    with pytest.raises(SettingsError, match=name):
        CMAPSettings().replace(**{name: value})


def test_wrong_settings_are_a_value_error_too():
    with pytest.raises(ValueError, match="n_latents") as caught:
        CMAPSettings(n_latents=0)
    assert isinstance(caught.value, CmapError)


@pytest.mark.parametrize("make", [CMAPSettings.from_dict, lambda values: CMAPSettings().replace(**values)])
def test_unknown_field_names_the_near_match(make):
    with pytest.raises(SettingsError, match=r"'n_latent'.*'n_latents'"):
        make({"n_latent": 3})


def test_unknown_field_that_is_near_to_none_lists_all():
    with pytest.raises(SettingsError) as caught:
        CMAPSettings.from_dict({"qqq": 3})
    assert all(repr(field.name) in str(caught.value) for field in dataclasses.fields(CMAPSettings))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"n_latents"', '{"eps": NaN}', '{"eps": 1e999}'])
def test_text_that_is_not_settings_is_refused(text: str):
    with pytest.raises(SettingsError):
        CMAPSettings.from_json(text)


def test_replace_changes_the_named_fields_alone():
    before = CMAPSettings.preset("imagenet100")
    after = before.replace(n_latents=7, betas=[0.5, 0.6])
    assert (after.n_latents, after.betas) == (7, (0.5, 0.6))
    assert after.replace(n_latents=before.n_latents, betas=before.betas) == before


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CMAPSettings().n_latents = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_settings_are_given_by_name_only():
    with pytest.raises(TypeError):
        CMAPSettings(10)  # pyright: ignore[reportCallIssue]


def test_cifar10_preset_is_the_released_one_and_the_default():
    expected = {
        "n_latents": 10,
        "iterations": 200,
        "learning_rate": 0.025,
        "schedule": "constant",
        "betas": [0.9, 0.99],
        "eps": 8e-7,
        "ssim_weight": 2.0,
        "latent_weight": 3.2,
        "level": None,
        "stop_decrease": None,
        "stop_window": 10,
        "stop_agreement": None,
        "tolerance": 0.0,
        "l1_smoothing": 0.0,
    }
    assert CMAPSettings.preset("cifar10").to_dict() == expected
    assert CMAPSettings.preset("cifar10") == CMAPSettings()


def test_imagenet100_preset_is_the_released_one():
    expected = {
        "n_latents": 5,
        "iterations": 300,
        "learning_rate": 0.025,
        "schedule": "constant",
        "betas": [0.9, 0.99],
        "eps": 1.6e-4,
        "ssim_weight": 0.5,
        "latent_weight": 1.28,
        "level": None,
        "stop_decrease": None,
        "stop_window": 10,
        "stop_agreement": None,
        "tolerance": 0.0,
        "l1_smoothing": 0.0,
    }
    assert CMAPSettings.preset("imagenet100").to_dict() == expected


def test_there_are_these_presets_and_no_others():
    assert set(PRESETS) == {"cifar10", "imagenet100"}


def test_unknown_preset_names_the_near_match():
    with pytest.raises(UnknownNameError, match="cifar10") as caught:
        CMAPSettings.preset("cifar-10")
    assert isinstance(caught.value, LookupError)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["cifar10"]["eps"] = 1.0  # pyright: ignore[reportIndexIssue]
