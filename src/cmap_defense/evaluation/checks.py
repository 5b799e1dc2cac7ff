"""Whether the attacks worked as attacks should: without that, accuracy under them says nothing.

The list follows section 5 of "On Evaluating Adversarial Robustness" (Carlini et al. 2019, arXiv 1902.06705). A check
compares predictions of the same images, image by image, and allows for two standard errors, or for more where it makes
several comparisons. Predictions of a purified classifier are by the same noise.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, Attack
from cmap_defense.attacks.oracle import Model
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.statistics import Accuracy, standard_error, student_quantile
from cmap_defense.evaluation.summary import Runs
from cmap_defense.evaluation.tasks import CLEAN, check_attack, check_variants

TOLERANCE = 2.0
"""Standard errors."""

FEW = 0.05
"""Share of an attack's gradients that may be NaN or infinite."""

WITH_BPDA = "--attacks standard, with --only bpda-eot where --only is given"

NOT_MADE = "Evaluate with checks: --sanity-images 16."
MORE_IMAGES = "Compare more images: --sanity-images 16."

FALLS = {"steps": "more steps do not help the defence", "eps": "a larger eps does not help the defence"}
"""What must hold along a sweep, by its name."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A condition that attacks must meet.

    Attributes:
        name: what must hold.
        passed: whether it does; None where it could not be checked.
        found: what was measured.
        remedy: what to do where it did not pass, a sentence with options of ``cmap-defense evaluate``.
    """

    name: str
    passed: bool | None
    found: str
    remedy: str

    @property
    def reason(self) -> str:
        """Why there is no headline where it did not pass, and what to do."""
        unchecked = "could not be checked, " if self.passed is None else ""
        return f"{self.name}: {unchecked}{self.found}. {self.remedy}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The attack of the checks over one of its settings.

    Attributes:
        name: "steps" or "eps".
        values: of the setting, from the smallest up.
        accuracies: mean accuracy of a prediction at each.
        errors: their standard errors over images.
    """

    name: str
    values: Sequence[float]
    accuracies: Sequence[float]
    errors: Sequence[float]


def make_checks(
    model: Model,
    attacks: Mapping[str, Attack],
    image_shape: tuple[int, ...],
    attacked: Mapping[str, Runs],
    checked: Mapping[str, Runs],
    gradients: Sequence[Mapping[str, float]],
) -> tuple[list[Check], list[Sweep]]:
    """All checks of attacks on a model that takes images of (C, H, W), by name, and the sweeps that some are made of.

    ``attacked`` are the predictions under the attacks, those of the clean images included; ``checked`` those of the
    tasks of the checks, empty where they were not done; ``gradients`` the table of the gradient task.
    """
    name, repeated = check_attack(model, attacks)
    fresh = {name: attack for name, attack in attacks.items() if attack.noise == "fresh"}
    gradient_attacks = {name: attack for name, attack in fresh.items() if attack.differentiates_defence(model)}
    found = [
        _clean(attacked[CLEAN]),
        _fresh_noise(model),
        Check(
            "a gradient attack goes through the defence itself",
            bool(gradient_attacks),
            ", ".join(gradient_attacks) or "none among the attacks",
            f"Add one, such as bpda-eot: {WITH_BPDA}.",
        ),
        _first_step(list(gradient_attacks.values())),
        _gradients_there(attacked),
    ]
    if isinstance(model, PurifiedClassifier) or not all(attack.evaluates_defence() for attack in attacks.values()):
        found.append(_transfer(attacks, attacked))
    if not checked:
        return [*found, Check(FALLS["steps"], None, "not measured", NOT_MADE)], []
    itself = checked["attack"] if name is None else attacked[name]
    swept = _swept(repeated, image_shape, attacked[CLEAN], itself, checked)
    found += [_falls(sweep, points, repeated) for sweep, points in swept.items()]
    sweeps = [
        Sweep(sweep, list(points), [s.mean().item() for s in points.values()], [*map(standard_error, points.values())])
        for sweep, points in swept.items()
    ]
    any_image = checked["eps-any"]
    found += [_any_image(any_image, repeated), _direction(gradients, repeated.eot, len(any_image.truth))]
    return found, sweeps


def _swept(
    repeated: PGD, image_shape: tuple[int, ...], clean: Runs, itself: Runs, checked: Mapping[str, Runs]
) -> dict[str, dict[float, Tensor]]:
    """The attack of the checks over its steps and over eps: by sweep and value, from the smallest up, the share [B] of
    right predictions, all on the same images and among as many predictions, by the same noise."""
    images = len(next(iter(checked.values())).truth)
    clean, itself = clean.first(images), itself.first(images)
    sweeps = {"steps": {0.0: clean, float(repeated.steps): itself}, "eps": {0.0: clean, repeated.threat.eps: itself}}
    for name, attack in check_variants(repeated, image_shape).items():
        sweep = name.partition("-")[0]
        sweeps[sweep][float(attack.steps) if sweep == "steps" else attack.threat.eps] = checked[name]
    found = {}
    for sweep, points in sweeps.items():
        common = min(runs.right.shape[2] + runs.reevaluated.shape[2] for runs in points.values())
        found[sweep] = {value: runs.shares(common) for value, runs in sorted(points.items())}
    return found


def gradient_table(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """By number of samples: the mean cosine of two averages of so many, its standard error, and the median relative
    variance."""
    if not lines:
        return []
    cosines = torch.tensor([line["cosines"] for line in lines], dtype=torch.float64, device="cpu")
    variances = torch.tensor([line["variances"] for line in lines], dtype=torch.float64, device="cpu")
    table = []
    for count, cosine, variance in zip(lines[0]["samples"], cosines.T, variances.T, strict=True):
        means = {"cosine": cosine.mean().item(), "error": standard_error(cosine), "variance": variance.median().item()}
        table.append({"samples": count, **means})
    return table


def _clean(clean: Runs) -> Check:
    """Where labels are those of another data set, images are not as the model expects them, or the purification loses
    what is in them, nothing is left to attack, and all other checks pass."""
    found = Accuracy.mean(clean.shares())
    guess = clean.truth.bincount().max().item() / len(clean.truth)
    title = "clean images are classified better than by always predicting one class"
    if guess == 1:
        return Check(title, None, "all images are of one class", "Evaluate images of several classes.")
    return Check(
        title,
        found.value > guess,
        f"{found}, against {guess:.3f} for the most frequent class",
        "See whether the labels are numbered as the classifier's classes are, and whether --mean, --std and --resize "
        "are what it was trained with. Where the undefended model is right on the same images, the purification loses "
        "what is in them: choose less noise, for CMAP more iterations, or a better backbone.",
    )


def _fresh_noise(model: object) -> Check:
    seed = getattr(model, "seed", None)
    found = "no fixed seed" if seed is None else f"the model has the fixed seed {seed}"
    remedy = "Evaluate the model without a fixed seed: PurifiedClassifier(..., seed=None)."
    return Check("the defence draws independent noise for each prediction", seed is None, found, remedy)


def _first_step(gradient_attacks: Sequence[Attack]) -> Check:
    steps = [(attack.first_step(), attack.threat.eps / 4) for attack in gradient_attacks]
    good = [step for step, least in steps if step is not None and step >= least]
    return Check(
        "a gradient attack starts at random with a step of eps / 4 at least",
        bool(good),
        f"{len(good)} of {len(gradient_attacks)}",
        f"Add a PGD with random_start=True and a step_size of eps / 4 or more, such as bpda-eot: {WITH_BPDA}.",
    )


def _gradients_there(attacked: Mapping[str, Runs]) -> Check:
    zero = {
        name: sum(bool(line["zero_gradient"]) for run in runs.lines for line in run)
        for name, runs in attacked.items()
        if runs.lines[0][0].get("zero_gradient") is not None
    }
    wrong = {name: f"{name}: {count}" for name, count in zero.items() if count}
    for name, runs in attacked.items():
        shares = [line.get("nonfinite_gradients") for run in runs.lines for line in run]
        share = statistics.mean(value or 0.0 for value in shares)
        if share > FEW:
            wrong[name] = f"{name}: {share:.0%} of its gradients were NaN or infinite, which counts as zero"
    found = ", ".join(wrong.values()) or f"none in {len(zero)} attacks"
    remedy = f"Attack by another gradient, such as that of bpda-eot: {WITH_BPDA}; or by another loss, such as Margin()."
    return Check("no image's gradient is zero throughout an attack", not wrong if zero else None, found, remedy)


def _transfer(attacks: Mapping[str, Attack], attacked: Mapping[str, Runs]) -> Check:
    """Where an attack that never evaluates the defence is the strongest, gradients of the others are masked."""
    title = "attacks that evaluate the defence are no weaker than transfer"
    groups: dict[bool, dict[str, Runs]] = {True: {}, False: {}}
    for name, attack in attacks.items():
        groups[attack.evaluates_defence()][name] = attacked[name]
    if not all(groups.values()):
        remedy = "Evaluate one of each kind: --attacks standard without --only, or --only transfer --only bpda-eot."
        return Check(title, None, "no attacks of both kinds", remedy)
    own, transfer = (min(groups[kind], key=lambda name: attacked[name].shares().mean()) for kind in (True, False))
    gap = attacked[own].shares() - attacked[transfer].shares()
    return Check(
        title,
        gap.mean().item() <= TOLERANCE * standard_error(gap),
        ", ".join(f"{name} {attacked[name].shares().mean():.3f}" for name in (own, transfer)),
        f"Make the attacks that evaluate the defence stronger: {_stronger(attacks[own])}.",
    )


def _falls(sweep: str, points: Mapping[float, Tensor], repeated: PGD) -> Check:
    """Accuracy does not rise along a sweep: no point lies above the lowest before it, image by image, by more than
    chance would explain among all pairs of points (Student's t, 5 % for all of them together)."""
    shares = list(points.values())
    images, pairs = len(shares[0]), len(shares) * (len(shares) - 1) // 2
    if images < 2:
        return Check(FALLS[sweep], None, "one image", MORE_IMAGES)
    tolerance = max(TOLERANCE, student_quantile(1 - 0.05 / pairs, images - 1))
    lowest, rises = shares[0], False
    for share in shares[1:]:
        gap = share - lowest
        rises |= gap.mean().item() > tolerance * standard_error(gap)
        lowest = share if share.mean() < lowest.mean() else lowest
    shown = ", ".join(f"{value:g}: {share.mean():.3f}" for value, share in points.items())
    stronger = _stronger(repeated)
    remedy = f"Make the attack follow its gradient better: {stronger}; or compare more images: --sanity-images 64."
    return Check(FALLS[sweep], not rises, shown, remedy)


def _stronger(attack: Attack) -> str:
    """Options for twice the steps, and twice the samples of a gradient, of an attack that has such."""
    steps, eot = getattr(attack, "steps", None), getattr(attack, "eot", None)
    given = [f"--{name} {2 * count}" for name, count in (("steps", steps), ("eot", eot)) if count]
    return " ".join(given) or "raise --steps and --eot"


def _any_image(runs: Runs, repeated: PGD) -> Check:
    """With every image allowed nothing is left: an attack that leaves more does not find what is there."""
    votes = runs.vote_right()
    return Check(
        "with every image allowed, accuracy is 0",
        not bool(votes.any()),
        f"{int(votes.sum())} of {votes.numel()} images keep their vote",
        f"Let the attack go further, and see whether its gradient is one of this model: {_stronger(repeated)}.",
    )


def _direction(gradients: Sequence[Mapping[str, float]], eot: int, images: int) -> Check:
    """Two averages of as many gradients as the attack takes point the same way more often than not."""
    title = "averaged gradients have a direction"
    table = [row for row in gradients if row["samples"] <= max(1, eot)]
    if not table:
        return Check(title, None, "not measured", NOT_MADE)
    if images < 2:
        return Check(title, None, "one image", MORE_IMAGES)
    row = table[-1]
    shown = f"cosine {row['cosine']:.3f} ± {row['error']:.3f} between two averages of {row['samples']:.0f}"
    remedy = f"Average more gradients: --eot {4 * max(1, eot)}; or measure more images: --sanity-images 64."
    return Check(title, row["cosine"] > TOLERANCE * row["error"], shown, remedy)
