"""Predictions that may be withheld."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense import PurifiedClassifier
from cmap_defense.classifier.prediction import calibration_of, prediction_of
from cmap_defense.errors import InputValueError, SettingsError
from cmap_defense.purifiers import OneStep
from cmap_defense.results import PurificationResult


class Blur(nn.Module):
    """A denoiser that keeps the mean of the rows."""

    kind = "denoiser"
    image_shape = (1, 4, 6)

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return noisy.mean(dim=2, keepdim=True).expand_as(noisy).clamp(-1, 1)


def model(**options: object) -> PurifiedClassifier:
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)).eval()
    return PurifiedClassifier(classifier, Blur(), purifier=OneStep(level=0.2, n_latents=3), **options)  # type: ignore[arg-type]


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_a_prediction_says_what_purify_and_the_bare_classifier_say() -> None:
    defended, x = model(), images(5)
    found = defended.predict(x, seeds=range(5))
    with torch.no_grad():
        result = defended.purify(x, seeds=range(5))
        bare = defended.undefended(x).argmax(1)
    probabilities = result.logits.softmax(-1).mean(1)
    rows = torch.arange(5)
    assert torch.equal(found.labels, result.labels)
    assert torch.equal(found.votes, result.votes)
    torch.testing.assert_close(found.confidence, probabilities[rows, result.labels])
    torch.testing.assert_close(found.agreement, probabilities[rows, bare])
    nearest = torch.stack([(result.images[:, k] - x).abs().mean((1, 2, 3)) for k in range(3)]).amin(0)
    torch.testing.assert_close(found.distance, nearest)
    assert found.abstained is None
    assert found.unrestored is None
    assert "5 images" in repr(found)


def test_the_bare_classifier_is_called_as_elsewhere() -> None:
    """In chunks of ``max_parallel``, and never with an empty batch."""
    sizes: list[int] = []
    inner = model().classifier

    def classifier(shown: Tensor) -> Tensor:
        sizes.append(len(shown))
        return inner(shown)

    defended = PurifiedClassifier(classifier, Blur(), purifier=OneStep(level=0.2, n_latents=2), max_parallel=2)
    assert len(defended.predict(images(5)).labels) == 5
    assert defended.predict(images(0)).agreement.shape == (0,)
    assert set(sizes) == {1, 2}


def test_a_refused_calibration_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    defended = model(seed=0)
    before = defended.calibrate(images(8))
    with pytest.raises(InputValueError):
        defended.calibrate(images(0))
    monkeypatch.setattr(defended, "predict", None)
    with pytest.raises(SettingsError, match="coverage"):
        defended.calibrate(images(8), coverage=2.0)
    assert defended.calibration is before


def test_normalised_inputs_and_other_images_are_predicted_alike() -> None:
    x = images(2)
    normalised = model(normalize=(0.4, 0.2), inputs="normalized")
    plain = model(normalize=(0.4, 0.2))
    first, second = normalised.predict((x - 0.4) / 0.2, seeds=[1, 2]), plain.predict(x, seeds=[1, 2])
    torch.testing.assert_close(first.distance, second.distance)
    torch.testing.assert_close(first.agreement, second.agreement)
    assert len(plain.predict((x[0, 0] * 255).byte().numpy(), seeds=[1]).labels) == 1


@given(
    count=st.integers(1, 40),
    coverage=st.floats(0.05, 1),
    restored=st.floats(0.05, 1),
    score=st.sampled_from(["confidence", "agreement"]),
    seed=st.integers(0, 99),
)
def test_at_least_the_wanted_shares_of_clean_images_are_kept_and_not_one_more_than_needed(
    count: int, coverage: float, restored: float, score: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, shown = (torch.rand(count, *shape, generator=generator) for shape in ((1, 2, 3), (2, 1, 2, 3)))
    logits, bare = (torch.randn(count, *shape, generator=generator) for shape in ((2, 3), (3,)))
    votes = torch.ones(count, 3, dtype=torch.int64)
    result = PurificationResult(shown, shown, logits=logits, labels=logits.mean(1).argmax(1), votes=votes)
    chosen = calibration_of(prediction_of(result, x, bare, None), coverage=coverage, restored=restored, score=score)
    again = prediction_of(result, x, bare, chosen)
    assert again.abstained is not None
    assert again.unrestored is not None
    kept, near = (~again.abstained).double().mean().item(), (~again.unrestored).double().mean().item()
    assert chosen.coverage == kept
    assert chosen.restored == near
    assert coverage - 1e-9 <= kept
    assert restored - 1e-9 <= near
    if len(again.score(score).unique()) == count:
        assert kept <= coverage + 1 / count + 1e-9


def test_calibrating_flags_what_the_generator_cannot_restore() -> None:
    defended = model()
    flat = images(40).mean(dim=2, keepdim=True).expand(-1, -1, 4, -1)
    chosen = defended.calibrate(flat, coverage=0.9, restored=1.0, seeds=range(40))
    assert defended.calibration is chosen
    assert chosen.images == 40
    found = defended.predict(images(6, 1).round(), seeds=range(6))
    assert found.unrestored is not None
    assert found.unrestored.all()
    assert "6 unrestored" in repr(found)
    assert defended.variant(vote="soft").calibration is None


@pytest.mark.parametrize("options", [{"coverage": 0.0}, {"restored": 1.5}, {"score": "votes"}])
def test_wrong_shares(options: dict) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        model().calibrate(images(2), **options)


def test_nothing_to_calibrate_on() -> None:
    with pytest.raises(InputValueError, match="no images"):
        model().calibrate(images(0))
