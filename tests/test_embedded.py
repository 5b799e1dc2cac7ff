"""What ships with the package does what its card says."""

import pytest
import torch

from cmap_defense import CMAPSettings, PurifiedClassifier, load_backbone
from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.backbones.folder import read_record
from cmap_defense.backbones.registry import registry_entry
from cmap_defense.common.rng import draw_latents
from cmap_defense.embedded import ASSETS, CLASS_NAMES, load_classifier, load_test_images
from cmap_defense.errors import ClassifierWarning, SettingsError
from cmap_defense.purifiers import CMAP, OneStep


def test_images_and_classifier() -> None:
    images, labels = load_test_images()
    assert images.shape == (256, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert images.max() == 1
    assert labels.shape == (256,)
    assert set(labels.tolist()) == set(range(len(CLASS_NAMES)))
    with torch.no_grad():
        assert (load_classifier()(images).argmax(1) == labels).float().mean() > 0.88


def test_the_adapted_classifier_knows_what_it_was_adapted_to() -> None:
    images, labels = load_test_images()
    adapted = load_classifier("fashion-mnist-adapted")
    model = PurifiedClassifier(adapted, "fashion-mnist-ct")  # a warning would be an error
    with torch.no_grad():
        assert (model(images, seeds=range(256)).argmax(1) == labels).float().mean() > 0.84
    with pytest.warns(ClassifierWarning, match="another backbone: to a backbone with weights 4227423589bc, and is"):
        PurifiedClassifier(adapted, "fashion-mnist-edm", purifier=OneStep(level=0.6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_the_backbone_is_no_difference(dtype: torch.dtype) -> None:
    for loaded, cast in ((torch.float32, dtype), (dtype, None), (dtype, torch.float32)):
        adapted = load_classifier("fashion-mnist-adapted")
        own, other = (load_backbone(name, dtype=loaded) for name in ("fashion-mnist-ct", "fashion-mnist-edm"))
        PurifiedClassifier(adapted, own, dtype=cast)  # a warning would be an error
        with pytest.warns(ClassifierWarning, match="another backbone"):
            PurifiedClassifier(adapted, other, purifier=OneStep(level=0.6), dtype=cast)


def test_a_backbone_in_float16_is_not_compared() -> None:
    adapted = load_classifier("fashion-mnist-adapted")
    PurifiedClassifier(adapted, load_backbone("fashion-mnist-ct", dtype=torch.float16))
    PurifiedClassifier(adapted, "fashion-mnist-edm", purifier=OneStep(level=0.6), dtype=torch.float16)
    with pytest.warns(ClassifierWarning, match="another purifier: to"):
        PurifiedClassifier(adapted, "fashion-mnist-edm", purifier=OneStep(level=0.5), dtype=torch.float16)


def test_the_adversarially_trained_classifier_needs_no_purifier_and_may_have_any() -> None:
    images, labels = (part[:64] for part in load_test_images())
    trained = load_classifier("fashion-mnist-adversarial")
    result = PGD(ThreatModel(eps=0.05), steps=20)(trained, images, labels)
    assert result.success.float().mean() < 0.35
    PurifiedClassifier(trained, "fashion-mnist-edm", purifier=OneStep(level=0.6))  # a warning would be an error


@pytest.mark.parametrize("name", ["cifar10-adapted", "cifar10-adversarial"])
def test_the_cifar10_classifiers_see_classes_in_what_the_backbone_generates(name: str) -> None:
    """There are no images of CIFAR-10 in the package."""
    classifier = load_classifier(name)
    latents = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = ((load_backbone("cifar10-ct-small").generate(latents) + 1) / 2).clamp(0, 1)
        confidence, labels = classifier(samples).softmax(1).max(dim=1)
        noise = classifier(torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert confidence.mean() > 0.35
    assert len(labels.unique()) >= 8
    assert len(noise.argmax(dim=1).unique()) <= 5
    assert sum(path.stat().st_size for path in (ASSETS.parent / name).iterdir()) < 1e6


def test_the_adapted_cifar10_classifier_belongs_to_one_step_purification() -> None:
    adapted = load_classifier("cifar10-adapted")
    PurifiedClassifier(adapted, "cifar10-edm-small", purifier=OneStep(level=0.3))  # a warning would be an error
    with pytest.warns(ClassifierWarning, match="another purifier"):
        PurifiedClassifier(adapted, "cifar10-edm-small", purifier=OneStep(level=0.5))


def test_an_unknown_classifier_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(SettingsError, match=r"load_classifier.name must be one of 'fashion-mnist', 'fashion-mnist-ad"):
        load_classifier("cifar10")


def test_the_attack_of_the_demo_takes_the_bare_classifier_below_20_percent() -> None:
    classifier = load_classifier()
    images, labels = load_test_images()
    result = PGD(ThreatModel(eps=0.05), steps=20)(classifier, images, labels)
    assert result.success.float().mean() > 0.8


def test_all_assets_together_stay_under_25_mb() -> None:
    files = [path for path in ASSETS.parent.rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert sum(path.stat().st_size for path in files) < 25e6
    assert all(path.stat().st_mode & 0o004 for path in files), "readable for all users of an installation"


def test_the_backbone_generates_clothes_rather_than_noise() -> None:
    backbone = load_backbone("fashion-mnist-ct")
    latents = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = (backbone.generate(latents) + 1) / 2
        confidence = load_classifier()(samples).softmax(1).amax(dim=1).mean()
    images, _ = load_test_images()
    assert abs(samples.mean() - images.mean()) < 0.1
    assert abs(samples.std() - images.std()) < 0.1
    assert confidence > 0.7
    assert samples[:, :, 0, 0].mean() < 0.1, "the corner of a Fashion-MNIST image is black"


def test_the_cifar10_backbone_generates_the_colours_of_cifar10_and_smooth_images() -> None:
    """CIFAR-10's channels have means 0.491, 0.482, 0.447 and standard deviations 0.247, 0.243, 0.262; neighbouring
    pixels are alike, and those of noise are not."""
    latents = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = (load_backbone("cifar10-ct-small").generate(latents) + 1) / 2
    assert samples.shape == (64, 3, 32, 32)
    for channel, (mean, std) in enumerate([(0.491, 0.247), (0.482, 0.243), (0.447, 0.262)]):
        assert abs(samples[:, channel].mean() - mean) < 0.08
        assert abs(samples[:, channel].std() - std) < 0.08
    beside = torch.stack([samples[..., :-1].flatten(), samples[..., 1:].flatten()])
    assert torch.corrcoef(beside)[0, 1] > 0.85
    assert (samples[0::2] - samples[1::2]).abs().mean() > 0.15, "different latents, different images"


@pytest.mark.parametrize("name", ["fashion-mnist-ct", "cifar10-ct-small"])
def test_a_packaged_backbone_finds_its_own_images_again(name: str) -> None:
    """The search leads to latents whose images are nearer to the input than those it began with."""
    backbone = load_backbone(name)
    latents = torch.randn(2, *backbone.image_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        images = ((backbone.generate(latents) + 1) / 2).clamp(0, 1)
        purify = CMAP(CMAPSettings(n_latents=2, iterations=50, learning_rate=0.1))
        found = purify(backbone, images, seeds=torch.arange(2)).images
        first = (backbone.generate(draw_latents(torch.arange(2), 2, backbone.image_shape)[:, 0]) + 1) / 2
    before = (first - images).abs().mean()
    after = (found[:, 0] - images).abs().mean()
    assert after < before / 3


def test_the_defence_recovers_images_whose_attacker_did_not_know_it() -> None:
    classifier = load_classifier()
    images, labels = (tensor[:16] for tensor in load_test_images())
    attacked = PGD(ThreatModel(eps=0.05), steps=20)(classifier, images, labels).images
    defended = PurifiedClassifier(classifier, "fashion-mnist-ct", seed=0)
    with torch.no_grad():
        bare = (classifier(attacked).argmax(1) == labels).sum().item()
        recovered = (defended(attacked).argmax(1) == labels).sum().item()
    assert bare <= 3
    assert recovered >= bare + 5


def test_a_backbone_given_by_name_joins_the_classifiers_device_and_brings_its_settings() -> None:
    model = PurifiedClassifier(load_classifier().to("meta"), "fashion-mnist-ct", preset="paper")
    assert {p.device.type for p in model.backbone.parameters()} == {"meta"}
    record = read_record(registry_entry("fashion-mnist-ct").sources[0].folder)
    assert model.settings.to_dict() | record.settings == model.settings.to_dict()
    assert not any(p.requires_grad for p in model.backbone.parameters())
