"""Images outside [0, 1]: clamped, warned about or refused, by one rule for every method that takes images."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attack_toys import SHAPE, THREATS, labelled, suite, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import APGD, AutoAttack, Square
from cmap_defense.attacks.base import Attack
from cmap_defense.errors import InputRangeWarning, InputValueError, SettingsError
from cmap_defense.evaluation.describe import describe_model
from toys import noise, uniform

METHODS: dict[str, Callable[[PurifiedClassifier, Tensor], Any]] = {
    "forward": lambda model, images: model(images, seeds=[1, 2]),
    "purify": lambda model, images: model.purify(images, seeds=[1, 2]).images,
    "objective": lambda model, images: model.objective(noise(2, 2, *SHAPE, seed=3), images).total,
    "initial_latents": lambda model, images: model.initial_latents(images, seeds=[1, 2]),
    "undefended": lambda model, images: model.undefended(images),
    "latent_class_labels": lambda model, images: model.latent_class_labels(images),
}


def beyond(by: float) -> Tensor:
    """Images [2, C, H, W] from -by to 1 + by; the first of them lies in [0, 1]."""
    images = uniform(2, *SHAPE, seed=1)
    images[1, 0, 0, 0], images[1, 1, 0, 0] = -by, 1 + by
    return images


def silent(model: PurifiedClassifier, method: str, images: Tensor) -> Any:
    """What a method returns; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return METHODS[method](model, images)


def same(found: Any, expected: Any) -> bool:
    return found is expected is None or torch.equal(found, expected)


@pytest.mark.parametrize("method", METHODS)
def test_clamp_is_silent_however_far(method: str) -> None:
    model = wrapped(out_of_range="clamp")
    images = beyond(300.0)
    assert same(silent(model, method, images), silent(model, method, images.clamp(0, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_raise_is_strict(method: str) -> None:
    model = wrapped(out_of_range="raise")
    silent(model, method, beyond(9e-5))
    for by in (2e-4, 0.1, 3.0):
        for images in (beyond(by), beyond(by).requires_grad_()):
            with pytest.raises(InputValueError, match=r'lie in \[-.*out_of_range="clamp"'):
                METHODS[method](model, images)


@pytest.mark.parametrize("method", METHODS)
def test_auto_warns_once_when_it_clamps_and_refuses_what_is_further_out(method: str) -> None:
    model = wrapped()
    images = beyond(0.49)
    with pytest.warns(
        InputRangeWarning, match=r'lie in \[-0.49, 1.49\].*inputs="normalized".*out_of_range="clamp"'
    ) as found:
        clamped = METHODS[method](model, images)
    assert len(found) == 1
    assert found[0].filename == __file__
    assert same(clamped, silent(model, method, images.clamp(0, 1)))
    silent(model, method, images)
    with pytest.raises(InputValueError, match=r'inputs="normalized".*out_of_range="clamp"'):
        METHODS[method](model, beyond(0.51))
    with pytest.raises(InputValueError, match="8-bit"):
        METHODS[method](model, 255 * uniform(2, *SHAPE, seed=1))


@pytest.mark.parametrize("method", METHODS)
def test_auto_clamps_in_silence_where_a_gradient_is_wanted(method: str) -> None:
    model = wrapped()
    images = beyond(3.0).requires_grad_()
    assert same(silent(model, method, images), silent(model, method, images.detach().clamp(0, 1)))
    with torch.no_grad(), pytest.raises(InputValueError):
        METHODS[method](model, images)
    with pytest.raises(InputValueError, match=r"divide by 255 first\.$"):  # no attack left [0, 1] so far
        METHODS[method](model, (255 * uniform(2, *SHAPE, seed=1)).requires_grad_())


@pytest.mark.parametrize("out_of_range", ["auto", "clamp", "raise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_always_refused(out_of_range: str, value: float) -> None:
    images = beyond(0.0)
    images[1, 0, 0, 0] = value
    for given in (images, images.clone().requires_grad_()):
        for method in METHODS.values():
            with pytest.raises(InputValueError, match="finite"):
                method(wrapped(out_of_range=out_of_range), given)


@pytest.mark.parametrize("out_of_range", ["auto", "clamp"])
def test_the_gradient_passes_as_if_nothing_was_clamped(out_of_range: str) -> None:
    model = wrapped(out_of_range=out_of_range)
    images = beyond(0.3)
    found, expected = images.clone().requires_grad_(), images.clamp(0, 1).requires_grad_()
    for leaf in (found, expected):
        model.undefended(leaf)[:, 0].sum().backward()
    assert found.grad is not None
    assert torch.equal(found.grad, expected.grad)  # pyright: ignore[reportArgumentType]
    assert found.grad[1, 0, 0, 0] != 0


def test_values_within_the_tolerance_stay_as_they_are_whatever_the_batch() -> None:
    model = wrapped()
    images = beyond(0.2)
    images[0, 0, 0, 0] = 1 + 9e-5
    with pytest.warns(InputRangeWarning):
        together = model.undefended(images)
    assert torch.equal(together[:1], model.undefended(images[:1]))
    assert not torch.equal(together[:1], model.undefended(images[:1].clamp(0, 1)))


def test_normalised_images_follow_the_same_rule() -> None:
    mean, std = 0.4, 0.25
    options: dict[str, Any] = {"normalize": (mean, std), "inputs": "normalized"}
    images = (beyond(0.2) - mean) / std
    with pytest.warns(InputRangeWarning, match=r"lie in \[-0.2, 1.2\].*mean and std those"):
        wrapped(**options).undefended(images)
    silent(wrapped(**options, out_of_range="clamp"), "forward", images)
    with pytest.raises(InputValueError, match="mean and std those"):
        wrapped(**options, out_of_range="raise").undefended(images)
    with pytest.raises(InputValueError, match="mean and std those"):
        wrapped(**options).undefended(10 * images)
    rounded = ((uniform(2, *SHAPE, seed=1) - mean) / std).half()
    silent(wrapped(**options, out_of_range="raise"), "forward", rounded)


def test_copies_keep_the_option_and_it_is_part_of_the_description() -> None:
    model = wrapped(out_of_range="clamp")
    for made in (model.variant(), model.variant(seed=3), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.preprocessing.out_of_range == "clamp"
        assert "out_of_range='clamp'" in repr(made)
        silent(made, "forward", beyond(3.0))
    assert model.variant(out_of_range="raise").preprocessing.out_of_range == "raise"
    assert describe_model(model)["out_of_range"] == "clamp"
    with pytest.raises(SettingsError, match="'auto', 'clamp', 'raise'"):
        wrapped(out_of_range="clip")


def library_attacks(norm: str) -> dict[str, Attack]:
    """The package's own attacks that are a library's."""
    threat = THREATS[norm]
    return {
        "APGD": APGD(threat, steps=3),
        "Square": Square(threat, queries=6),
        "AutoAttack": AutoAttack(threat, version="rand", steps=2, eot=1),
        "AutoAttack standard": AutoAttack(threat, version="standard", steps=2, queries=4),
    }


@pytest.mark.parametrize("norm", THREATS)
@pytest.mark.parametrize("name", [*suite(THREATS["linf"]), *library_attacks("linf")])
def test_the_packages_own_attacks_never_leave_the_range(norm: str, name: str) -> None:
    images, labels = labelled(2)
    model = wrapped(out_of_range="raise").eval()
    attack = (suite(THREATS[norm]) | library_attacks(norm))[name]
    attack(model, images.round(decimals=1), labels)
