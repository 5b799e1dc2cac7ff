"""Purified images: how near they stay, who judges which, and that nothing depends on the groups."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_msssim import ssim
from torch import Tensor

from attack_toys import QUICK, SHAPE, THREATS, Linear, labelled, linear, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD
from cmap_defense.cmap.voting import majority_label, nearest_voter
from cmap_defense.common.rng import derived_seeds
from cmap_defense.common.statistics import Accuracy
from cmap_defense.data import SelectedImages, Subset
from cmap_defense.quality import Reconstructions, reconstruct
from cmap_defense.quality.reconstruct import PURIFIED
from toys import LinearBackbone

ATTACK = PGD(THREATS["linf"], steps=3, seed=2)
SEED = 4


def images_of(count: int = 5, order: str = "first") -> SelectedImages:
    return SelectedImages.of(labelled(8), Subset(count=count, order=order, seed=1))


def found_of(
    models: dict[str, PurifiedClassifier], images: SelectedImages | None = None, **changes: Any
) -> Reconstructions:
    given = {"attack": ATTACK, "seed": SEED, "group": 2, "on_step": lambda name: None} | changes
    return reconstruct(models, images or images_of(), **given)


def seeds_of(images: SelectedImages) -> Tensor:
    return derived_seeds(derived_seeds(images.positions, PURIFIED), SEED)


def attacked_by(model: Any, images: SelectedImages) -> Tensor:
    return ATTACK(model, images.images, images.labels, indices=images.positions).images


def test_against_the_plain_way() -> None:
    model, images = wrapped().eval(), images_of()
    found = found_of({"own": model}, images)
    with torch.no_grad():
        clean = model.purify(images.images, seeds=seeds_of(images))
        attacked = attacked_by(linear, images)
        recovered = model.purify(attacked, seeds=seeds_of(images))
    versions = clean.images
    assert found.l1 == pytest.approx((versions - images.images[:, None]).abs().mean().item(), rel=1e-5)
    padded = [F.pad(part, (5, 5, 5, 5)) for part in (images.images.repeat_interleave(2, dim=0), versions.flatten(0, 1))]
    assert found.ssim == pytest.approx(ssim(*padded, data_range=1.0).item(), rel=1e-4)
    expected = {
        "clean": linear(images.images).argmax(dim=1),
        "purified": clean.labels,
        "attacked": linear(attacked).argmax(dim=1),
        "attacked_purified": recovered.labels,
    }
    for name, said in expected.items():
        assert isinstance(said, Tensor)
        assert found.accuracies["own"][name] == Accuracy.of(said, images.labels)
    torch.testing.assert_close(found.shown["input"], images.images)
    for name, result in (("purified", clean), ("attacked_purified", recovered)):
        assert result.logits is not None
        assert result.labels is not None
        before = images.images if name == "purified" else attacked
        voter = nearest_voter(before, result.images, result.logits, result.labels)
        torch.testing.assert_close(found.shown[name], result.images[torch.arange(len(voter)), voter])
    torch.testing.assert_close(found.shown["attacked"], attacked)
    assert torch.equal(found.labels, images.labels)
    assert [part.tolist() for part in found.predicted.values()] == [
        part.tolist() for part in expected.values() if isinstance(part, Tensor)
    ]


def test_images_that_the_backbone_can_make_come_back() -> None:
    backbone = LinearBackbone(SHAPE)
    with torch.no_grad():
        made = (backbone.generate(torch.zeros(1, *SHAPE)) + 1) / 2
    model = wrapped(backbone=backbone, settings=QUICK.replace(iterations=200, latent_weight=0.0, learning_rate=0.1))
    images = SelectedImages.of((made.expand(2, -1, -1, -1), torch.zeros(2, dtype=torch.int64)), Subset())
    found = found_of({"own": model.eval()}, images)
    assert found.l1 < 0.002
    assert found.ssim > 0.98


def test_others_judge_the_same_purified_images_and_are_attacked_themselves() -> None:
    model, other = wrapped().eval(), Linear(scale=-1.0)
    beside = PurifiedClassifier(other, model.backbone, settings=model.settings).eval()
    images = images_of()
    found = found_of({"own": model, "other": beside}, images)
    alone = found_of({"own": model}, images)
    assert found.accuracies["own"] == alone.accuracies["own"]
    assert (found.l1, found.ssim) == (alone.l1, alone.ssim)
    assert list(found.accuracies) == ["own", "other"]
    with torch.no_grad():
        versions = model.purify(images.images, seeds=seeds_of(images)).images
        said = majority_label(other(versions.flatten(0, 1)).unflatten(0, versions.shape[:2]))
        assert found.accuracies["other"]["purified"] == Accuracy.of(said, images.labels)
    attacked = attacked_by(other, images)
    with torch.no_grad():
        assert found.accuracies["other"]["attacked"] == Accuracy.of(other(attacked).argmax(dim=1), images.labels)
        recovered = beside.purify(attacked, seeds=seeds_of(images)).labels
    assert recovered is not None
    assert found.accuracies["other"]["attacked_purified"] == Accuracy.of(recovered, images.labels)
    assert found.accuracies["other"]["clean"].correct == 0, "the opposite is right about none"


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    model = wrapped().eval()
    found = [found_of({"own": model}, group=group) for group in (1, 3, 8)]
    for other in found[1:]:
        assert other.accuracies == found[0].accuracies
        assert other.l1 == pytest.approx(found[0].l1, rel=1e-4)
        for name, images in found[0].shown.items():
            torch.testing.assert_close(other.shown[name], images, rtol=1e-4, atol=1e-5)
    positions = images_of(6, "random").positions
    drawn, first = found_of({"own": model}, images_of(6, "random")), found_of({"own": model}, images_of(8))
    assert positions.tolist() != sorted(positions.tolist())
    for name in drawn.shown:
        torch.testing.assert_close(drawn.shown[name], first.shown[name][positions], rtol=1e-4, atol=1e-5)


def test_the_seed_rules_the_noise() -> None:
    model = wrapped().eval()
    first, again, other = (found_of({"own": model}, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.shown["purified"], again.shown["purified"])
    assert not torch.equal(first.shown["purified"], other.shown["purified"])
    assert torch.equal(first.shown["attacked"], other.shown["attacked"]), "the attack has a seed of its own"


def test_each_step_is_reported_and_leaves_nothing_behind() -> None:
    model = wrapped().eval()
    said: list[str] = []
    found_of({"own": model}, on_step=said.append)
    assert said.count("") == 2 * 3 * model.settings.iterations, "twice, in groups of 2 of 5"
    assert [name for name in said if name] == [
        "purifying clean images",
        "attacking own",
        "purifying attacked images for own",
    ]
    assert len(model._step_hooks) == 0
