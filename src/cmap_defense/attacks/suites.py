"""Sets of attacks by name. Arguments of each: norm and eps; steps on the image; evaluations per gradient; the seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cmap_defense.attacks.autoattack import AutoAttack
from cmap_defense.attacks.base import Attack
from cmap_defense.attacks.consistency_disruption import ConsistencyDisruption
from cmap_defense.attacks.defended import FrozenResidual, ShortCMAP, TargetSteer
from cmap_defense.attacks.goal import Margin, VoteMargin
from cmap_defense.attacks.latents import LatentAttack, Overpowered
from cmap_defense.attacks.libraries import APGD, Square
from cmap_defense.attacks.oracle import Model
from cmap_defense.attacks.steps import PGD, SPSA
from cmap_defense.attacks.transfer import NoiseAndDenoise, Shortened, Transfer, Undefended
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import SettingsError
from cmap_defense.gradients import Implicit, StraightThrough, Surrogate, Unrolled
from cmap_defense.threat import ThreatModel


def suite(name: str, threat: ThreatModel, **sizes: Any) -> dict[str, Attack]:
    """A set of attacks by its name in ``SUITES``.

    Args:
        name: "standard", "paper", "exact" or "full".
        threat: norm and eps.
        sizes: arguments of the function of that name, such as ``steps=`` of ``standard_suite``.

    Raises:
        SettingsError: there is no set of this name.
    """
    if name not in SUITES:
        raise SettingsError(f"There is no set of attacks {name!r}.{near_matches(name, SUITES)}")
    return SUITES[name](threat, **sizes)


def paper_suite(
    threat: ThreatModel,
    *,
    steps: int = 200,
    eot: int = 20,
    disruption_steps: int = 1000,
    beta: float | None = None,
    released: bool = False,
    seed: int = 0,
) -> dict[str, Attack]:
    """The protocol of arXiv 2412.08394; it does not test the defence.

    All but the last attack a surrogate without the latent optimisation: one consistency step from noise of sigma =
    0.1395. As in the released scripts, PGD and BPDA take sign steps of eps / steps from the clean image, in l2 too.
    AutoAttack is the standard version, once, with EOT on its first attack and in linf alone. Unlike there, it also
    attacks images that are misclassified at first, and every image is re-evaluated by itself.

    Args:
        threat: norm and eps.
        steps: of PGD and BPDA, 200 on CIFAR-10 and 100 on ImageNet-100.
        eot: evaluations of the surrogate per gradient.
        disruption_steps: steps of consistency disruption.
        beta: of consistency disruption; None for CIFAR-10's. On ImageNet-100 it is 400 (linf) and 1e7 (l2).
        released: whether consistency disruption searches as the released code does.
        seed: of all attacks.
    """
    step: dict[str, Any] = {"steps": steps, "step_size": threat.eps / steps, "eot": eot, "seed": seed}
    pgd = PGD(threat, random_start=False, sign_steps=True, **step)
    library_eot = eot if threat.norm == "linf" else 1
    autoattack = AutoAttack(threat, seed=seed, version="standard", rounds=1, eot=library_eot)
    search: dict[str, Any] = {"steps": disruption_steps, "beta": beta, "released": released}
    return {
        "paper-pgd": Transfer(pgd, source=NoiseAndDenoise()),
        "paper-bpda": Transfer(pgd, source=NoiseAndDenoise(straight_through=True)),
        "paper-autoattack": Transfer(autoattack, source=NoiseAndDenoise()),
        "consistency-disruption": ConsistencyDisruption(threat, seed=seed, **search),
    }


def standard_suite(threat: ThreatModel, *, steps: int = 20, eot: int = 4, seed: int = 0) -> dict[str, Attack]:
    """One adaptive attack of each kind, at sizes for a first inspection.

    Use more steps, restarts and EOT for published figures; the variance of the gradient flattens near 64 evaluations.
    Arguments are those of ``exact_suite``.
    """
    return {
        **_common(threat, steps, eot, seed),
        "unrolled-last": _pgd(threat, Unrolled(last=3, l1_smoothing=0.3), steps, eot, seed, balanced=True),
        "frozen-residual": FrozenResidual(threat, steps=5 * steps, every=5, seed=seed, schedule="cosine"),
        "latent": LatentAttack(threat, seed=seed),
        "consistency-disruption": ConsistencyDisruption(threat, seed=seed, beta=100.0),
    }


def exact_suite(threat: ThreatModel, *, steps: int = 20, eot: int = 8, seed: int = 0) -> dict[str, Attack]:
    """Attacks that purifiers of all kinds can be compared under.

    "transfer" does not know the defence. "one-step-transfer" attacks one-step purification, which any denoising defence
    shares much with. "bpda-eot" takes the purification as the identity (BPDA, Athalye et al. 2018, arXiv 1802.00420),
    and "surrogate-eot" its derivative as that of one denoising step. The others differentiate the purification: every
    step of a purifier that denoises, and the last five of an optimisation over latents, whose exact gradient through
    many steps points nowhere. Two of them need a backbone with ``denoise``.

    Args:
        threat: the threat model of all attacks.
        steps: number of steps of each.
        eot: number of evaluations that a gradient is averaged over.
        seed: of the attacks' own noise.
    """
    exact = Unrolled(last=5, l1_smoothing=0.3)
    found = _common(threat, steps, eot, seed)
    one_step = Transfer(_pgd(threat, None, steps, eot, seed), source=NoiseAndDenoise(sigma=0.5))
    return {
        "transfer": found.pop("transfer"),
        "one-step-transfer": one_step,
        **found,
        "exact-eot": _pgd(threat, exact, steps, eot, seed, balanced=True),
        "apgd-eot": APGD(threat, gradient=exact, steps=steps, eot=eot, seed=seed),
    }


def full_suite(threat: ThreatModel, *, steps: int = 20, eot: int = 4, seed: int = 0) -> dict[str, Attack]:
    """``exact_suite``, ``standard_suite`` and all other attacks, those with queries included. It takes hours.

    Arguments are those of ``exact_suite``.
    """
    sizes: dict[str, Any] = {"steps": steps, "eot": eot, "seed": seed}
    found = exact_suite(threat, **sizes) | standard_suite(threat, **sizes)
    whole = Unrolled(l1_smoothing=0.3, max_growth=1.0)
    implicit = Implicit(damping=1.0, l1_smoothing=0.3, iterations=8)
    known: dict[str, Any] = {"noise": "known", "keep": "best", "steps": steps * eot, "eot": 1}
    return {
        **found,
        "unrolled": _pgd(threat, whole, **sizes, balanced=True),
        "implicit": _pgd(threat, implicit, **sizes, balanced=True),
        "vote-aware": _pgd(threat, Surrogate(), **sizes, loss=VoteMargin()),
        "margin": _pgd(threat, Surrogate(), **sizes, loss=Margin()),
        "short-cmap": ShortCMAP(threat, steps=steps, seed=seed, momentum=0.75, refresh=5),
        "target-steer": TargetSteer(threat, steps=steps, seed=seed, momentum=0.75),
        "overpowered": Overpowered(threat, seed=seed),
        "transfer-short": Transfer(_pgd(threat, Surrogate(), **sizes), source=Shortened(5)),
        "fixed-seed": dataclasses.replace(found["unrolled-last"], **known),
        "autoattack": AutoAttack(threat, **sizes),
        "square": Square(threat, seed=seed),
        "spsa": SPSA(threat, steps=steps, seed=seed, momentum=0.75),
    }


def choose(attacks: Mapping[str, Attack], models: Iterable[Model]) -> tuple[dict[str, Attack], dict[str, list[str]]]:
    """Those of a set of attacks that can be run on all of the models, each once, and the names of the others by the
    reason."""
    models = list(models)
    chosen: dict[str, Attack] = {}
    made: list[list[Attack]] = []
    left_out: dict[str, list[str]] = {}
    for name, attack in attacks.items():
        here = [attack.on(model) for model in models]
        missing = next(filter(None, map(attack.missing, models)), None)
        if missing is not None:
            left_out.setdefault(f"they need {missing}", []).append(name)
        elif here in made:
            left_out.setdefault(REPEATED, []).append(name)
        else:
            chosen[name] = attack
            made.append(here)
    return chosen, left_out


def _pgd(threat: ThreatModel, gradient: Any, steps: int, eot: int, seed: int, **others: Any) -> PGD:
    sizes: dict[str, Any] = {"steps": steps, "eot": eot, "seed": seed}
    return PGD(threat, gradient=gradient, momentum=0.75, schedule="cosine", **sizes, **others)


def _common(threat: ThreatModel, steps: int, eot: int, seed: int) -> dict[str, Attack]:
    return {
        "transfer": Transfer(PGD(threat, steps=steps, seed=seed), source=Undefended()),
        "bpda-eot": _pgd(threat, StraightThrough(), steps, eot, seed),
        "surrogate-eot": _pgd(threat, Surrogate(), steps, eot, seed),
    }


REPEATED = "each is the same here as an attack before it"
"""Why an attack of a set that could be run is left out."""

SUITES: Mapping[str, Callable[..., dict[str, Attack]]] = {
    "standard": standard_suite,
    "paper": paper_suite,
    "exact": exact_suite,
    "full": full_suite,
}
"""Sets of attacks by name."""
