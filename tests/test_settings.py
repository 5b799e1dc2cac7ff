"""What holds for all settings: wrong values are refused by their name, and what is written as JSON comes back."""

import dataclasses
import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from cmap_defense.attacks import PGD
from cmap_defense.backbones.karras import NoiseRange
from cmap_defense.backbones.ncsnpp import NCSNppConfig
from cmap_defense.backbones.unet import CompactUNetConfig
from cmap_defense.certification import CertificationSettings
from cmap_defense.cmap import CMAPSettings
from cmap_defense.common.settings import Settings
from cmap_defense.data import Subset
from cmap_defense.detection.deep import DeepKernelSettings
from cmap_defense.errors import CmapError, SettingsError
from cmap_defense.evaluation import Protocol
from cmap_defense.gradients import Surrogate
from cmap_defense.purifiers import ADP, GDMP, GNSP, DiffPure, LikelihoodMaximisation, OneStep
from cmap_defense.threat import ThreatModel
from cmap_defense.training import TrainingConfig
from cmap_defense.training.objectives import OBJECTIVES
from training.gaussian import GaussianDenoiser

CD, CT, ECT, EDM, ICT = (OBJECTIVES[name] for name in ("cd", "ct", "ect", "edm", "ict"))
NAN, INF = float("nan"), float("inf")
NEEDED: dict[type[Settings], dict[str, Any]] = {
    CD: {"teacher": GaussianDenoiser(), "teacher_source": {"name": "exact"}},
    CompactUNetConfig: {"image_shape": (3, 8, 4)},
}
"""What some kinds of settings have no default for."""

WRONG_PAIRS = [(0.9, 1.0), (-0.1, 0.99), (0.9, NAN), (True, 0.99), ("0.9", 0.99), {0.9: 1, 0.99: 2}]
WRONG: dict[type[Settings], dict[str, list[Any]]] = {
    CMAPSettings: {
        "n_latents": [0, -3, 2.0, True, "10", None],
        "iterations": [0, -1, 1.5, True, "200"],
        "learning_rate": [0, -0.1, NAN, INF, True, "0.1"],
        "schedule": ["linear", None],
        "eps": [0.0, -1e-8, INF, None],
        "ssim_weight": [-1e-9, NAN, INF, False, [2.0]],
        "latent_weight": [-3.2, NAN, -INF, True, 1j, 10**400],
        "tolerance": [-0.1],
        "betas": [0.9, (0.9,), (0.9, 0.99, 0.999), "ab", None, *WRONG_PAIRS],
        "level": [0.0, -1.0],
        "stop_decrease": [0.0, 1.0],
        "stop_window": [0],
        "stop_agreement": [0],
    },
    TrainingConfig: {"images": [0], "minutes": [0], "batch_size": [1.5], "warmup_images": [-1], "learning_rate": [0.0]}
    | {"betas": [(0.9, 1.0)], "clip_norm": [-1.0], "flip": [1], "precision": ["float16"], "checkpoint_every": [0]}
    | {"ema_half_life": [(), 30_000, (30_000, 0), (30_000, 30_000), (30_000, 0.5)], "seed": [-1], "compile": [None]}
    | {"channels_last": [1], "hold_images": ["no"], "checkpoint_part_mb": [0], "micro_batch": [0], "weights": ["int8"]},
    CD: {"levels": [1], "rho": [0.0], "distance": ["l3"], "huber": [0.1], "target_decay": [1.0, -0.1]},
    CT: {"levels_start": [1], "levels_end": [1, 9.5], "decay_start": [1.0, 0.0], "rho": [0.0]}
    | {"distance": ["pseudo-huber"]},
    ECT: {"sigma_std": [0.0], "halvings": [-1], "halved": [-1], "settle": [1.0], "gap_steepness": [0.0]}
    | {"huber": [-0.1]},
    ICT: {"intervals_start": [0], "intervals_end": [9], "sigma_mean": [NAN], "sigma_std": [0.0], "rho": [-1.0]}
    | {"huber": [0.0]},
    EDM: {"sigma_std": [0.0], "sigma_mean": [INF]},
    OneStep: {"level": [-1]},
    DiffPure: {"t": [1001, 0.1], "solver": ["heun"], "step": [0], "variance": ["learned"], "n_latents": [0]},
    GDMP: {"t": [1001], "guide": ["l1"], "eps": [0], "noise_target": [1]},
    ADP: {"noise": [0], "rate": [0]},
    GNSP: {"rounds": [30, (30, 0)], "eta": [1.5]},
    LikelihoodMaximisation: {"sigmas": [(0.6, 0.4)], "learning_rate": [0]},
    ThreatModel: {"norm": ["l1", "Linf", None, 2], "eps": [-1e-9, NAN, INF, "8/255", True]},
    NoiseRange: {"sigma_min": [0.0, -1.0, NAN], "sigma_max": [0.002, INF, True], "sigma_data": [0, "0.5"]},
    DeepKernelSettings: {"width": [0], "features": [0], "mixing": [1.0], "steps": [-1], "batch_size": [1]}
    | {"learning_rate": [0.0], "regulariser": [0.0], "fgsm_eps": [0.0], "seed": [-1]},
    CertificationSettings: {"n": [0], "alpha": [1.0], "batch_size": [0], "seed": [-1]},
    Protocol: {"predictions": [0, 2.0, True], "reevaluations": [0], "group": [0], "sanity_images": [-1]}
    | {"search_on_clean": [1], "gradient_samples": [0], "seeds": ["01", (0, 0.5)]},
    Subset: {"count": [0, 2.5], "order": ["least"], "seed": [-1, True]},
}
KINDS = [*WRONG, NCSNppConfig, CompactUNetConfig]


def made(kind: type[Settings], **values: Any) -> Any:
    return kind(**NEEDED.get(kind, {}), **values)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, values in WRONG.items() for name in values])
def test_a_wrong_value_is_refused_by_its_name(kind: type[Settings], name: str) -> None:
    for value in WRONG[kind][name]:
        for make in (lambda **values: made(kind, **values), made(kind).replace):
            with pytest.raises(SettingsError, match=rf"{kind.__name__}\b.*\b{name}\b") as caught:
                make(**{name: value})
            assert isinstance(caught.value, CmapError)
            assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("kind", KINDS)
def test_laws_of_all_settings(kind: type[Settings]) -> None:
    settings, first = made(kind), dataclasses.fields(kind)[0].name
    values = settings.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(kind) if field.compare}
    if kind is not CD:  # whose teacher is not in the text
        for again in (kind.from_json(settings.to_json()), kind.from_dict(values)):
            assert again == settings == settings.replace()
            assert hash(again) == hash(settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, first, getattr(settings, first))
    with pytest.raises(TypeError):
        kind(getattr(settings, first))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_names_the_near_match_or_all(kind: type[Settings]) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    longest = max(names, key=len)
    for make in (kind.from_dict, lambda values: made(kind).replace(**values)):
        with pytest.raises(SettingsError, match=rf"'{longest}s'\. Did you mean '{longest}'"):
            make({f"{longest}s": 3})
    with pytest.raises(SettingsError) as caught:
        kind.from_dict({"qqq": 3})
    assert all(repr(name) in str(caught.value) for name in names)


def test_numbers_of_other_libraries_become_floats() -> None:
    for made in (Surrogate(sigma=np.float32(0.5)), PGD(ThreatModel(eps=0.1), momentum=Fraction(1, 2))):  # pyright: ignore[reportArgumentType]
        assert "0.5" in repr(made)
        assert "float32" not in repr(made)
        assert "Fraction" not in repr(made)
