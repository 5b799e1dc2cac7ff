"""From subjects and their attacks to tasks: the control, the attacks, and what the checks need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from cmap_defense.attacks import PGD, Attack
from cmap_defense.attacks.oracle import Model
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation.protocol import Protocol
from cmap_defense.evaluation.tasks import AttackTask, ControlTask, GradientTask, Task
from cmap_defense.gradients import StraightThrough

__all__ = ["CHECKS", "DEFENDED", "UNDEFENDED", "Subject", "eps_sizes", "probe_of", "step_counts", "tasks_of"]

DEFENDED, UNDEFENDED = "defended", "undefended"
"""Names of the model that is evaluated, and of its classifier without the defence."""

CHECKS = "checks"
"""Stands before the names of the tasks that only the checks need."""

EPS_FACTORS = (0.25, 0.5, 2.0, 4.0)
"""Attack sizes next to eps itself, for accuracy over eps."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model under its attacks. name: a word. model: images in [0, 1] to logits. attacks: by name; may be none."""

    name: str
    model: Model
    attacks: Mapping[str, Attack]


def probe_of(subject: Subject) -> tuple[str | None, PGD]:
    """The attack that the checks are made with, and its name among the subject's attacks: "bpda-eot" where there is
    one, or else the first PGD on the model itself, or else (None) one of the standard suite's settings."""
    attacks = subject.attacks
    for name in ("bpda-eot", *attacks):
        attack = attacks.get(name)
        probe = None if attack is None else attack.sweep_attack()
        if probe is not None:
            return name, probe
    threat = next(iter(attacks.values())).threat
    gradient = StraightThrough() if isinstance(subject.model, PurifiedClassifier) else None
    return None, PGD(threat, steps=20, eot=4, momentum=0.75, schedule="cosine", gradient=gradient)


def step_counts(probe: PGD) -> list[int]:
    """Fewer steps than the probe's: a quarter and a half of them."""
    return sorted({max(1, probe.steps // 4), max(1, probe.steps // 2)} - {probe.steps})


def eps_sizes(probe: PGD, image_shape: tuple[int, ...]) -> dict[str, float]:
    """Name and eps of the attack sizes beside the probe's own; "eps-any" allows every image."""
    any_image = probe.threat.largest_eps(image_shape)
    sizes = {f"eps-{factor:g}x": factor * probe.threat.eps for factor in EPS_FACTORS}
    return {name: eps for name, eps in sizes.items() if eps < any_image} | {"eps-any": any_image}


def tasks_of(subjects: Sequence[Subject], protocol: Protocol, image_shape: tuple[int, ...]) -> list[Task]:
    """All that is to be done, in the order in which it is shown.

    Raises:
        SettingsError: names clash or are not words.
    """
    tasks: list[Task] = []
    for subject in subjects:
        search = max((attack.predictions_per_image() for attack in subject.attacks.values()), default=0)
        search = search if protocol.search_control else 0
        counts = protocol.answers, protocol.repurifications
        tasks.append(ControlTask(subject.name, subject.model, *counts, search))
        tasks += [AttackTask(subject.name, name, subject.model, how, *counts) for name, how in subject.attacks.items()]
    if protocol.sanity_images and subjects[0].attacks:
        tasks += _checks(subjects[0], protocol, image_shape)
    names = [task.name for task in tasks]
    folded = [name.casefold() for name in names]  # some systems take these for the same file
    for name in names:
        parts = name.split("/")
        if folded.count(name.casefold()) > 1 or any(not _is_file_name(part) for part in parts):
            raise SettingsError(f"{name!r} names two tasks, or is no name for a file on every system.")
    return tasks


def _is_file_name(part: str) -> bool:
    return bool(part) and part.strip(" .") == part and not set(part) & set('\\<>:"|?*') and part.isprintable()


def _checks(subject: Subject, protocol: Protocol, image_shape: tuple[int, ...]) -> list[Task]:
    """The probe with fewer steps, at other sizes, and its gradients."""
    name, probe = probe_of(subject)
    common: dict[str, Any] = {"limit": protocol.sanity_images, "once": True}
    common |= {"answers": protocol.answers, "repurifications": 1}
    attacks = {f"steps-{count}": dataclasses.replace(probe, steps=count) for count in step_counts(probe)}
    if name is None:
        attacks["probe"] = probe
    for name, eps in eps_sizes(probe, image_shape).items():
        attacks[name] = dataclasses.replace(probe, threat=probe.threat.replace(eps=eps), step_size=None)
    tasks: list[Task] = [AttackTask(CHECKS, name, subject.model, how, **common) for name, how in attacks.items()]
    samples, limit = protocol.gradient_samples, protocol.sanity_images
    return [*tasks, GradientTask(CHECKS, subject.model, probe, samples, limit)]
