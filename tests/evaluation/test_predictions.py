"""Predictions with independent noise: functions of image, index and number alone, and what is recorded of them."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attack_toys import CLASSES, QUICK, Linear, Noisy, labelled, linear, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.cmap.voting import majority_label
from cmap_defense.errors import ClassifierError
from cmap_defense.evaluation.predictions import Predictions, predict, vote_iterations
from cmap_defense.evaluation.protocol import prediction_seeds
from cmap_defense.purifiers import CMAP, Chain, Identity, OneStep
from cmap_defense.results import History

INDICES = torch.tensor([4, 0, 2**40 + 1, 17, 9])
NUMBERS = (0, 3, 1)


def shaken(images: Tensor) -> Tensor:
    """A random model that draws from torch's global generator."""
    return linear(images + torch.randn_like(images))


MODELS: dict[str, Callable[[], Any]] = {
    "label": wrapped,
    "soft": lambda: wrapped(vote="soft", settings=QUICK.replace(n_latents=3)),
    "in chunks": lambda: wrapped(max_parallel=3),
    "resized": lambda: wrapped(resize="area"),
    "fixed": lambda: wrapped(seed=5),
    "seeded": lambda: Noisy(2.0),
    "seeded and fixed": lambda: Noisy(2.0, seed=5),
    "network": Linear,
    "function": lambda: linear,
    "one step": lambda: wrapped(settings=None, purifier=OneStep(level=0.3, n_latents=3)),
    "identity": lambda: wrapped(settings=None, purifier=Identity()),
    "chain": lambda: wrapped(
        settings=None, purifier=Chain(OneStep(level=0.3, n_latents=2), CMAP(QUICK), handed_on="mean")
    ),
}
PURIFIED = ("label", "soft", "in chunks", "resized", "fixed")


def images_for(name: str) -> tuple[Tensor, Tensor]:
    return labelled(len(INDICES), size=(11, 7) if name == "resized" else (8, 6))


def assert_equal(found: Predictions, expected: Predictions) -> None:
    """The same but for rounding."""
    assert torch.equal(found.labels, expected.labels)
    for name in ("one_latent", "vote_right"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert found.loop.keys() == expected.loop.keys()
    for name, values in found.loop.items():
        torch.testing.assert_close(values, expected.loop[name], rtol=1e-4, atol=1e-5)
    if found.purified is not None:
        assert expected.purified is not None
        assert (found.purified.int() - expected.purified.int()).abs().max() <= 1


def rows(predictions: Predictions, index: list[int]) -> Predictions:
    """Of some of the images."""
    return Predictions(
        predictions.labels[:, index],
        None if predictions.one_latent is None else predictions.one_latent[:, index],
        None if predictions.purified is None else predictions.purified[index],
        {name: values[:, index] for name, values in predictions.loop.items()},
        None if predictions.vote_right is None else predictions.vote_right[:, index],
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_predictions_about_an_image_do_not_depend_on_its_batch(name: str) -> None:
    """Alone, in another order, or among others: the same labels, the same figures."""
    model = MODELS[name]()
    images, labels = images_for(name)
    whole = predict(model, images, labels, INDICES, NUMBERS)
    assert whole.labels.shape == (len(NUMBERS), len(images))
    for index in ([3, 0, 4, 1, 2], [2], [4, 1]):
        assert_equal(predict(model, images[index], labels[index], INDICES[index], NUMBERS), rows(whole, index))


@pytest.mark.parametrize("name", ["one step", "identity", "chain"])
def test_what_is_noted_of_purifiers_other_than_cmap(name: str) -> None:
    model, (images, labels) = MODELS[name](), images_for(name)
    found = predict(model, images, labels, INDICES, NUMBERS)
    results = [model.purify(images, seeds=prediction_seeds(INDICES, number)) for number in NUMBERS]
    assert torch.equal(found.labels, torch.stack([result.labels for result in results]))
    shares = [(result.logits.argmax(dim=2) == labels[:, None]).float().mean(dim=1) for result in results]
    assert found.one_latent is not None
    torch.testing.assert_close(found.one_latent, torch.stack(shares))
    assert found.vote_right is None
    assert bool(found.loop) == (name == "chain")


@pytest.mark.parametrize("name", ["label", "seeded"])
def test_a_number_is_a_noise_of_its_own_whatever_the_others_are(name: str) -> None:
    model = MODELS[name]()
    images, labels = images_for(name)
    one_by_one = [predict(model, images, labels, INDICES, [number]).labels for number in range(8)]
    assert torch.equal(predict(model, images, labels, INDICES, range(8)).labels, torch.cat(one_by_one))
    assert torch.equal(predict(model, images, labels, INDICES, NUMBERS).labels, torch.cat(one_by_one)[list(NUMBERS)])
    assert (torch.cat(one_by_one) != one_by_one[0]).any()
    other_run = predict(model, images, labels, INDICES + 2**40, range(8)).labels
    assert not torch.equal(other_run, torch.cat(one_by_one))


@pytest.mark.parametrize("name", [*MODELS, "random"])
def test_torchs_generators_are_left_alone_and_have_no_say(name: str) -> None:
    model = shaken if name == "random" else MODELS[name]()
    images, labels = images_for(name)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(predict(model, images, labels, INDICES, range(6)))
        assert torch.equal(torch.get_rng_state(), before)
    assert_equal(*found)
    if name == "random":
        assert (found[0].labels != found[0].labels[0]).any()


@pytest.mark.parametrize("name", ["fixed", "seeded and fixed"])
def test_a_model_with_a_seed_of_its_own_gives_one_answer(name: str) -> None:
    model = MODELS[name]()
    images, labels = images_for(name)
    predictions = predict(model, images, labels, INDICES, range(4))
    assert torch.equal(predictions.labels, model(images).argmax(dim=1).expand(4, -1))
    elsewhere = predict(model, images, labels, INDICES + 1, range(4))
    assert torch.equal(elsewhere.labels, predictions.labels)


@pytest.mark.parametrize("name", ["label", "soft", "in chunks", "resized", "seeded"])
def test_the_labels_are_those_of_the_model_with_the_predictions_noise(name: str) -> None:
    model = MODELS[name]()
    images, labels = images_for(name)
    with torch.no_grad():
        expected = [model(images, seeds=prediction_seeds(INDICES, number)).argmax(dim=1) for number in NUMBERS]
    assert torch.equal(predict(model, images, labels, INDICES, NUMBERS).labels, torch.stack(expected))


@pytest.mark.parametrize("name", PURIFIED)
def test_what_is_noted_of_a_purified_classifier(name: str) -> None:
    """Against the purifications done once more, with a hook that collects what the loop had on the way."""
    model: PurifiedClassifier = MODELS[name]()
    images, labels = images_for(name)
    found = predict(model, images, labels, INDICES, NUMBERS)

    states = []
    results = []
    for number in NUMBERS:
        seeds = None if name == "fixed" else prediction_seeds(INDICES, number)
        with torch.no_grad(), model.register_step_hook(states.append):
            results.append(model.purify(images, seeds=seeds))

    shares = [(result.logits.argmax(dim=2) == labels[:, None]).double().mean(dim=1) for result in results]
    assert found.one_latent is not None
    torch.testing.assert_close(found.one_latent.double(), torch.stack(shares))

    assert set(found.loop) == {field.name for field in dataclasses.fields(History)}
    for field, values in found.loop.items():
        mean = torch.stack([getattr(result.history, field) for result in results]).mean(dim=0)
        torch.testing.assert_close(values, mean, rtol=1e-5, atol=1e-6)
        assert values.shape == (model.settings.iterations, len(images))

    first = results[0]
    versions = zip(images, first.images, first.logits.argmax(dim=2), found.labels[0], strict=True)
    shown = [
        min(
            agreeing if (agreeing := purified[own == label]).numel() else purified,
            key=lambda x: (x - image).abs().sum(),
        )
        for image, purified, own, label in versions
    ]
    assert found.purified is not None
    assert found.purified.dtype == torch.uint8
    assert torch.equal(found.purified, (torch.stack(shown) * 255).round().to(torch.uint8))

    vote_right = []
    for state in states[: model.settings.iterations]:
        resized = model.preprocessing.resized((state.generated.flatten(0, 1) + 1) / 2, images.shape[2:])
        logits = Linear()(resized).unflatten(0, state.latents.shape[:2])
        vote = logits.softmax(dim=2).mean(dim=1).argmax(dim=1) if name == "soft" else majority_label(logits)
        vote_right.append(vote == labels)
    vote_right.append(found.labels[0] == labels)
    assert found.vote_right is not None
    assert vote_iterations(model.settings.iterations) == [0, 1, 2, 3]
    assert torch.equal(found.vote_right, torch.stack(vote_right))
    assert len(model._step_hooks) == 0


def test_an_image_that_stopped_keeps_its_last_vote() -> None:
    """The vote after its last iteration, and not that of the last iteration at which votes are taken."""
    images, labels = labelled(24)
    indices = torch.arange(24)
    model = wrapped(settings=QUICK.replace(iterations=40, stop_agreement=2, n_latents=3, learning_rate=0.3))
    found = predict(model, images, labels, indices, range(1))
    made = model.purify(images, seeds=prediction_seeds(indices, 0)).iterations
    assert made is not None
    assert found.vote_right is not None
    assert (made < 40).any()
    for image, stop in enumerate(made.tolist()):
        after = [n for n, iteration in enumerate(vote_iterations(40)) if iteration >= stop]
        assert (found.vote_right[after, image] == (found.labels[0, image] == labels[image])).all()


@pytest.mark.parametrize("logits", [torch.full((5, CLASSES), torch.nan), torch.zeros(4, CLASSES), torch.zeros(5)])
def test_predictions_that_are_no_logits_are_refused(logits: Tensor) -> None:
    images, labels = images_for("function")
    with pytest.raises(ClassifierError):
        predict(lambda images: logits, images, labels, INDICES, range(2))


def test_latents_at_a_level_without_iterations_have_no_history() -> None:
    images, labels = images_for("label")
    model = wrapped(settings=QUICK.replace(level=0.5, iterations=0))
    found = predict(model, images, labels, INDICES, range(2))
    seeds = [prediction_seeds(INDICES, number) for number in range(2)]
    assert torch.equal(found.labels, torch.stack([model.purify(images, seeds=own).labels for own in seeds]))
    assert found.vote_right is None
    assert all(len(values) == 0 for values in found.loop.values())
    assert vote_iterations(0) == [0]


@given(iterations=st.integers(1, 400))
def test_the_vote_is_taken_from_beginning_to_end(iterations: int) -> None:
    found = vote_iterations(iterations)
    assert (found[0], found[-1]) == (0, iterations)
    assert found == sorted(set(found))
    assert len(found) == min(iterations, 10) + 1
    gaps = {later - earlier for earlier, later in itertools.pairwise(found)}
    assert max(gaps) <= min(gaps) + 2


def test_an_image_that_stops_early_keeps_its_last_values_and_vote() -> None:
    images, labels = labelled(2)
    images = torch.cat([images[:1], 0.5 + 0 * images[1:]])
    full = QUICK.replace(iterations=12, learning_rate=0.05)
    early = full.replace(stop_decrease=0.07, stop_window=1)
    model = wrapped(settings=early)
    result = model.purify(images, seeds=prediction_seeds(torch.arange(2), 0))
    assert result.iterations is not None
    assert len(result.iterations.unique()) == 2
    found = predict(model, images, labels, torch.arange(2), range(1))
    for b, made in enumerate(result.iterations.tolist()):
        loop = predict(wrapped(settings=full), images, labels, torch.arange(2), range(1)).loop["total"][:, b]
        torch.testing.assert_close(found.loop["total"][:made, b], loop[:made], rtol=1e-5, atol=1e-5)
        assert (found.loop["total"][made:, b] == found.loop["total"][made - 1, b]).all()
