"""What the record names and a default is, levels that are not the backbone's, and how purifiers are written."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAP, CMAPSettings, PurifiedClassifier
from cmap_defense.backbones import load_backbone
from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry.entry import LocalFolder, RegistryEntry
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.errors import BackboneFileError, OptionError, SettingsError, UnknownNameError, WrongKindError
from cmap_defense.purifiers import ADP, GDMP, GNSP, BackbonePair, Chain, DiffPure, LikelihoodMaximisation, OneStep
from cmap_defense.purifiers.choice import preset_purifier
from cmap_defense.purifiers.names import purifier_from_dict
from denoisers import CurvedDenoiser
from toys import ToyBackbone, uniform

SHAPE = (3, 8, 6)
FAST = {"purifier": "one-step", "level": 0.3, "n_latents": 2}
BALANCED = {"purifier": "cmap", "level": 1.0, "n_latents": 3, "iterations": 2, "schedule": "cosine"}
CHAIN = {"purifier": "chain", "purifiers": [FAST, BALANCED], "handed_on": "mean"}
RECORDED = {"n_latents": 2, "iterations": 3, "ssim_weight": 1.0, "schedule": "cosine", "stop_decrease": 0.1}


class Restoring(ToyBackbone):
    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.generate(noisy / (1 + sigma))


def record(presets: dict[str, Any]) -> BackboneRecord:
    config: dict[str, Any] = {"network_config": {}, "noise": {}, "image_shape": SHAPE, "weights_sha256": ""}
    return BackboneRecord(name="toy", network="ToyBackbone", presets=presets, **config)


def backbone(presets: dict[str, Any] | None = None) -> Any:
    made: Any = Restoring(SHAPE).requires_grad_(False)
    made.default_settings = RECORDED
    made.record = None if presets is None else record(presets)
    return made


def classify(images: Tensor) -> Tensor:
    return images.flatten(1)[:, :4]


def wrapped(made: Any, **options: Any) -> PurifiedClassifier:
    return PurifiedClassifier(classify, made, **options)


@pytest.mark.parametrize("presets", [None, {}, {"fast": FAST}])
def test_paper_is_the_published_method_with_the_constants_of_the_record(presets: Any) -> None:
    model = wrapped(backbone(presets), preset="paper")
    assert model.purifier == CMAP(CMAPSettings(n_latents=2, iterations=3, ssim_weight=1.0))
    assert wrapped(backbone()).settings == CMAPSettings.from_dict(RECORDED)  # without a preset all that it names


def test_published_settings_are_all_that_are_not_ours() -> None:
    ours = {"schedule", "level", "stop_decrease", "stop_window", "stop_agreement", "tolerance", "l1_smoothing"}
    changed = CMAPSettings(
        n_latents=2, iterations=3, learning_rate=1.0, betas=(0.1, 0.2), eps=1.0, ssim_weight=1.0, latent_weight=1.0
    )
    mixed = changed.replace(
        schedule="cosine", stop_decrease=0.1, stop_window=1, stop_agreement=1, tolerance=0.1, l1_smoothing=0.1
    )
    assert mixed.as_published() == changed
    assert mixed.replace(level=1.0, iterations=0).as_published() == CMAPSettings()
    differing = {f.name for f in dataclasses.fields(changed) if getattr(changed, f.name) != f.default}
    assert differing == {field.name for field in dataclasses.fields(changed)} - ours


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (FAST, OneStep(level=0.3, n_latents=2)),
        (BALANCED, CMAP(CMAPSettings(level=1.0, n_latents=3, iterations=2, schedule="cosine"))),
        (
            CHAIN,
            Chain(
                OneStep(level=0.3, n_latents=2),
                CMAP(CMAPSettings(level=1.0, n_latents=3, iterations=2, schedule="cosine")),
                handed_on="mean",
            ),
        ),
    ],
)
def test_a_record_names_a_purifier_with_its_settings(values: dict[str, Any], expected: Any) -> None:
    made = backbone({"fast": values})
    made.record = BackboneRecord.from_json(made.record.to_json())
    model = wrapped(made, preset="fast", seed=0)
    assert model.purifier == expected
    images = uniform(2, *SHAPE, seed=1)
    torch.testing.assert_close(model(images), wrapped(made, purifier=expected, seed=0)(images))
    assert model.variant(preset="paper").purifier.settings.level is None  # pyright: ignore[reportAttributeAccessIssue]
    assert wrapped(made).variant(preset="fast").purifier == expected


@pytest.mark.parametrize("name", ["fashion-mnist-ct", "fashion-mnist-edm"])
def test_the_presets_of_packaged_models_defend(name: str) -> None:
    images, labels = (part[:8] for part in load_test_images())
    presets = load_backbone(name).record.presets  # pyright: ignore[reportOptionalMemberAccess]
    assert presets
    for preset, values in presets.items():
        model = PurifiedClassifier(load_classifier(), name, preset=preset, seed=0).eval()
        assert model.purifier == purifier_from_dict(values)
        assert (model.predict(images).labels == labels).float().mean() >= 0.5


@pytest.mark.parametrize(
    ("presets", "expected"),
    [
        ({"fast": FAST, "balanced": BALANCED}, purifier_from_dict(BALANCED)),
        ({"fast": FAST}, purifier_from_dict(FAST)),
        ({}, CMAP(CMAPSettings.from_dict(RECORDED))),
        (None, CMAP(CMAPSettings.from_dict(RECORDED))),
    ],
)
def test_without_a_choice_the_record_decides(presets: Any, expected: Any) -> None:
    made = backbone(presets)
    assert wrapped(made).purifier == expected
    assert wrapped(made, purifier=OneStep()).purifier == OneStep()
    assert wrapped(made, settings=CMAPSettings(n_latents=3)).purifier.n_latents == 3


def test_a_denoiser_without_presets_needs_a_purifier(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongKindError, match="take a purifier that denoises, such as OneStep"):
        wrapped(CurvedDenoiser())
    monkeypatch.setattr("cmap_defense.backbones.load.resolve_backbone", lambda *_: pytest.fail("was fetched"))
    for wanted in ({}, {"preset": "paper"}, {"purifier": CMAP()}):
        with pytest.raises(WrongKindError, match="'cifar10-edm' is a denoiser, and a consistency model is needed"):
            wrapped("cifar10-edm", **wanted)


def test_a_pair_has_the_presets_of_both_that_run_on_their_own_backbone() -> None:
    denoiser: Any = CurvedDenoiser()
    denoiser.record = record({"fast": FAST, "balanced": FAST})
    restoring = backbone({"balanced": BALANCED | {"level": None}, "fast": BALANCED})  # a level takes the denoiser
    pair = BackbonePair(restoring, denoiser)
    assert preset_purifier(pair, "fast") == OneStep(level=0.3, n_latents=2)
    assert preset_purifier(pair, "balanced").n_latents == 3
    assert preset_purifier(pair, "paper").n_latents == 2


@pytest.mark.parametrize(
    ("made", "name", "error", "message"),
    [
        (backbone({"balanced": BALANCED}), "fast", UnknownNameError, "no preset 'fast', but has 'paper', 'balanced'"),
        (backbone(), "balanced", UnknownNameError, r"but has 'paper'\. Take another purifier"),
        (CurvedDenoiser(), "paper", UnknownNameError, "no preset 'paper', nor any other"),
        (backbone(), "quick", SettingsError, "preset must be one of 'paper', 'balanced', 'fast'"),
        (
            backbone({"fast": {"purifier": "one-step", "level": -1}}),
            "fast",
            BackboneFileError,
            "'fast' in the backbone's",
        ),
        (backbone({"fast": {"purifier": "two-step"}}), "fast", BackboneFileError, "no purifier 'two-step'"),
    ],
)
def test_presets_that_are_not_there(made: nn.Module, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        wrapped(made, preset=name)


@pytest.mark.parametrize("other", [{"settings": CMAPSettings()}, {"purifier": OneStep()}])
def test_a_preset_stands_alone(other: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="Give settings, purifier or preset, one of them"):
        wrapped(backbone({"fast": FAST}), preset="fast", **other)
    with pytest.raises(SettingsError, match="one of them"):
        wrapped(backbone({"fast": FAST})).variant(preset="fast", **other)


@pytest.mark.parametrize("wrong", [{"quick": FAST}, {"paper": FAST}, {"fast": {"level": 1}}, {"fast": "one-step"}, []])
def test_records_and_entries_refuse_presets_of_another_form(wrong: Any) -> None:
    with pytest.raises(SettingsError, match="presets"):
        record(wrong)
    place: Any = {"sources": (LocalFolder(folder="somewhere"),), "image_shape": SHAPE}  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingsError, match="presets"):
        RegistryEntry(name="toy", description="", presets=wrong, **place)


@pytest.mark.parametrize(
    ("purifier", "message"),
    [
        (
            OneStep(level=3.0),
            r"OneStep\.level is 3\.0, but the backbone was trained for levels up to 2: choose a lower level",
        ),
        (DiffPure(t=1000), r"DiffPure\.t is 1000, noise of level 157.*choose a lower t\."),
        (GDMP(t=900), r"GDMP\.t is 900, noise of level .*choose a lower t\."),
        (GNSP(rounds=(30, 900)), r"GNSP\.rounds is \(30, 900\), noise of level"),
        (ADP(noise=1.5), r"ADP\.noise is 1\.5, noise of level 3,"),
        (
            LikelihoodMaximisation(sigmas=(0.4, 2.5)),
            r"LikelihoodMaximisation\.sigmas is \(0\.4, 2\.5\), noise of level 2\.5",
        ),
        (CMAP(CMAPSettings(level=2.5)), r"CMAP\.level is 2\.5, but"),
        (Chain(OneStep(level=0.5), DiffPure(t=1000)), r"DiffPure\.t is 1000"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_levels_above_the_backbones_are_refused_when_the_model_is_made(purifier: Any, message: str) -> None:
    denoiser: Any = CurvedDenoiser()
    denoiser.noise = NoiseRange(sigma_max=2.0)
    with pytest.raises(SettingsError, match=message):
        wrapped(denoiser, purifier=purifier)
    with pytest.raises(SettingsError, match=message):
        purifier(denoiser, uniform(2, *SHAPE, seed=1), seeds=torch.arange(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OneStep(0.4), r"OneStep takes its options by name, such as OneStep\(level=0\.4\)"),  # pyright: ignore[reportCallIssue]
        (lambda: DiffPure(75, "ode"), r"such as DiffPure\(t=75, solver='ode'\)"),  # pyright: ignore[reportCallIssue]
        (lambda: CMAPSettings(4), r"such as CMAPSettings\(n_latents=4\)"),  # pyright: ignore[reportCallIssue]
        (lambda: CMAP(n_latents=3), r"option of CMAPSettings: CMAP\(CMAPSettings\(n_latents=3\)"),  # pyright: ignore[reportCallIssue]
    ],
)
def test_settings_are_given_by_name(make: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_a_class_is_no_purifier() -> None:
    with pytest.raises(SettingsError, match=r"not a class: write OneStep\(\)\."):
        wrapped(backbone(), purifier=OneStep)
