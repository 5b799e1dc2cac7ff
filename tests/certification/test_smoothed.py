"""The smoothed classifier: its equation, its noise, what it takes and what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import denoisers
from certified import SHAPE, HalfSpace, images_of
from cmap_defense import CmapError, PurifiedClassifier, SmoothedClassifier, certify, errors
from cmap_defense.certification.smoothed import BLOCK
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.purifiers import OneStep
from denoisers import GaussianDenoiser
from toys import ToyBackbone, noise

FEW: dict[str, Any] = {"n0": 4, "n": 20}


class Recorder(nn.Module):
    """Keeps what it is given; two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.given.append(images)
        return images.flatten(1)[:, :2]


def test_the_base_classifier_is_one_denoising_step_at_twice_sigma() -> None:
    class Watched(GaussianDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            self.seen, self.levels = noisy, [*self.levels, float(sigma)]
            return 0.9 * noisy

    backbone, classifier = Watched(SHAPE), Recorder()
    smoothed = SmoothedClassifier(classifier, backbone, sigma=0.5, normalize=((0.5, 0.4), 0.2))
    noisy = images_of(4) + 0.5 * noise(4, *SHAPE, seed=1)
    smoothed.base_logits(noisy)
    assert backbone.levels == [1.0]
    assert torch.equal(backbone.seen, 2 * noisy - 1)
    assert backbone.seen.abs().max() > 1.5  # not clipped
    clean = 0.9 * backbone.seen
    assert clean.abs().max() > 1  # but this is
    expected = ((clean.clamp(-1, 1) + 1) / 2 - torch.tensor([0.5, 0.4])[:, None, None]) / 0.2
    assert torch.allclose(classifier.given[0], expected, atol=1e-5)


def test_without_a_backbone_the_noise_reaches_the_classifier_as_it_is() -> None:
    classifier, images = Recorder(), images_of(2)
    SmoothedClassifier(classifier, None, sigma=2.0).predict(images, n=300)
    copies = torch.cat(classifier.given[2:])  # behind the two calls that look for a dependence on the batch
    assert len(copies) == 600
    first = (copies[:300] - images[0]) / 2
    assert abs(first.mean().item()) < 5 / first.numel() ** 0.5
    assert abs(first.std().item() - 1) < 4 / first.numel() ** 0.5
    assert len(first.unique()) > 0.99 * first.numel()
    assert (copies[:300] - images[0] - (copies[300:] - images[1])).abs().min() > 0  # the second image has its own


@settings(max_examples=30)
@given(st.integers(0, 2**63), st.integers(0, 100), st.integers(1, 40), st.integers(0, 39))
def test_the_noise_of_a_copy_belongs_to_its_number(key: int, first: int, count: int, place: int) -> None:
    smoothed = SmoothedClassifier(HalfSpace(), None)
    drawn = smoothed.noise(key, first, first + count, SHAPE)
    assert drawn.shape == (count, *SHAPE)
    place %= count
    assert torch.equal(drawn[place], smoothed.noise(key, first + place, first + place + 1, SHAPE)[0])
    assert not torch.equal(drawn[0], smoothed.noise(key, first + BLOCK, first + BLOCK + 1, SHAPE)[0])
    assert not torch.equal(drawn[0], smoothed.noise(key + 1, first, first + 1, SHAPE)[0])


def test_predictions_are_those_of_the_half_space_and_abstain_on_its_border() -> None:
    classifier, images = HalfSpace(), images_of(3)
    classifier.threshold = classifier.margin(images)[0].item()
    smoothed = SmoothedClassifier(classifier, None, sigma=0.1)
    far = images + torch.tensor([0.0, 0.3, -0.3])[:, None, None, None] * classifier.weight - images + images[:1]
    assert smoothed.predict(far.clamp(0, 1), n=200).tolist() == [-1, 1, 0]
    again = smoothed.predict(far.clamp(0, 1)[1:], n=200, batch_size=7, indices=[1, 2])
    assert again.tolist() == [1, 0]


def test_so_few_copies_that_every_prediction_would_be_an_abstention_are_refused() -> None:
    smoothed, images = SmoothedClassifier(HalfSpace(threshold=-1e3), None), images_of(1)
    assert smoothed.predict(images, n=11).tolist() == [1]
    with pytest.raises(errors.SettingsError, match="n of at least 11 with alpha"):
        smoothed.predict(images, n=10)


@pytest.mark.parametrize("name", ["fashion-mnist-ct", "fashion-mnist-edm"])
def test_consistency_models_and_denoisers_take_a_pass_for_each_copy(name: str) -> None:
    images, _ = load_test_images()
    found = certify(SmoothedClassifier(load_classifier(), name), images[:2], **FEW)
    assert found.passes.tolist() == [24, 24]
    assert found.counts.sum(dim=1).tolist() == [20, 20]


def test_a_purified_classifier_gets_seeds_of_its_own_for_each_copy() -> None:
    model = denoisers.model_of(OneStep(level=0.3, n_latents=2), GaussianDenoiser(), seed=None)
    images = denoisers.images_of(2, torch.float32)
    counts = [
        certify(SmoothedClassifier(model, None, sigma=1.0), images, batch_size=size, **FEW).counts for size in (3, 24)
    ]
    assert torch.equal(*counts)
    assert (counts[0] > 0).sum() > 2  # random enough to differ


@pytest.mark.parametrize("seed", [None, 3])
def test_each_copy_is_purified_with_noise_of_its_own(seed: int | None) -> None:
    """A seed of the model's own has no say."""
    seen: list[Tensor] = []

    class Recording(OneStep):
        def __call__(self, backbone: nn.Module, images: Tensor, *, seeds: Tensor, **options: Any) -> Any:
            seen.append(seeds)
            return super().__call__(backbone, images, seeds=seeds, **options)

    model = denoisers.model_of(Recording(level=0.3, n_latents=2), GaussianDenoiser(), seed=seed)
    certify(SmoothedClassifier(model, None), denoisers.images_of(2, torch.float32), batch_size=5, **FEW)
    assert len(torch.cat(seen).unique()) >= 2 * (FEW["n0"] + FEW["n"])


def test_hooks_are_part_of_the_classifier_that_is_smoothed() -> None:
    """Also of one that takes normalised images elsewhere."""
    images, found = denoisers.images_of(2, torch.float32), []
    for options in ({}, {"normalize": (0.5, 0.25), "inputs": "normalized"}):
        for shade in (0.0, None):
            model = denoisers.model_of(OneStep(level=0.3, n_latents=2), GaussianDenoiser(), **options)
            if shade is not None:
                model.register_step_hook(lambda state, shade=shade: torch.full_like(state.images, shade))
            found.append(certify(SmoothedClassifier(model, None, sigma=1.0), images, **FEW).counts)
    assert (found[0] > 0).sum() == (found[2] > 0).sum() == 2, "of one grey the classifier says one class"
    assert (found[1] > 0).sum() > 2
    assert (found[3] > 0).sum() > 2


class MeanOfBatch(nn.Module):
    """What a purifier or a normalisation does that takes statistics of the batch."""

    def forward(self, images: Tensor) -> Tensor:
        return HalfSpace().forward(images - images.mean(dim=0, keepdim=True))


class Coupling(OneStep):
    """A purifier that couples the images of a batch."""

    def reverse(self, run: Any) -> Tensor:
        return super().reverse(run) - run.images.mean(dim=0, keepdim=True)


class Random(nn.Module):
    """Draws from torch's global generator."""

    def forward(self, images: Tensor) -> Tensor:
        return HalfSpace().forward(images) + torch.randn(len(images), 2)


def coupled_purifier() -> PurifiedClassifier:
    return denoisers.model_of(Coupling(level=0.3, n_latents=2), GaussianDenoiser())


@pytest.mark.parametrize(("classifier", "shape"), [(MeanOfBatch, SHAPE), (coupled_purifier, denoisers.SHAPE)])
def test_what_couples_the_copies_of_a_batch_is_refused(classifier: Any, shape: tuple[int, ...]) -> None:
    smoothed = SmoothedClassifier(classifier(), None)
    images = torch.full((2, *shape), 0.4)
    for use in (lambda **more: certify(smoothed, images, **FEW, **more), lambda **more: smoothed.predict(images)):
        with pytest.raises(errors.ClassifierError, match="other images of its batch"):
            use()
    certify(smoothed, images, batch_size=1, **FEW)


def test_a_random_classifier_is_allowed_and_reproducible() -> None:
    state = torch.get_rng_state()
    found = [certify(SmoothedClassifier(Random(), None), images_of(), **FEW).counts for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(torch.get_rng_state(), state)


class Conditional(GaussianDenoiser):
    num_classes = 3


def dropout() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.1), HalfSpace()).train()


@pytest.mark.parametrize(
    ("classifier", "backbone", "images", "error", "message"),
    [
        (HalfSpace, None, images_of() * 255, errors.InputValueError, "divide by 255"),
        (HalfSpace, None, images_of() - 0.5, errors.InputValueError, "normalised"),
        (HalfSpace, None, (images_of() * 255).byte(), errors.InputTypeError, "div"),
        (HalfSpace, None, images_of()[0], errors.InputValueError, "axes"),
        (HalfSpace, None, images_of()[:0], errors.InputValueError, "one image at least"),
        (HalfSpace, None, images_of() * torch.nan, errors.InputValueError, "finite"),
        (HalfSpace, GaussianDenoiser, images_of(), errors.InputValueError, r"denoises images \[3, 8, 6\]"),
        (dropout, None, images_of(), errors.ClassifierError, r"training mode \(Dropout\).*eval"),
        (nn.Identity, None, images_of(), errors.ClassifierError, "logits"),
        (lambda: None, None, images_of(), errors.SettingsError, "takes images"),
        (HalfSpace, Conditional, images_of(), errors.BackboneError, "class-conditional"),
        (HalfSpace, ToyBackbone, images_of(), errors.BackboneError, "denoise"),
        (HalfSpace, lambda: "fashion-mnist-edm", images_of(), errors.InputValueError, "backbone"),
    ],
)
def test_wrong_inputs_say_what_to_do(
    classifier: Any, backbone: Any, images: Tensor, error: type[CmapError], message: str
) -> None:
    for use in (lambda smoothed: smoothed.predict(images), lambda smoothed: certify(smoothed, images, **FEW)):
        with pytest.raises(error, match=message):
            use(SmoothedClassifier(classifier(), None if backbone is None else backbone()))


def test_a_purified_classifier_in_eval_mode_may_be_smoothed_and_one_in_training_mode_not() -> None:
    def smoothed(classifier: nn.Module) -> SmoothedClassifier:
        return SmoothedClassifier(PurifiedClassifier(classifier, GaussianDenoiser(SHAPE), purifier=OneStep()), None)

    assert smoothed(HalfSpace()).predict(images_of()).shape == images_of().shape[:1]
    with pytest.raises(errors.ClassifierError, match=r"training mode \(Dropout\)"):
        smoothed(dropout()).predict(images_of())


def test_sigma_is_positive_and_at_most_half_of_the_strongest_noise() -> None:
    for sigma, message in ((0.0, "above 0"), (41.0, "at most 40"), ("big", "a number")):
        with pytest.raises(errors.SettingsError, match=f"SmoothedClassifier.sigma must be.*{message}"):
            SmoothedClassifier(load_classifier(), "fashion-mnist-edm", sigma)  # pyright: ignore[reportArgumentType]


def test_names_of_other_libraries_lead_to_the_own_ones() -> None:
    with pytest.raises(errors.OptionError, match="It is called 'sigma'"):
        SmoothedClassifier(HalfSpace(), None, scale=0.5)  # pyright: ignore[reportCallIssue]


def test_a_backbone_that_returns_nan_and_a_classifier_of_probabilities_are_noticed() -> None:
    class Broken(GaussianDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            return noisy * torch.nan

    with pytest.raises(errors.BackboneError, match="NaN"):
        SmoothedClassifier(HalfSpace(), Broken(SHAPE)).predict(images_of())
    with pytest.warns(errors.ClassifierWarning, match="sum to 1"):
        SmoothedClassifier(nn.Sequential(HalfSpace(), nn.Softmax(1)), None).predict(images_of(), n=12)


def test_a_purified_classifier_normalises_by_itself() -> None:
    model = PurifiedClassifier(load_classifier(), "fashion-mnist-edm", purifier=OneStep())
    with pytest.raises(errors.SettingsError, match="normalises by itself: leave normalize out"):
        SmoothedClassifier(model, None, normalize=(0.5, 0.25))
