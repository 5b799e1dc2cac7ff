"""Whether the attacks worked as attacks should: without that, accuracy under them says nothing.

The list follows section 5 of "On Evaluating Adversarial Robustness" (Carlini et al. 2019, arXiv 1902.06705). A check
compares answers about the same images by the same noise, image by image, and gives the benefit of two standard errors,
or of more where it looks at several places.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import (
    PGD,
    Attack,
    SeededModel,
)
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.evaluation.accuracy import Accuracy
from cmap_defense.evaluation.plan import Subject, eps_sizes, probe_of, step_counts
from cmap_defense.evaluation.summary import Runs

__all__ = ["Check", "Sweep", "checks_of", "gradient_table", "sweeps_of"]

BENEFIT = 2.0
"""Standard errors."""

WITH_BPDA = "--attacks standard, with --only bpda-eot where --only is given"

NOT_MADE = "Evaluate with checks: --sanity-images 16."


@dataclasses.dataclass(frozen=True)
class Check:
    """name: what must hold. passed: whether it does; None where it could not be seen. found: what was measured.
    remedy: what to do where it did not pass, a sentence with options of ``cmap-defense evaluate``."""

    name: str
    passed: bool | None
    found: str
    remedy: str

    @property
    def reason(self) -> str:
        """Why there is no headline where it did not pass, and what to do."""
        unseen = "could not be seen, " if self.passed is None else ""
        return f"{self.name}: {unseen}{self.found}. {self.remedy}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The probe over one of its settings: values, the mean accuracy of an answer at each, and its standard error."""

    name: str
    values: Sequence[float]
    accuracies: Sequence[float]
    errors: Sequence[float]


def checks_of(
    subject: Subject,
    image_shape: tuple[int, ...],
    attacked: Mapping[str, Runs],
    checked: Mapping[str, Runs],
    gradients: Sequence[Mapping[str, Any]],
) -> list[Check]:
    """All checks of a model's attacks.

    Args:
        subject: the model and its attacks.
        image_shape: of its images.
        attacked: by name, what the attacks found; the control is among them.
        checked: by name, what the tasks of the checks found; empty where they were not done.
        gradients: lines of the gradient task.
    """
    name, probe = probe_of(subject)
    followers = {
        name: attack
        for name, attack in subject.attacks.items()
        if attack.noise == "fresh" and attack.differentiates_defence(subject.model)
    }
    found = [
        _clean(attacked["control"]),
        _fresh_noise(subject.model),
        Check(
            "a gradient attack goes through the defence itself",
            bool(followers),
            ", ".join(followers) if followers else "none among the attacks",
            f"Add one, such as bpda-eot: {WITH_BPDA}.",
        ),
        _first_step(list(followers.values())),
        _gradients_there(attacked),
    ]
    if isinstance(subject.model, PurifiedClassifier) or not all(
        attack.evaluates_defence() for attack in subject.attacks.values()
    ):
        found.append(_transfer(subject.attacks, attacked))
    if not checked:
        return [*found, Check(FALLS["steps"], None, "not looked at", NOT_MADE)]
    swept = {sweep: _points(points) for sweep, points in _swept(name, probe, image_shape, attacked, checked).items()}
    falls = [_falls(sweep, points, probe) for sweep, points in swept.items()]
    return [*found, *falls, _any_image(checked["eps-any"], probe), _direction(gradients, probe.eot)]


def sweeps_of(
    name: str | None,
    probe: PGD,
    image_shape: tuple[int, ...],
    attacked: Mapping[str, Runs],
    checked: Mapping[str, Runs],
) -> list[Sweep]:
    """The probe over its steps and over eps, all on the same images and as many answers, by the same noise."""
    swept = _swept(name, probe, image_shape, attacked, checked)
    return [
        Sweep(
            sweep,
            list(points),
            [shares.mean().item() for shares in points.values()],
            [_error(shares) for shares in points.values()],
        )
        for sweep, points in ((sweep, _points(runs)) for sweep, runs in swept.items())
    ]


def _swept(
    name: str | None,
    probe: PGD,
    image_shape: tuple[int, ...],
    attacked: Mapping[str, Runs],
    checked: Mapping[str, Runs],
) -> dict[str, dict[float, Runs]]:
    """By sweep and value, what was found."""
    some = next(iter(checked.values()))
    itself = (checked["probe"] if name is None else attacked[name]).first(len(some.truth))
    clean = attacked["control"].first(len(some.truth))
    steps = {float(count): checked[f"steps-{count}"] for count in step_counts(probe)}
    sizes = {eps: checked[name] for name, eps in eps_sizes(probe, image_shape).items()}
    return {
        "steps": {0.0: clean, **steps, float(probe.steps): itself},
        "eps": {0.0: clean, probe.threat.eps: itself, **sizes},
    }


def _points(runs: Mapping[float, Runs]) -> dict[float, Tensor]:
    """By value, from the smallest up, the share [B] of right answers among as many as there are everywhere."""
    common = min(part.answers.shape[2] + part.repurified.shape[2] for part in runs.values())
    return {value: _share(part, common) for value, part in sorted(runs.items())}


def gradient_table(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """By number of samples: the mean cosine of two averages of so many, its standard error, and the median relative
    variance."""
    if not lines:
        return []
    cosines = torch.tensor([line["cosines"] for line in lines], dtype=torch.float64)
    variances = torch.tensor([line["variances"] for line in lines], dtype=torch.float64)
    return [
        {
            "samples": count,
            "cosine": cosines[:, column].mean().item(),
            "error": _error(cosines[:, column]),
            "variance": variances[:, column].median().item(),
        }
        for column, count in enumerate(lines[0]["samples"])
    ]


def _fresh_noise(model: object) -> Check:
    seed = model.seed if isinstance(model, (PurifiedClassifier, SeededModel)) else None
    found = "no fixed seed" if seed is None else f"the model has the fixed seed {seed}"
    remedy = "Evaluate the model without a fixed seed: PurifiedClassifier(..., seed=None)."
    return Check("the defence draws fresh noise for each answer", seed is None, found, remedy)


def _clean(control: Runs) -> Check:
    """Where labels are those of another data set, images are not as the model expects them, or the purification loses
    what is in them, nothing is left to attack, and all other checks pass."""
    found = Accuracy.mean(_share(control))
    guess = control.truth.bincount().max().item() / len(control.truth)
    return Check(
        "clean images are answered better than by always naming one class",
        found.value > guess,
        f"{found}, against {guess:.3f} for the most frequent class",
        "See whether the labels are numbered as the classifier's classes are, and whether --mean, --std and --resize "
        "are what it was trained with. Where the undefended model is right on the same images, the purification loses "
        "what is in them: more --iterations, or a better backbone.",
    )


def _first_step(through: Sequence[Attack]) -> Check:
    steps = [(attack.first_step(), attack.threat.eps / 4) for attack in through]
    good = [step for step, least in steps if step is not None and step >= least]
    return Check(
        "one of them starts at random with a step of eps / 4 at least",
        bool(good),
        f"{len(good)} of {len(through)}",
        f"Add a PGD with random_start=True and a step_size of eps / 4 or more, such as bpda-eot: {WITH_BPDA}.",
    )


def _gradients_there(attacked: Mapping[str, Runs]) -> Check:
    still = {
        name: sum(bool(line["zero_gradient"]) for run in runs.lines for line in run)
        for name, runs in attacked.items()
        if runs.lines[0][0].get("zero_gradient") is not None
    }
    wrong = {name: count for name, count in still.items() if count}
    found = ", ".join(f"{name}: {count}" for name, count in wrong.items()) or f"none in {len(still)} attacks"
    remedy = f"Attack by another gradient, such as that of bpda-eot: {WITH_BPDA}; or by another loss, such as Margin()."
    return Check("no image's gradient is zero throughout an attack", not wrong if still else None, found, remedy)


def _transfer(attacks: Mapping[str, Attack], attacked: Mapping[str, Runs]) -> Check:
    """Where an attack that never sees the defence is the strongest, those that do are hiding something."""
    title = "attacks that see the defence are no weaker than transfer"
    blind = {name: attacked[name] for name, attack in attacks.items() if not attack.evaluates_defence()}
    seeing = {name: attacked[name] for name in attacks if name not in blind}
    if not blind or not seeing:
        remedy = "Evaluate one of each kind: --attacks standard without --only, or --only transfer --only bpda-eot."
        return Check(title, None, "no attacks of both kinds", remedy)
    best = {
        kind: min(of.items(), key=lambda item: _share(item[1]).mean()) for kind, of in (("b", blind), ("s", seeing))
    }
    (blind_name, blind_runs), (seeing_name, seeing_runs) = best["b"], best["s"]
    gap = _share(seeing_runs) - _share(blind_runs)
    return Check(
        title,
        gap.mean().item() <= BENEFIT * _error(gap),
        f"{seeing_name} {_share(seeing_runs).mean():.3f}, {blind_name} {_share(blind_runs).mean():.3f}",
        f"Make the attacks that see the defence stronger: {_stronger(attacks[seeing_name])}.",
    )


FALLS = {"steps": "more steps do not help the defence", "eps": "a larger eps does not help the defence"}
"""What must hold along a sweep, by its name."""


def _falls(sweep: str, points: Mapping[float, Tensor], probe: PGD) -> Check:
    """Accuracy does not rise along a sweep: no point lies above the lowest before it, image by image, by more than luck
    would have it in as many comparisons (5 % for all of them)."""
    shares = list(points.values())
    benefit = max(BENEFIT, statistics.NormalDist().inv_cdf(1 - 0.05 / (len(shares) - 1)))
    lowest, rises = shares[0], False
    for share in shares[1:]:
        gap = share - lowest
        rises |= gap.mean().item() > benefit * _error(gap)
        lowest = share if share.mean() < lowest.mean() else lowest
    shown = ", ".join(f"{value:g}: {share.mean():.3f}" for value, share in points.items())
    remedy = (
        f"Make the attack follow its gradient better: {_stronger(probe)}; or compare more images: --sanity-images 64."
    )
    return Check(FALLS[sweep], not rises, shown, remedy)


def _stronger(attack: Attack) -> str:
    """Options for twice the steps, and twice the samples of a gradient, of an attack that has such."""
    steps, eot = getattr(attack, "steps", None), getattr(attack, "eot", None)
    given = [f"--{name} {2 * count}" for name, count in (("steps", steps), ("eot", eot)) if count]
    return " ".join(given) or "raise --steps and --eot"


def _any_image(runs: Runs, probe: PGD) -> Check:
    """With every image allowed nothing is left: an attack that leaves more does not find what is there."""
    votes = runs.vote_right()
    return Check(
        "with every image allowed, accuracy is 0",
        not bool(votes.any()),
        f"{int(votes.sum())} of {votes.numel()} images keep their vote",
        f"Let the attack go further, and see whether its gradient is one of this model: {_stronger(probe)}.",
    )


def _direction(gradients: Sequence[Mapping[str, Any]], eot: int) -> Check:
    """Two averages of as many gradients as the attack takes point the same way more often than not."""
    title = "averaged gradients have a direction"
    table = [row for row in gradient_table(gradients) if row["samples"] <= max(1, eot)]
    if not table:
        return Check(title, None, "not looked at", NOT_MADE)
    row = table[-1]
    shown = f"cosine {row['cosine']:.3f} +- {row['error']:.3f} between two averages of {row['samples']:.0f}"
    remedy = f"Average more gradients: --eot {4 * max(1, eot)}; or look at more images: --sanity-images 64."
    return Check(title, row["cosine"] > BENEFIT * row["error"], shown, remedy)


def _share(runs: Runs, count: int | None = None) -> Tensor:
    """[B], the share of all answers that are right, or of the first ``count``."""
    return torch.cat([runs.answers, runs.repurified], dim=2)[:, :, :count].double().mean(dim=(0, 2))


def _error(values: Tensor) -> float:
    """Standard error of a mean over images; 0 for one image."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0
