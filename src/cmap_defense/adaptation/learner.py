"""One optimiser step of an adaptation, and the evaluation on held-out images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmap_defense.adaptation.config import AdaptationConfig
from cmap_defense.attacks.oracle import gradient_to, unit
from cmap_defense.attacks.steps import random_point
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import copied_state, evaluating, restoring
from cmap_defense.common.ranks import Ranks
from cmap_defense.common.rng import derived_seeds, generator_for
from cmap_defense.data import LabelledImages
from cmap_defense.errors import ClassifierError, TrainingError
from cmap_defense.threat import ThreatModel
from cmap_defense.training.draws import image_indices
from cmap_defense.training.learner import Trainee, below

HELD_OUT_STEPS = 10
"""Least number of steps of the attack on held-out images. A classifier trained on attacks of one or two steps may learn
these alone ("catastrophic overfitting", Wong et al. 2020, arXiv 2001.03994), which the same attack would not show."""

AUGMENTATION, ORDER, NOISE, HELD_OUT = 0, 1, 2, 4
"""Streams of the generators of a step; ORDER is that of ``image_indices``, 3 that of dropout."""


class AdaptationLearner(Trainee):
    """A classifier behind a purifier in training.

    Every draw is a function of (seed, step, position in the batch). Parameters that require no gradient stay as they
    are. Modules that hold no others are in eval mode with all that is in them: their running statistics stay, and their
    dropout is off.

    Args:
        purified: the classifier behind the purifier, with the gradient that the attack follows. Its classifier, a
            module, is trained in place.
        data: the training images.
        held_out: images that the best weights are chosen on; None for the last weights.
        threat: of the attack; None for purified clean images alone.
        config: settings.
        team: the processes that share a batch.

    Raises:
        SettingsError: the classifier has nothing to train, or there are more processes than images in a batch.
    """

    def __init__(
        self,
        purified: PurifiedClassifier,
        data: LabelledImages,
        held_out: LabelledImages | None,
        threat: ThreatModel | None,
        config: AdaptationConfig,
        team: Ranks | None = None,
    ) -> None:
        assert isinstance(purified.classifier, nn.Module)
        super().__init__(purified.classifier, config, team)
        self.purified, self.data, self.held_out, self.threat = purified, data, held_out, threat
        self.optimiser = torch.optim.AdamW(
            self.weights.values(), betas=config.betas, weight_decay=config.weight_decay, lr=config.learning_rate
        )
        self.scores: list[float] = []
        self.best = copied_state(self.model)
        self.trained = list(_trained(self.model))

    def step(self, number: int) -> Tensor:
        try:
            loss = super().step(number)
            if (number + 1) % self.config.checkpoint_steps == 0 or number + 1 == self.config.steps:
                self.evaluate()
        except ClassifierError as error:
            if number == 0:
                raise
            raise TrainingError.diverged("The classifier's logits are NaN or infinite") from error
        return loss

    @property
    def exhausted(self) -> bool:
        """Whether the evaluations have not improved for as long as ``patience`` says."""
        if self.config.patience is None or not self.scores:
            return False
        return len(self.scores) - 1 - self.scores.index(max(self.scores)) >= self.config.patience

    def averaged(self) -> dict[str, Tensor]:
        """The state of the classifier with the averaged weights."""
        with restoring(self.model):
            self.averages[0].copy_to(self.model)
            return copied_state(self.model)

    def tensors(self) -> dict[str, Tensor]:
        found = super().tensors() | {f"best/{name}": tensor for name, tensor in self.best.items()}
        return found | {"scores": torch.tensor(self.scores, dtype=torch.float64, device="cpu")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self.best = {name: tensor.to(self.best[name].device) for name, tensor in below(tensors, "best").items()}
        self.scores = tensors["scores"].tolist()

    def _batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, C, H, W] in [0, 1], labels [B] and seeds [B] of this rank's rows of a step."""
        config, rows = self.config, slice(self.team.rank, None, self.team.world)
        chosen = image_indices(number, config.batch_size, len(self.data), config.seed)[rows]
        found = self.data.select(chosen)
        numbers = torch.arange(number * config.batch_size, (number + 1) * config.batch_size, device="cpu")[rows]
        generator = generator_for(config.seed, AUGMENTATION, number)
        images = found.unit
        if config.flip:
            mirrored = torch.rand(config.batch_size, generator=generator, device="cpu")[rows] < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if config.shift:
            moves = torch.randint(0, 2 * config.shift + 1, (config.batch_size, 2), generator=generator, device="cpu")[
                rows
            ]
            images = _shifted(images, moves, config.shift)
        seeds = derived_seeds(numbers, generator_for(config.seed, NOISE).initial_seed())
        return images.to(self.device), found.labels.to(self.device), seeds

    def _parts(self, number: int) -> Iterable[tuple[Tensor, ...]]:
        batch = self._batch(number)
        return zip(*(whole.split(self.config.micro_batch or len(whole)) for whole in batch), strict=True)

    def _backward(self, part: tuple[Tensor, ...]) -> Tensor:
        images, labels, seeds = part
        shares = [(images, 1.0)]
        if self.threat is not None:
            attacked = attacked_images(self.purified, images, labels, seeds, self.threat, self.config)
            shares = [(images, self.config.clean_weight), (attacked, 1 - self.config.clean_weight)]
        self._learning_mode()
        losses = [share * self._loss(shown, labels, seeds) for shown, share in shares if share > 0]
        loss = torch.stack(losses).sum() / self.config.batch_size
        loss.backward()
        return loss.detach()

    def _loss(self, images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        """Sum over the images of the mean cross entropy of their purified versions."""
        with _arithmetic(self.device, self.config), torch.no_grad(), evaluating(self.model):
            purified = self.purified.purify(images, seeds=seeds).images
        # autocast of its own: older versions of torch hand on the weights that were cast without a graph
        with _arithmetic(self.device, self.config):
            logits = self.purified.undefended(purified.flatten(0, 1), check=False)
        versions = purified.shape[1]
        return F.cross_entropy(logits.float(), labels.repeat_interleave(versions), reduction="sum") / versions

    def _learning_mode(self) -> None:
        """Training mode for the modules that learn; the others keep their statistics."""
        self.model.eval()
        for part in self.trained:
            part.training = True

    @torch.no_grad()
    def _moved(self, number: int) -> None:
        """Running statistics are the means over the ranks."""
        if self.team.world > 1:
            buffers = [b for b in self.model.buffers() if b.is_floating_point()]
            self.team.add_up(buffers)
            for buffer in buffers:
                buffer.div_(self.team.world)

    def evaluate(self) -> None:
        """Score the averaged weights on the held-out images, if there are any, and keep the best ones."""
        if self.held_out is None:
            return
        averaged = self.averaged()
        with restoring(self.model):
            self.model.load_state_dict(averaged)
            score = self._score(self.held_out)
        if not self.scores or score > max(self.scores):
            self.best = averaged
        self.scores.append(score)

    def _score(self, held_out: LabelledImages) -> float:
        """Accuracy on the held-out images; with attacks the mean of the clean and the attacked one."""
        right, size = 0.0, self.config.batch_size
        steps = max(HELD_OUT_STEPS, self.config.attack_steps)
        longer = self.config.replace(attack_steps=steps, attack_step_size=None)
        with evaluating(self.model):
            for start in range(0, len(held_out), size):
                part = held_out[start : start + size]
                images, labels = part.unit.to(self.device), part.labels.to(self.device)
                seeds = derived_seeds(torch.arange(start, start + len(images), device="cpu"), HELD_OUT)
                shown = [images]
                if self.threat is not None:
                    shown.append(attacked_images(self.purified, images, labels, seeds, self.threat, longer))
                for x in shown:
                    with torch.no_grad():
                        found = self.purified.purify(x, seeds=derived_seeds(seeds, 1)).labels
                    assert found is not None
                    right += (found == labels).sum().item() / len(shown)
        return right / len(held_out)


def attacked_images(
    purified: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    seeds: Tensor,
    threat: ThreatModel,
    config: AdaptationConfig,
) -> Tensor:
    """PGD with few steps on cross entropy through the purifier, from a random start; new noise in each step.

    Args:
        purified: the defence, whose ``gradient`` is followed.
        images: float [B, C, H, W] in [0, 1].
        labels: int64 [B].
        seeds: int64 [B], of the start and of the noise.
        threat: which images are allowed.
        config: number and size of the steps, and the precision.

    Returns:
        [B, C, H, W], allowed by the threat model, without a graph.
    """
    size = config.attack_step_size or min(threat.eps, 2.5 * threat.eps / config.attack_steps)
    x = random_point(threat, derived_seeds(seeds, 0), images)
    with evaluating(purified.classifier), torch.enable_grad(), _arithmetic(images.device, config):
        for step in range(config.attack_steps):
            x = x.detach().requires_grad_()
            logits = purified(x, seeds=derived_seeds(seeds, 2 + step))
            gradient = gradient_to(x, F.cross_entropy(logits, labels, reduction="sum"))
            direction = unit(gradient) if threat.norm == "l2" else gradient.sign()
            x = threat.project(x.detach() + size * direction, images)
    return x.detach()


def _arithmetic(device: torch.device, config: AdaptationConfig) -> torch.autocast:
    """Purifier and classifier in the precision of the training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


def _trained(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it; without the ones whose parameters all require no gradient, and all that is in these.

    A module without parameters (Dropout, BatchNorm2d(affine=False)) so goes with the nearest one around it with some.
    """
    own = list(module.parameters())
    if not own or any(p.requires_grad for p in own):
        yield module
        for part in module.children():
            yield from _trained(part)


def _shifted(images: Tensor, moves: Tensor, most: int) -> Tensor:
    """Images [B, C, H, W] moved by ``most`` - ``moves`` [B, 2] pixels down and right, black where nothing is left."""
    height, width = images.shape[2:]
    padded = F.pad(images, (most, most, most, most))
    rows = (torch.arange(height, device="cpu") + moves[:, :1])[:, None, :, None]
    columns = (torch.arange(width, device="cpu") + moves[:, 1:])[:, None, None, :]
    batch, channels = (
        torch.arange(len(images), device="cpu")[:, None, None, None],
        torch.arange(images.shape[1], device="cpu")[None, :, None, None],
    )
    return padded[batch, channels, rows, columns]
