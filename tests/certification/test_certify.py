"""Certificates: against closed forms and attacks; resumed, shared, and refused."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

import certified
from certified import SHAPE, SMALL, HalfSpace, images_of, killed, small
from cmap_defense import SmoothedClassifier, certify
from cmap_defense.certification import CertificationResult, CertificationSettings, expected_cost, lower_bounds, run
from cmap_defense.errors import EvaluationError, InputValueError, SettingsError
from cmap_defense.evaluation.results import ResultsFolder
from patience import HANGS
from processes import run_together
from toys import noise


def equal(one: CertificationResult | dict[str, Any], other: CertificationResult) -> bool:
    """Whether all but the seconds is equal."""
    mine = one if isinstance(one, dict) else vars(one)
    names = [field.name for field in dataclasses.fields(other) if field.name not in ("seconds", "sigma", "settings")]
    return all(torch.equal(mine[name], getattr(other, name)) for name in names)


# ------------------------------------------------------------------------------------------------------- closed forms


def test_a_classifier_that_rules_a_class_out_is_certified(tmp_path: Path) -> None:
    class Masked(HalfSpace):
        def forward(self, images: Tensor) -> Tensor:
            return torch.cat([super().forward(images), torch.full((len(images), 1), -torch.inf)], dim=1)

    found = certify(SmoothedClassifier(Masked(), None), images_of(3), out=tmp_path, **SMALL)
    assert torch.equal(found.radius, small().radius)
    assert torch.equal(found.prediction, small().prediction)


@pytest.mark.parametrize("sigma", [0.1, 0.3])
def test_radii_of_a_half_space_are_below_its_margin_by_what_n_allows(sigma: float) -> None:
    classifier, n, alpha = HalfSpace(), 3000, 1e-4
    images = images_of(6)
    classifier.threshold = classifier.margin(images).mean().item()
    margins = classifier.margin(images).double()
    found = certify(SmoothedClassifier(classifier, None, sigma), images, n=n, alpha=alpha)
    probability = torch.special.ndtr(margins.abs() / sigma)
    own = found.counts.gather(1, (margins > 0).long()[:, None])[:, 0]
    for image in range(6):
        expected = probability[image].item()
        low, high = stats.binom.ppf([1e-6, 1 - 1e-6], n, expected)
        assert low <= own[image] <= high
        least = sigma * stats.norm.ppf(max(0.5, lower_bounds(torch.tensor([low]), n, alpha).item()))
        assert least - 1e-9 <= found.radius[image] <= margins[image].abs() + 1e-9
    assert (found.prediction == (margins > 0).long()).sum() >= 5
    assert (found.radius > 0.5 * margins.abs()).sum() >= 3  # and not below by more


def test_bounds_are_too_high_for_as_many_noises_as_alpha_says() -> None:
    alpha, count, sigma = 0.2, 600, 0.2
    classifier = HalfSpace(threshold=HalfSpace().margin(images_of(1)).item() - 0.1)
    images = images_of(1).expand(count, *SHAPE)
    found = certify(SmoothedClassifier(classifier, None, sigma), images, n0=1, n=60, alpha=alpha)
    true = stats.norm.cdf(0.1 / sigma)
    own = found.counts[:, 1]
    wrong = int((lower_bounds(own, 60, alpha) > true).sum())
    chances = stats.binom.pmf(range(61), 60, true)
    exact = float(chances[(lower_bounds(torch.arange(61), 60, alpha) > true).numpy()].sum())
    low, high = stats.binom.ppf([1e-4, 1 - 1e-4], count, exact)
    assert exact <= alpha
    assert low <= wrong <= high
    assert len(own.unique()) > 10  # every image has noise of its own


def test_on_a_border_there_is_no_class_and_no_radius() -> None:
    images = images_of(2)
    classifier = HalfSpace(threshold=HalfSpace().margin(images)[0].item())
    found = certify(SmoothedClassifier(classifier, None, 0.01), images, n=200)
    assert found.abstained.tolist() == [True, False]
    assert found.prediction[0] == -1
    assert found.radius[0] == 0
    assert found.radius[1] > 0
    labels = torch.tensor([0, found.prediction[1].item()])
    assert found.accuracy(labels).correct == 1  # an abstention is never right
    assert found.accuracy(labels, radius=found.radius[1].item() + 1e-9).correct == 0
    assert found.accuracy(1 - labels).correct == 0


def test_no_l2_attack_inside_the_radius_changes_the_smoothed_class() -> None:
    """All directions around images of two pixels, the smoothed classifier computed by quadrature."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    for number, parameter in enumerate(net.parameters()):
        parameter.data = noise(*parameter.shape, seed=number) * (6.0 if number == 0 else 1.5)
    sigma = 0.15
    grid = torch.linspace(-4.5, 4.5, 61)
    weights = torch.exp(-(grid[:, None] ** 2 + grid**2) / 2).flatten()
    offsets = sigma * torch.cartesian_prod(grid, grid)

    def smoothed_class(points: Tensor) -> Tensor:
        with torch.no_grad():
            given = net((points[:, None] + offsets).reshape(-1, 1, 1, 2)).argmax(dim=1).view(len(points), -1)
        return torch.stack([((given == c) * weights).sum(dim=1) for c in range(3)], dim=1).argmax(dim=1)

    centres = torch.cartesian_prod(torch.linspace(0.1, 0.9, 4), torch.linspace(0.1, 0.9, 3))
    found = certify(SmoothedClassifier(net.eval(), None, sigma), centres.view(-1, 1, 1, 2), n=2000)
    angles = torch.arange(48) * (2 * torch.pi / 48)
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    broken = 0
    for centre, radius, predicted in zip(centres, found.radius, found.prediction, strict=True):
        if predicted < 0:
            continue
        for share in (0.3, 0.7, 0.999):
            assert (smoothed_class(centre + share * radius.float() * circle) == predicted).all()
        broken += int((smoothed_class(centre + 3 * radius.float() * circle) != predicted).any())
    assert broken >= 3  # the attack works outside
    assert (~found.abstained).sum() >= 8


# ----------------------------------------------------------------------------------- what the counts do not depend on


@settings(max_examples=10)
@given(st.integers(1, 40), st.permutations([0, 1, 2]))
def test_counts_depend_on_neither_batches_nor_other_images(size: int, order: list[int]) -> None:
    whole, images = small(), images_of()
    smoothed = SmoothedClassifier(HalfSpace(), None)
    found = certify(smoothed, images[order], indices=order, **(SMALL | {"batch_size": size}))
    assert torch.equal(found.counts, whole.counts[order])
    alone = certify(smoothed, images[order[:1]], indices=order[:1], **SMALL)
    assert torch.equal(alone.counts, whole.counts[order[:1]])


def test_counts_depend_on_the_seed_and_on_the_index() -> None:
    """All images are one, so that their counts differ by their noise alone."""
    images = images_of(1).expand(4, *SHAPE)
    smoothed = SmoothedClassifier(HalfSpace(threshold=HalfSpace().margin(images[:1]).item()), None)
    found = [certify(smoothed, images, n0=1, n=400, seed=seed).counts[:, 0] for seed in (0, 1)]
    assert len(torch.cat(found).unique()) >= 5


def test_memory_does_not_depend_on_n() -> None:
    largest = 0

    def classifier(images: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(images))
        return images.flatten(1)[:, :2]

    found = certify(SmoothedClassifier(classifier, None), images_of(2), n=1000, batch_size=32)
    assert largest == 32
    assert found.counts.sum(dim=1).tolist() == [1000, 1000]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("stops", [[1], [2, 2], [5, 1, 3], [14], [9, 9]])
def test_an_interrupted_certification_goes_on(
    stops: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "EVERY", 0.0)
    calls, made = 0, 0

    def progress(*_: int) -> None:
        nonlocal calls, made
        calls, made = calls + 1, made + 1
        if stops and calls == stops[0]:
            raise Interrupted

    while stops:
        calls = 0
        try:
            small(tmp_path, progress=progress)
        except Interrupted:
            del stops[0]
        else:
            break
    assert equal(small(tmp_path, progress=progress), small())
    assert made == 3 * 5  # 1 + 4 batches for each of 3 images: nothing was done twice


def test_a_killed_certification_goes_on(tmp_path: Path) -> None:
    for after in (3, 4):
        assert run_together([(killed, tmp_path, after)]) == [-signal.SIGKILL]
    left = []
    assert equal(small(tmp_path, progress=lambda done, total: left.append(total)), small())
    assert 0 < left[0] < 3 * 35 - 5 * 5


def test_two_ranks_find_what_one_process_finds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", certified.__file__, str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    alone = {"folder": small(), "nowhere": small(), "one": small(count=1)}
    for rank in range(2):
        found = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False)
        assert all(equal(found[name], alone[name]) for name in alone)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 3


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_takes_more_images_and_nothing_else(tmp_path: Path) -> None:
    smoothed, images = SmoothedClassifier(HalfSpace(), None), images_of()
    certify(smoothed, images[:2], out=tmp_path, **SMALL)
    before = {path: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert expected_cost(smoothed, images, out=tmp_path, **SMALL).copies == 35
    assert equal(certify(smoothed, images, out=tmp_path, **SMALL), small())
    assert all(path.read_bytes() == content for path, content in before.items())
    for changes, message in (
        ({"n": 31}, "n: 30 before, 31 now"),
        ({"seed": 1}, "seed: 0 before, 1 now"),
        ({"alpha": 0.1}, "alpha"),
    ):
        with pytest.raises(EvaluationError, match=message):
            certify(smoothed, images, out=tmp_path, **(SMALL | changes))
    with pytest.raises(EvaluationError, match="sigma"):
        certify(SmoothedClassifier(HalfSpace(), None, 0.3), images, out=tmp_path, **SMALL)
    with pytest.raises(EvaluationError, match=r"logits"):  # a constant that no description shows
        certify(SmoothedClassifier(HalfSpace(threshold=1.0), None), images, out=tmp_path, **SMALL)
    with pytest.raises(EvaluationError, match="another image with this index"):
        certify(smoothed, images.flip(0), out=tmp_path, **SMALL)
    with FileLock(tmp_path / ".lock"), pytest.raises(EvaluationError, match="Another certification"):
        certify(smoothed, images, out=tmp_path, **SMALL)
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(EvaluationError, match="not what a certification writes"):
        certify(smoothed, images, out=tmp_path, **SMALL)
    ResultsFolder(tmp_path / "comparison" / "one-step").begin({"tasks": {}})
    with pytest.raises(EvaluationError, match="holds evaluations"):
        certify(smoothed, images, out=tmp_path / "comparison", **SMALL)


@pytest.mark.parametrize(
    ("changes", "message"), [({"n": 0}, "n must be at least 1"), ({"indices": [0, 1, 1]}, "different")]
)
def test_wrong_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        small(**changes)


def test_only_a_smoothed_classifier_has_a_certificate() -> None:
    with pytest.raises(SettingsError, match="smoothed classifier"):
        certify(HalfSpace(), images_of())  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------- results


def test_the_table_is_what_analysis_scripts_read() -> None:
    found = small(indices=[7, 3, 5])
    labels = torch.tensor([1, 0, 1])
    rows = list(csv.DictReader(found.to_tsv(labels).splitlines(), delimiter="\t"))
    assert list(rows[0]) == ["idx", "label", "predict", "radius", "correct", "time"]
    assert [int(row["idx"]) for row in rows] == [7, 3, 5]
    assert [float(row["radius"]) for row in rows] == pytest.approx(found.radius.tolist(), abs=1e-6)
    assert [int(row["correct"]) for row in rows] == (found.prediction == labels).long().tolist()
    assert all(re.fullmatch(r"\d+:\d\d:\d\d(\.\d+)?", row["time"]) for row in rows)
    with pytest.raises(InputValueError, match="labels"):
        found.to_tsv(labels[:2])


def test_an_abstention_is_never_right_and_no_radius_is_rounded_up() -> None:
    radius = torch.tensor([0.0, 0.0, 0.12345678], dtype=torch.float64)
    abstained = torch.tensor([True, True, False])
    found = dataclasses.replace(small(), prediction=torch.tensor([-1, -1, 0]), abstained=abstained, radius=radius)
    labels = torch.tensor([-1, 0, 0])
    assert found.accuracy(labels).correct == 1
    rows = list(csv.DictReader(found.to_tsv(labels).splitlines(), delimiter="\t"))
    assert [row["correct"] for row in rows] == ["0", "0", "1"]
    assert [row["radius"] for row in rows] == ["0.000000", "0.000000", "0.123456"]


def test_a_result_prints_on_one_screen_and_the_defaults_are_those_of_the_settings() -> None:
    found = small()
    assert "3 images, sigma = 0.25, n0 = 5, n = 30" in repr(found)
    assert len(repr(found).splitlines()) < 8
    shown = found._repr_markdown_()
    sure, far = ((~found.abstained).sum().item() / 3, (found.radius >= 0.25).sum().item() / 3)
    assert f"| 0 | {sure:.3f} [" in shown
    assert f"| 0.25 | {far:.3f} [" in shown
    assert f"3 images, sigma = 0.25, n0 = 5, n = 30, alpha = 0.001; {int(found.abstained.sum())} abstained" in shown
    assert found.seconds.min() > 0
    assert found.passes.tolist() == [0, 0, 0]
    assert (found.settings, found.sigma) == (CertificationSettings(**SMALL), 0.25)
    assert json.loads(found.settings.to_json())["n"] == 30
    for name, default in (certify.__kwdefaults__ or {}).items():
        if name not in ("indices", "out", "progress"):
            assert default == getattr(CertificationSettings(), name)
