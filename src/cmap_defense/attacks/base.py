"""The base class of attacks: it projects the images that a search returns and re-evaluates them.

A subclass implements ``run``. No attack can report success on an image outside the threat model, or on a prediction
that its search has used.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from cmap_defense.attacks.goal import Goal, margin
from cmap_defense.attacks.oracle import Model, Oracle, on_unit_images
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.describe import describe, qualified_name
from cmap_defense.common.inputs import check_finite, check_images, check_indices, check_unit_range, usable
from cmap_defense.common.modules import evaluating
from cmap_defense.common.options import NamedOptions
from cmap_defense.common.progress import OnProgress, Progress
from cmap_defense.common.rng import derived_seeds, isolated
from cmap_defense.common.settings import check_fields, require_integer, setting
from cmap_defense.common.statistics import most_frequent
from cmap_defense.errors import AttackError, GradientWarning, InputTypeError, InputValueError
from cmap_defense.gradients import Detached, GradientMode, Unrolled
from cmap_defense.threat import ThreatModel

if TYPE_CHECKING:
    from cmap_defense.attacks.steps import PGD

A_MODE = "an object such as StraightThrough()"

LATENTS = "a purifier that optimises latents"
WRAPPER = "the parts or the gradient modes of a PurifiedClassifier"
DENOISE = "a backbone with denoise(noisy, sigma)"
GRADIENT = "a gradient mode that has a gradient"
NOT_LIVE = "a model without live step hooks"
"""What attacks need and some models have not."""


@dataclasses.dataclass(frozen=True, eq=False)
class Candidates:
    """What a search returns.

    Attributes:
        images: [B, M, C, H, W], M attempts per image.
        history: numbers per step and image by name, [steps, B] each.
    """

    images: Tensor
    history: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttackResult:
    """The outcome per image.

    Attributes:
        images: [B, C, H, W] in [0, 1], inside the threat model: of the attempts, the one with the highest margin in one
            prediction each. They are float32, or of the precision given where that is higher.
        success: [B] bool, whether the first re-evaluation predicts a wrong class, or the target where there are some.
        distance: [B], from the clean image in the threat model's norm.
        queries: evaluations of the model per image, those of the choice and of the re-evaluation included. An attack
            that searches another model counts that one's too.
        history: numbers per step of the search by name, [steps, B] each, restarts one after the other. APGD has a row
            for its start besides, AutoAttack a row for each round.
        predictions: [J, B] int64, the classes predicted for ``images`` in J re-evaluations.
        candidates: [B, M, C, H, W], all attempts, projected.
        candidate_predictions: [B, M] int64, the prediction for each attempt by which ``images`` was chosen.
        chosen: [B] int64, the position of ``images`` among the attempts.
        labels: [B] int64, the true classes.
        targets: [B] int64, the classes that a targeted attack aims at; None for an untargeted one.
        nonfinite: [B], the share of the search's gradients that were NaN or infinite, and counted as 0; None where
            they were not looked at, as in a search without gradients.
    """

    images: Tensor
    success: Tensor
    distance: Tensor
    queries: int
    history: Mapping[str, Tensor]
    predictions: Tensor
    candidates: Tensor
    candidate_predictions: Tensor
    chosen: Tensor
    labels: Tensor
    targets: Tensor | None = None
    nonfinite: Tensor | None = None

    def __repr__(self) -> str:
        names = ("success", "mean_success", "vote_success", "any_success", "any_candidate_success")
        shares = ", ".join(f"{name} {getattr(self, name).float().mean():.3f}" for name in names)
        counts = [*self.candidates.shape[:2], len(self.predictions)]
        return "AttackResult({} images, {} attempts each, {} re-evaluations: {})".format(*counts, shares)

    @property
    def any_success(self) -> Tensor:
        """[B] bool, whether any of the J re-evaluations is a success: the defence fails in the worst of J."""
        return Goal(self.labels, self.targets).reached(self.predictions).any(dim=0)

    @property
    def mean_success(self) -> Tensor:
        """[B] in [0, 1], the share of the J re-evaluations that are a success."""
        return Goal(self.labels, self.targets).reached(self.predictions).float().mean(dim=0)

    @property
    def vote_success(self) -> Tensor:
        """[B] bool, whether the majority vote of the J re-evaluations is a success; the lower class wins ties."""
        return Goal(self.labels, self.targets).reached(most_frequent(self.predictions, dim=0))

    @property
    def any_candidate_success(self) -> Tensor:
        """[B] bool, whether any of the M attempts succeeds, each predicted once."""
        return Goal(self.labels, self.targets).reached(self.candidate_predictions.T).any(dim=0)


@dataclasses.dataclass(frozen=True)
class Attack(NamedOptions, abc.ABC):
    """An attack under a threat model, called as ``attack(model, images, labels)``.

    Args:
        threat: norm and eps.
        restarts: independent runs; the attempts of all of them are candidates.
        seed: of all noise: the attack's own and, for a purified classifier, the model's. The noise of an image is a
            function of this seed and the image's index alone.
        noise: "fresh" for independent noise in each evaluation of the model, or "known" for one fixed noise in all of
            them, the re-evaluation included, as for an attacker who knows the defender's seed.

    Raises:
        SettingsError: a value is out of its range.
    """

    threat: ThreatModel = setting(like="a ThreatModel such as ThreatModel(eps=8 / 255)")
    _: dataclasses.KW_ONLY
    restarts: int = setting(1, minimum=1)
    seed: int = setting(0, minimum=-(2**63))
    noise: str = setting("fresh", choices=("fresh", "known"))

    needs_latents: ClassVar[bool] = False
    """Whether the attack works on the latents that a purifier optimises."""

    _synonyms: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("iterations", "num_steps", "n_steps"), "steps"),
        "epsilon": "eps",
        "alpha": "step_size",
        "random_state": "seed",
    }
    _advice: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("targeted", "targets"), "Targets are given to the call: attack(model, images, labels, targets=...)."
        ),
        "model": "The model is given to the call: attack(model, images, labels).",
    }

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        targets: Tensor | None = None,
        indices: Tensor | Sequence[int] | None = None,
        reevaluations: int = 1,
        progress: OnProgress = None,
    ) -> AttackResult:
        """Attack every image.

        Args:
            model: images in [0, 1] to logits. A purified classifier that takes normalised images is attacked in [0, 1]
                all the same; one with a seed of its own has that noise in the re-evaluations too. A module is attacked
                in eval mode and gets its own mode back. Call ``eval()`` yourself on modules that a function uses.
            images: float [B, C, H, W] in [0, 1].
            labels: int64 [B], the true classes.
            targets: int64 [B], the classes that a targeted attack aims at; None for an untargeted one.
            indices: [B] integers, the images' positions in their data set, which their noise depends on; None for
                0, 1, ...
            reevaluations: J, predictions for the final images with independent noise.
            progress: True for a bar on standard error, or a function of (done, total): evaluations of the model, and
                None for their total, which nobody knows.

        Returns:
            The images, whether they succeed, and how they were found.

        Raises:
            InputTypeError: images, labels, targets or indices have the wrong type.
            InputValueError: they have the wrong shape or range.
            SettingsError: the attack needs a ``PurifiedClassifier``, or eps is larger
                than the distance of any two such images.
            GradientError: the attack needs a gradient that the model does not give.
            AttackError: its search returned something else than ``Candidates`` of finite images.
        """
        check_finite(check_images(images))
        check_unit_range(images)
        self.threat.require_fit(images.shape[1:])
        labels = _classes("labels", labels, images)
        targets = None if targets is None else _classes("targets", targets, images)
        aimless = 0 if targets is None else int(targets.eq(labels).sum())
        if aimless:
            raise InputValueError(
                f"targets are the true classes of {aimless} of {len(labels)} images, which need no attack: give other "
                "classes, such as (labels + 1) % classes."
            )
        name = type(self).__name__
        require_integer(name, "reevaluations", reevaluations, minimum=1)
        model = on_unit_images(model)
        index = check_indices(indices, len(images))
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(isolated(self.seed, *index.tolist()))
            stack.enter_context(evaluating(model))
            bar = stack.enter_context(Progress(None, name, wanted=progress))
            clean = usable(images.detach()).to(torch.promote_types(images.dtype, torch.float32))
            wanted = [usable(part) for part in (labels, targets) if part is not None]
            goal = Goal(*wanted)
            oracle = Oracle(
                model,
                derived_seeds(index, self.seed),
                known=self.noise == "known",
                tick=bar.step,
                needed=max((int(part.max()) + 1 for part in wanted if part.numel()), default=0),
            )
            found = self._attempts(oracle, clean, goal)
            still = found.history.get("gradient_norm", torch.ones(1, 0, device="cpu")).eq(0).all(dim=0).sum()
            if still:
                warnings.warn(
                    f"The gradient of {still} of {len(clean)} images was zero at every step, so that {name} did "
                    "nothing to them. That is no robustness: try another loss, such as Margin(), or gradient mode.",
                    GradientWarning,
                    stacklevel=2,
                )
            nonfinite = 1 - torch.stack(oracle.finite).float().mean(dim=0) if oracle.finite else None
            if nonfinite is not None and nonfinite.any():
                warnings.warn(
                    f"{name}: {nonfinite.mean():.1%} of the gradients were NaN or infinite and counted as zero, of "
                    f"{int((nonfinite > 0).sum())} images. Until that is mended, what is left is no robustness.",
                    GradientWarning,
                    stacklevel=2,
                )
            with torch.no_grad():
                result = self._reevaluated(oracle, clean, goal, found, reevaluations)
            return dataclasses.replace(result, nonfinite=nonfinite)

    def _attempts(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        """The attempts of all restarts, one after the other; norms of the oracle's gradients join a history without."""
        if not len(clean):
            return Candidates(clean[:, None])
        runs, names = [], None
        for restart in range(self.restarts):
            own = oracle.restarted(restart)
            given = clean.clone()  # a search that changes its copy in place does not move the ball
            found = check_candidates(self.run(own, given, goal), clean, self)
            names = found.history.keys() if names is None else names
            if found.history.keys() != names:
                raise AttackError(
                    f"{type(self).__name__}.run must return a history of the same names in each restart, but returned "
                    f"{sorted(found.history)} after {sorted(names)}."
                )
            history = dict(found.history)
            if own.gradient_norms:
                history.setdefault("gradient_norm", torch.stack(own.gradient_norms))
            runs.append(Candidates(found.images, history))
        shared = [name for name in runs[0].history if all(name in run.history for run in runs)]
        history = {name: torch.cat([run.history[name] for run in runs]) for name in shared}
        return Candidates(torch.cat([run.images.detach() for run in runs], dim=1), history)

    def _reevaluated(
        self, oracle: Oracle, clean: Tensor, goal: Goal, found: Candidates, reevaluations: int
    ) -> AttackResult:
        """Project, choose among the attempts by one prediction each, and re-evaluate the chosen one."""
        reevaluator = oracle.reevaluator()
        attempts = [self.threat.project(part.to(clean), clean) for part in found.images.unbind(dim=1)]
        images, predictions = attempts[0], None
        first = torch.zeros_like(goal.labels)
        if len(attempts) > 1:
            logits = [reevaluator(attempt) for attempt in attempts]
            predictions = torch.stack([part.argmax(dim=1) for part in logits], dim=1)
            first = torch.stack([margin(part, goal) for part in logits], dim=1).argmax(dim=1)
            images = torch.stack(attempts, dim=1)[torch.arange(len(clean), device=clean.device), first]
        final = torch.stack([reevaluator(images).argmax(dim=1) for _ in range(reevaluations)])
        return AttackResult(
            images=images,
            success=goal.reached(final[0]),
            distance=self.threat.distance(images, clean),
            queries=oracle.count + reevaluator.count,
            history=found.history,
            predictions=final,
            candidates=torch.stack(attempts, dim=1),
            candidate_predictions=final[0][:, None] if predictions is None else predictions,
            chosen=first,
            labels=goal.labels,
            targets=goal.targets,
        )

    @abc.abstractmethod
    def run(self, oracle: Oracle, clean: Tensor, goal: Goal) -> Candidates:
        """Search once; the only method that a new attack must implement. It is called once per restart.

        Args:
            oracle: the model's predictions, gradients and noise; it counts evaluations.
            clean: images [B, C, H, W] in [0, 1].
            goal: the true classes, and the targets of a targeted attack.

        Returns:
            Attempts. They need not be inside the threat model, as the caller projects and re-evaluates them.
        """

    def missing(self, model: Model) -> str | None:
        """What the attack needs and a model has not, such as "a purifier that optimises latents"; None where it can be
        run. A set of attacks by name leaves out those that cannot.

        By default all can, those with ``needs_latents`` where the model's purifier optimises latents.
        """
        return LATENTS if self.needs_latents and not has_latents(model) else None

    def on(self, model: Model) -> Attack:
        """The attack that this one is on a model, with the settings that have no effect there at their defaults; by
        default itself. A set of attacks by name leaves out those that are the same as an earlier one."""
        return self

    def differentiates_defence(self, model: Model) -> bool:
        """Whether the search follows a gradient through this model's own defence, exact or approximate (BPDA).

        It is False for the gradient of a surrogate or of another model, and by default. An evaluation gives no headline
        without such an attack.
        """
        return False

    def evaluates_defence(self) -> bool:
        """Whether the search evaluates the defended model or parts of it; False for transfer attacks."""
        return True

    def first_step(self) -> float | None:
        """The size of the first step from a random start, in the threat model's norm; by default None, as for a search
        that starts elsewhere or takes no steps on the image."""
        return None

    def predictions_per_image(self) -> int:
        """Predictions with independent noise in which the search could notice a success, per image; by default 0.

        The choice between attempts does not count. An evaluation makes as many predictions for clean images, as the
        selection effect of these is in its figures too.
        """
        return 0

    def sweep_attack(self) -> PGD | None:
        """The PGD that an evaluation repeats at other numbers of steps and sizes of eps; by default None."""
        return None

    def check_installed(self) -> None:
        """Raises ``MissingExtraError`` where a library that the search needs is not installed; by default nothing. An
        evaluation calls it before its first work unit."""

    def to_dict(self) -> dict[str, Any]:
        """The attack as JSON values: its class, and its settings by name.

        Objects among them are dictionaries of the same form, a network by a checksum of its weights.
        """
        found = describe(self)
        return found if isinstance(found, dict) else {"class": qualified_name(self), "described": found}

    def under(self, threat: ThreatModel) -> Attack:
        """The same attack under another threat model of the same norm."""
        return dataclasses.replace(self, threat=threat)

    def passes_per_image(self, model: PurifiedClassifier) -> int | None:
        """How many network passes the search takes for each image, by which an evaluation estimates its duration
        before it starts. Those of a gradient that goes back through the purification are not included. None, the
        default, where that is not known: the evaluation then measures it in the first work unit.
        """
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """Base of attacks that may search a purified classifier in another gradient mode than its own.

    Args:
        gradient: the gradient mode during the search; None for the classifier's own.
    """

    gradient: GradientMode | None = setting(None, like=A_MODE)

    def missing(self, model: Model) -> str | None:
        mode = self.gradient or getattr(model, "gradient", None)
        return super().missing(model) or (missing_for(mode, model) if isinstance(mode, GradientMode) else None)

    def on(self, model: Model) -> Attack:
        if self.gradient is None or not isinstance(model, PurifiedClassifier) or model.purifier.involves_latents:
            return self
        return dataclasses.replace(self, gradient=self.gradient.without_latents())

    def differentiates_defence(self, model: Model) -> bool:
        mode = self.gradient
        if mode is None and isinstance(model, PurifiedClassifier):
            mode = model.gradient
        return mode is None or mode.differentiates_defence


def check_candidates(found: object, clean: Tensor, attack: Attack) -> Candidates:
    """What the search of an attack returned. Raises ``AttackError`` where it is something else."""
    name, shape = type(attack).__name__, list(clean.shape)
    if not isinstance(found, Candidates):
        raise AttackError(f"{name}.run must return Candidates(images), but returned {type(found).__name__}.")
    images, history = found.images, found.history
    given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
    if not isinstance(images, Tensor) or images.ndim != 5 or not images.shape[1] or images[:, 0].shape != clean.shape:
        hint = " If that is one attempt for each image, return Candidates(images[:, None])." if given == shape else ""
        expected = [shape[0], "M", *shape[1:]]
        raise AttackError(
            f"{name}.run must return Candidates of images [B, M, C, H, W], here [{', '.join(map(str, expected))}], but "
            f"returned {given}.{hint}"
        )
    if not images.is_floating_point():
        raise AttackError(f"{name}.run must return images in [0, 1] of a float type, but they are {images.dtype}.")
    if not images.isfinite().all():
        raise AttackError(f"{name}.run returned NaN or infinite images.")
    for key, values in history.items() if isinstance(history, Mapping) else [("history", history)]:
        if not isinstance(values, Tensor) or values.ndim != 2 or values.shape[1] != shape[0]:
            came = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise AttackError(f"{name}.run must return a history of tensors [steps, B], but {key!r} is {came}.")
    return found


def missing_for(part: Any, model: Model) -> str | None:
    """What a gradient mode, or the source of a transfer, needs and a model has not."""
    if not isinstance(model, PurifiedClassifier):
        return WRAPPER
    if part.needs_latents and not has_latents(model):
        return LATENTS
    if part.needs_denoise and model.denoiser() is None:
        return DENOISE
    if isinstance(part, Detached):
        return GRADIENT
    live = isinstance(part, GradientMode) and any(hook.live for hook in model._step_hooks)
    return NOT_LIVE if live and not isinstance(part, Unrolled) else None


def has_latents(model: Model) -> bool:
    """Whether a model is a purified classifier whose purifier optimises latents."""
    return isinstance(model, PurifiedClassifier) and model.purifier.optimises_latents


def _classes(name: str, given: Any, images: Tensor) -> Tensor:
    """Integers [B] on the images' device."""
    if not isinstance(given, Tensor) or given.is_floating_point() or given.dtype == torch.bool:
        raise InputTypeError(f"{name} must be a tensor of integers [B], but are {given!r}.")
    if given.shape != images.shape[:1]:
        raise InputValueError(f"{name} must be [{len(images)}], one per image, but are {list(given.shape)}.")
    if given.numel() and given.min() < 0:
        raise InputValueError(f"{name} must be classes, 0 at least, but go down to {int(given.min())}.")
    return given.detach().to(images.device, torch.int64, copy=True)
