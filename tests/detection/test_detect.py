"""Detection of adversarial images: its kinds of images, what it may not depend on, its plot."""

import dataclasses
import io
import json
import sys
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from attack_toys import CLASSES, SHAPE, THREATS, Denoiser, labelled, wrapped
from cmap_defense import PurifiedClassifier, errors
from cmap_defense.attacks import PGD, LatentAttack
from cmap_defense.common.rng import derived_seeds
from cmap_defense.detection import EPS, KINDS, Detection, Gaussian, detect, mmd_distances
from cmap_defense.detection.detect import STREAMS, flipped
from toys import ToyBackbone, uniform

EPS_FEW = EPS(sigmas=(0.1, 0.3), seed=4)
ATTACK = PGD(THREATS["linf"], steps=2)
REFERENCE = uniform(6, *SHAPE, seed=8)


class Conditional(Denoiser):
    """The toy, brighter for higher classes."""

    num_classes = CLASSES

    def generate(self, latents: Tensor, labels: Tensor) -> Tensor:
        return super().generate(latents + 0.3 * labels[:, None, None, None])

    def denoise(self, noisy: Tensor, sigma: float, labels: Tensor) -> Tensor:
        return self.generate(noisy / (1 + sigma), labels)


def measured(model: PurifiedClassifier | None = None, count: int = 4, **changes: Any) -> Detection:
    images, labels = labelled(count)
    given = {"reference": REFERENCE, "attack": ATTACK, "eps": EPS_FEW, "seed": 2} | changes
    return detect(model or wrapped().eval(), images, labels, **given)


@pytest.fixture(scope="module")
def found() -> Detection:
    return measured()


def close(first: Detection, second: Detection, rows: Any = slice(None)) -> None:
    for name, distances in first.distances.items():
        torch.testing.assert_close(distances[rows], second.distances[name], rtol=1e-4, atol=1e-5)


def test_all_kinds_are_there_with_numbers_that_agree(found: Detection) -> None:
    assert tuple(found.distances) == tuple(found.summary) == KINDS
    for name, summary in found.summary.items():
        own = found.distances[name]
        assert own.dtype == torch.float64
        assert summary.count == len(own) == 4
        assert [*summary.quartiles, summary.median] == pytest.approx(np.quantile(own, [0.25, 0.75, 0.5]).tolist())
        assert (summary.auroc is None) == (name == "clean")
        if summary.auroc is not None:
            assert summary.auroc.value == (own[:, None] > found.distances["clean"]).double().mean().item()
            assert found.differs(name) == (summary.auroc.interval[0] > 0.5)
        assert (summary.accuracy is None) == (name == "generated")
    assert found.summary["clean"].accuracy is not None
    assert found.summary["clean"].accuracy.value == 1.0, "the labels are what the classifier predicts"
    assert not found.differs("clean")
    assert found.largest_change == pytest.approx(0.1, abs=1e-6)
    assert found.references == 6


def test_a_distance_is_the_mmd_of_the_score(found: Detection) -> None:
    model, images = wrapped(), labelled(4)[0]
    clean, reference = (
        EPS_FEW(model.backbone, part, indices=derived_seeds(torch.arange(len(part)), STREAMS[name]))
        for part, name in ((images, "clean"), (REFERENCE, "reference"))
    )
    kernel = Gaussian.median(reference)
    torch.testing.assert_close(found.distances["clean"], mmd_distances(kernel, clean, reference))
    assert found.kernel == {"name": "gaussian", "bandwidth": pytest.approx(kernel.bandwidth)}


def test_json_and_back(found: Detection) -> None:
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(values["kinds"]) == list(KINDS)
    assert values["kinds"]["adversarial"]["distances"] == found.distances["adversarial"].tolist()
    assert values["kinds"]["noise"]["auroc"]["method"].startswith("Hanley-McNeil")
    assert values["kinds"]["clean"]["auroc"] is None
    area = found.auroc("adversarial", "noise")
    assert values["adversarial_against_noise"]["value"] == area.value == 1 - found.auroc("noise", "adversarial").value
    assert values["eps"] == EPS_FEW.to_dict()
    assert values["attack"].startswith("PGD(")
    assert values["attack"].endswith("on the undefended classifier")


def test_it_is_the_same_whatever_runs_together(found: Detection) -> None:
    close(found, measured(max_parallel=3))
    model, (images, labels), order = wrapped().eval(), labelled(4), torch.tensor([3, 1])
    given = {"reference": REFERENCE, "attack": ATTACK, "eps": EPS_FEW, "seed": 2}
    close(found, detect(model, images[order], labels[order], indices=order, **given), order)


def test_seeds_rule_the_noise_and_global_generators_do_not(found: Detection) -> None:
    state = torch.random.get_rng_state()
    again = measured()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(77)
    close(again, found, slice(None))
    other = measured(seed=3)
    assert torch.equal(other.distances["clean"], found.distances["clean"]), "the score has a seed of its own"
    for name in ("generated", "noise", "purified_clean"):
        assert not torch.equal(other.distances[name], found.distances[name])
    default = measured(eps=None, seed=5, purify=False)
    assert default.eps == EPS(seed=5)


def test_purified_kinds_may_be_left_out() -> None:
    said: list[tuple[int, int]] = []
    left = measured(purify=False, progress=lambda *now: said.append(now))
    assert tuple(left.distances) == KINDS[:4]
    assert said == []
    measured(progress=lambda *now: said.append(now), max_parallel=2)
    steps = 2 * 2 * wrapped().settings.iterations
    assert said == [(done + 1, steps) for done in range(steps)]


def test_noise_is_the_perturbation_with_other_signs() -> None:
    clean = torch.full((2, *SHAPE), 0.5)
    attacked = clean + 0.1 * uniform(2, *SHAPE, seed=3)
    noisy = flipped(clean, attacked, torch.arange(2))
    torch.testing.assert_close((noisy - clean).abs(), (attacked - clean).abs())
    assert 0.35 < ((noisy - clean) > 0).double().mean() < 0.65


def test_a_class_conditional_backbone_and_other_sizes_and_units() -> None:
    conditional = measured(wrapped(backbone=Conditional()).eval())
    assert tuple(conditional.distances) == KINDS
    images, labels = labelled(3, size=(10, 9))
    model = wrapped(resize=True, normalize=(0.4, 0.3), inputs="normalized").eval()
    resized = detect(model, images, labels, reference=uniform(4, 3, 10, 9, seed=8), attack=ATTACK, eps=EPS_FEW)
    assert all(len(distances) == 3 for distances in resized.distances.values())


def test_any_kernel_will_do() -> None:
    def linear(first: Tensor, second: Tensor) -> Tensor:
        return first.flatten(1).double() @ second.flatten(1).double().T

    assert "linear" in measured(kernel=linear, purify=False).kernel["name"]
    assert measured(kernel=Gaussian(bandwidth=3.0), purify=False).kernel["bandwidth"] == 3.0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"attack": "pgd"}, errors.SettingsError, "attack"),
        ({"attack": LatentAttack(THREATS["linf"], steps=2, latents=2)}, errors.SettingsError, "PurifiedClassifier"),
        ({"reference": REFERENCE[:1]}, errors.InputValueError, "2 reference images"),
        ({"reference": REFERENCE[:0]}, errors.InputValueError, "reference: there must be one"),
        ({"reference": REFERENCE * 255}, errors.InputValueError, "reference: Images must lie"),
        ({"reference": REFERENCE.mT}, errors.InputValueError, "reference must be images of"),
        ({"reference": REFERENCE.numpy()}, errors.InputTypeError, "reference: Images must be"),
        ({"indices": torch.arange(3)}, errors.InputValueError, "indices"),
        ({"max_parallel": 0}, errors.SettingsError, "max_parallel"),
        ({"purify": 1}, errors.SettingsError, "purify"),
    ],
)
def test_mistakes(changes: dict[str, Any], error: type[errors.CmapError], words: str) -> None:
    with pytest.raises(error, match=words):
        measured(**changes)


def test_mistakes_in_the_model_and_the_labels() -> None:
    with pytest.raises(errors.BackboneError, match="denoise"):
        measured(wrapped(backbone=ToyBackbone(SHAPE)))
    images, labels = labelled(4)
    for wrong in (labels[:3], labels.float(), labels > 1, [0, 1, 2, 3]):
        with pytest.raises(errors.InputTypeError, match="labels"):
            detect(wrapped(), images, wrong, reference=REFERENCE)  # pyright: ignore[reportArgumentType]
    for label in (-1, CLASSES):
        wrong = torch.tensor([0, label, 0, 0])
        with pytest.raises(errors.InputValueError, match=rf"from 0 to {CLASSES - 1}, .*go from {min(0, label)} to"):
            detect(wrapped().eval(), images, wrong, reference=REFERENCE, eps=EPS_FEW)


def test_a_single_image_has_no_two_sample_mmd() -> None:
    alone = measured(count=1, purify=False)
    assert {summary.mmd2 for summary in alone.summary.values()} == {None}
    assert len(alone.plot("svg")) > 1000
    assert "1 images of each kind" in repr(alone)
    assert alone._repr_markdown_().splitlines()[2].startswith(f"| clean | {alone.summary['clean'].median:.3f} | ")


def test_the_plot_is_a_function_of_the_detection(found: Detection) -> None:
    before, interactive = dict(mpl.rcParams), "matplotlib.pyplot" in sys.modules
    drawn = found.plot()
    assert found.plot() == drawn
    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert found.plot() == drawn
    assert dict(mpl.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == interactive
    with Image.open(io.BytesIO(found.plot("png"))) as image:
        assert image.size[0] == 1600
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**20) or []}
    assert len(colours) > 20, "something is drawn"
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    with pytest.raises(errors.SettingsError, match="picture"):
        found.plot("gif")


def test_distances_over_orders_of_magnitude_are_drawn_too(found: Detection) -> None:
    wide = {name: own.clone() for name, own in found.distances.items()}
    wide["clean"] = wide["clean"] * 1e-4
    for distances in (wide, {name: torch.zeros(4).double() for name in wide}):
        assert len(dataclasses.replace(found, distances=distances).plot("svg")) > 1000


def test_without_matplotlib_the_error_names_the_extra(found: Detection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(errors.MissingExtraError, match=r"cmap-defense\[report\]"):
        found.plot()
