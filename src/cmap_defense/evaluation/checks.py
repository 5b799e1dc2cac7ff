"""Whether the attacks worked as attacks should: without that, accuracy under them says nothing.

The list follows section 5 of "On Evaluating Adversarial Robustness" (Carlini et al. 2019, arXiv 1902.06705). A check
compares paired answers about the same images, and gives the benefit of two standard errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, Attack, SeededModel, Transfer
from cmap_defense.attacks.steps import StepAttack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.evaluation.plan import Subject, eps_sizes, probe_of, step_counts
from cmap_defense.evaluation.summary import Runs

__all__ = ["Check", "Sweep", "checks_of", "gradient_table", "sweeps_of"]

BENEFIT = 2.0
"""Standard errors."""


@dataclasses.dataclass(frozen=True)
class Check:
    """name: what must hold. passed: whether it does; None where it could not be seen. found: what was measured."""

    name: str
    passed: bool | None
    found: str


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
    through = [attack for attack in subject.attacks.values() if isinstance(attack, PGD)]
    found = [
        _fresh_noise(subject.model),
        _follows(subject, through),
        _first_step(through),
        _gradients_there(attacked),
        _transfer(subject.attacks, attacked),
    ]
    if not checked:
        return [*found, Check("more steps do not help the defence", None, "not looked at")]
    sweeps = sweeps_of(name, probe, image_shape, attacked, checked)
    return [*found, *map(_falls, sweeps), _any_image(checked["eps-any"]), _direction(gradients, probe.eot)]


def sweeps_of(
    name: str | None,
    probe: PGD,
    image_shape: tuple[int, ...],
    attacked: Mapping[str, Runs],
    checked: Mapping[str, Runs],
) -> list[Sweep]:
    """The probe over its steps and over eps, all on the same images and as many answers, by the same noise."""
    some = next(iter(checked.values()))
    itself = (checked["probe"] if name is None else attacked[name]).first(len(some.truth))
    clean = attacked["control"].first(len(some.truth))
    steps = {float(count): checked[f"steps-{count}"] for count in step_counts(probe)}
    sizes = {eps: checked[name] for name, eps in eps_sizes(probe, image_shape).items()}
    return [
        _sweep("steps", {0.0: clean, **steps, float(probe.steps): itself}),
        _sweep("eps", {0.0: clean, probe.threat.eps: itself, **sizes}),
    ]


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
    return Check("the defence draws fresh noise for each answer", seed is None, found)


def _follows(subject: Subject, through: Sequence[PGD]) -> Check:
    names = [name for name, attack in subject.attacks.items() if isinstance(attack, PGD)]
    return Check(
        "a gradient attack goes through the defence itself",
        bool(through),
        ", ".join(names) if names else "no PGD on the defended model among the attacks",
    )


def _first_step(through: Sequence[PGD]) -> Check:
    good = [a for a in through if a.random_start and (a.step_size is None or a.step_size >= a.threat.eps / 4)]
    return Check(
        "one of them starts at random with a step of eps / 4 at least",
        bool(good),
        f"{len(good)} of {len(through)}",
    )


def _gradients_there(attacked: Mapping[str, Runs]) -> Check:
    still = {
        name: sum(bool(line["zero_gradient"]) for run in runs.lines for line in run)
        for name, runs in attacked.items()
        if runs.lines[0][0].get("zero_gradient") is not None
    }
    wrong = {name: count for name, count in still.items() if count}
    found = ", ".join(f"{name}: {count}" for name, count in wrong.items()) or f"none in {len(still)} attacks"
    return Check("no image's gradient is zero throughout an attack", not wrong if still else None, found)


def _transfer(attacks: Mapping[str, Attack], attacked: Mapping[str, Runs]) -> Check:
    """Where an attack that never sees the defence is the strongest, those that do are hiding something."""
    blind = {name: attacked[name] for name, attack in attacks.items() if isinstance(attack, Transfer)}
    seeing = {
        name: attacked[name]
        for name, attack in attacks.items()
        if isinstance(attack, StepAttack) and "zero_gradient" in attacked[name].lines[0][0]
    }
    title = "attacks that see the defence are no weaker than transfer"
    if not blind or not seeing:
        return Check(title, None, "no attacks of both kinds")
    best = {
        kind: min(of.items(), key=lambda item: _share(item[1]).mean()) for kind, of in (("b", blind), ("s", seeing))
    }
    (blind_name, blind_runs), (seeing_name, seeing_runs) = best["b"], best["s"]
    gap = _share(seeing_runs) - _share(blind_runs)
    return Check(
        title,
        gap.mean().item() <= BENEFIT * _error(gap),
        f"{seeing_name} {_share(seeing_runs).mean():.3f}, {blind_name} {_share(blind_runs).mean():.3f}",
    )


def _falls(sweep: Sweep) -> Check:
    """Accuracy does not rise along a sweep."""
    rises = [
        (later - earlier) > BENEFIT * math.hypot(error, later_error)
        for earlier, later, error, later_error in zip(
            sweep.accuracies, sweep.accuracies[1:], sweep.errors, sweep.errors[1:], strict=False
        )
    ]
    title = {"steps": "more steps do not help the defence", "eps": "a larger eps does not help the defence"}[sweep.name]
    shown = ", ".join(f"{value:g}: {share:.3f}" for value, share in zip(sweep.values, sweep.accuracies, strict=True))
    return Check(title, not any(rises), shown)


def _any_image(runs: Runs) -> Check:
    """With every image allowed nothing is left: an attack that leaves more does not find what is there."""
    votes = runs.vote_right()
    return Check(
        "with every image allowed, accuracy is 0",
        not bool(votes.any()),
        f"{int(votes.sum())} of {votes.numel()} images keep their vote",
    )


def _direction(gradients: Sequence[Mapping[str, Any]], eot: int) -> Check:
    """Two averages of as many gradients as the attack takes point the same way more often than not."""
    title = "averaged gradients have a direction"
    table = [row for row in gradient_table(gradients) if row["samples"] <= max(1, eot)]
    if not table:
        return Check(title, None, "not looked at")
    row = table[-1]
    shown = f"cosine {row['cosine']:.3f} +- {row['error']:.3f} between two averages of {row['samples']:.0f}"
    return Check(title, row["cosine"] > BENEFIT * row["error"], shown)


def _sweep(name: str, points: Mapping[float, Runs]) -> Sweep:
    ordered = sorted(points.items())
    common = min(runs.answers.shape[2] + runs.repurified.shape[2] for runs in points.values())
    shares = [_share(runs, common) for _, runs in ordered]
    return Sweep(
        name, [value for value, _ in ordered], [share.mean().item() for share in shares], [_error(s) for s in shares]
    )


def _share(runs: Runs, count: int | None = None) -> Tensor:
    """[B], the share of all answers that are right, or of the first ``count``."""
    return torch.cat([runs.answers, runs.repurified], dim=2)[:, :, :count].double().mean(dim=(0, 2))


def _error(values: Tensor) -> float:
    """Standard error of a mean over images; 0 for one image."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0
