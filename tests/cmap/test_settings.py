"""CMAPSettings: validated when made, exact JSON round trip, the released constants as presets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmap_defense.cmap.settings import PRESETS, CMAPSettings
from cmap_defense.errors import SettingsError, UnknownNameError

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


@settings(deadline=None, max_examples=50)
@given(chosen=VALID)
def test_json_round_trip_is_exact(chosen: CMAPSettings):
    again = CMAPSettings.from_json(chosen.to_json())
    assert again == CMAPSettings.from_dict(chosen.to_dict()) == chosen
    assert hash(again) == hash(chosen)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"n_latents"', '{"eps": NaN}', '{"eps": 1e999}'])
def test_text_that_is_not_settings_is_refused(text: str):
    with pytest.raises(SettingsError):
        CMAPSettings.from_json(text)


def test_replace_changes_the_named_fields_alone():
    before = CMAPSettings.preset("imagenet100")
    after = before.replace(n_latents=7, betas=[0.5, 0.6])
    assert (after.n_latents, after.betas) == (7, (0.5, 0.6))
    assert after.replace(n_latents=before.n_latents, betas=before.betas) == before


def test_what_the_paper_does_not_have_is_named() -> None:
    assert CMAPSettings(n_latents=3, ssim_weight=1.0).additions == {}
    ours = CMAPSettings(n_latents=3, level=0.8, iterations=5, tolerance=0.1)
    assert ours.additions == {"level": 0.8, "tolerance": 0.1}
    assert ours.summary == "K = 3 latents, N = 5 iterations, level = 0.8, tolerance = 0.1"


def test_presets_are_the_released_ones_and_that_of_cifar10_the_default():
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
    imagenet100 = {"n_latents": 5, "iterations": 300, "eps": 1.6e-4, "ssim_weight": 0.5, "latent_weight": 1.28}
    assert CMAPSettings.preset("imagenet100").to_dict() == expected | imagenet100


def test_there_are_these_presets_and_no_others():
    """Those of a threat model are the ones of the data set: the paper has one set of constants for both norms."""
    assert set(PRESETS) == {name + norm for name in ("cifar10", "imagenet100") for norm in ("", "-linf", "-l2")}
    for name in ("cifar10", "imagenet100"):
        assert PRESETS[name] == PRESETS[f"{name}-linf"] == PRESETS[f"{name}-l2"]


def test_unknown_preset_names_the_near_match():
    with pytest.raises(UnknownNameError, match="cifar10") as caught:
        CMAPSettings.preset("cifar-10")
    assert isinstance(caught.value, LookupError)


def test_presets_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["cifar10"]["eps"] = 1.0  # pyright: ignore[reportIndexIssue]
