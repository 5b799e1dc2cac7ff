"""Images that were attacked elsewhere: found by their clean ones, projected, re-evaluated, part of an evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from attack_toys import labelled, linear
from cmap_defense import ThreatModel, evaluate
from cmap_defense.attacks import PGD, Precomputed
from cmap_defense.errors import EvaluationError, InputTypeError, InputValueError, SettingsError
from cmap_defense.evaluation import Protocol

THREAT = ThreatModel(eps=0.1)
PROTOCOL = Protocol(predictions=2, reevaluations=2, group=2, sanity_images=0, search_on_clean=False)


def test_images_are_found_in_any_order_and_batch() -> None:
    images, labels = labelled(6)
    made = PGD(THREAT, steps=3)(linear, images, labels).images
    precomputed = Precomputed(THREAT, clean=images, adversarial=made)
    order = torch.tensor([4, 0, 5])
    result = precomputed(linear, images[order], labels[order], reevaluations=2)
    torch.testing.assert_close(result.images, made[order])
    assert torch.equal(result.success, linear(made[order]).argmax(dim=1) != labels[order])


def test_the_best_of_several_attempts_is_chosen_and_each_is_projected() -> None:
    images, labels = labelled(4)
    strong = PGD(ThreatModel(eps=0.5), steps=5)(linear, images, labels).images
    result = Precomputed(THREAT, clean=images, adversarial=torch.stack([images, strong], dim=1))(linear, images, labels)
    assert result.candidates.shape[1] == 2
    assert (result.candidates[:, 1] - images).abs().max() <= THREAT.eps + 1e-6
    assert torch.equal(result.chosen, torch.ones(4, dtype=torch.int64))


def test_an_evaluation_takes_them_beside_its_own_and_knows_when_they_change(tmp_path: Path) -> None:
    images, labels = labelled(5)
    made = PGD(THREAT, steps=3)(linear, images, labels).images

    def report(adversarial: torch.Tensor) -> Any:
        attacks = {"elsewhere": Precomputed(THREAT, clean=images, adversarial=adversarial)}
        return evaluate(linear, (images, labels), attacks=attacks, protocol=PROTOCOL, threads=1, out=tmp_path)

    expected = (linear(made).argmax(dim=1) == labels).double().mean().item()
    assert report(made).row("elsewhere").reevaluated.value == pytest.approx(expected)
    assert report(made.clone()).row("elsewhere").reevaluated.value == pytest.approx(expected)
    with pytest.raises(EvaluationError, match="values: "):
        report(made.flip(0))


def test_an_image_that_is_not_there_is_an_error() -> None:
    images, labels = labelled(3)
    with pytest.raises(InputValueError, match="1 of 3 images are none of those"):
        Precomputed(THREAT, clean=images[:2], adversarial=images[:2])(linear, images, labels)


IMAGES = labelled(2)[0]


@pytest.mark.parametrize(
    ("clean", "adversarial", "kind", "message"),
    [
        (IMAGES, IMAGES[:1], InputValueError, r"adversarial must be \[2, 3, 8, 6\], as clean, or \[2, M, 3, 8, 6\]"),
        (IMAGES, IMAGES[:, None][:, :0], InputValueError, "adversarial must be"),
        (IMAGES, IMAGES.numpy(), SettingsError, "adversarial must be a tensor of images"),
        (IMAGES, IMAGES * torch.nan, InputValueError, "NaN"),
        ((IMAGES * 255).byte(), IMAGES, InputTypeError, "uint8"),
    ],
)
def test_what_are_no_images_is_refused(clean: Any, adversarial: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Precomputed(THREAT, clean=clean, adversarial=adversarial)
