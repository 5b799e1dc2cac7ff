"""One optimiser step, and all that changes in it."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cmap_defense.common.modules import multiplies_bfloat16
from cmap_defense.common.ranks import Ranks
from cmap_defense.common.rng import isolated
from cmap_defense.errors import SettingsError
from cmap_defense.training.config import TrainingConfig
from cmap_defense.training.draws import Draws, check_data
from cmap_defense.training.ema import EMA, Target
from cmap_defense.training.objectives import MODELS, Batch, Model, Objective

DROPOUT = 3
"""Stream of the generator that dropout draws from; batches have those below."""


class Trainee(abc.ABC):
    """A module in training, with Adam's moments and averaged weights: what ``train`` trains.

    A subclass sets ``optimiser``, which is one of Adam's family, and writes ``_parts`` and ``_backward``. The model is
    trained in place. Each of the processes that share a batch has a learner.

    Raises:
        SettingsError: there are more processes than images in a batch, or nothing can be trained.
    """

    optimiser: torch.optim.Optimizer

    def __init__(self, model: Any, config: Any, team: Ranks | None) -> None:
        self.team = team or Ranks()
        if config.batch_size < self.team.world:
            raise SettingsError(
                f"A batch of {config.batch_size} images cannot be shared by {self.team.world} processes: raise "
                "batch_size, or start fewer."
            )
        self.model = model
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.weights:
            raise SettingsError(
                f"No parameter of the {type(model).__name__} requires a gradient: nothing can be trained."
            )
        self.device = next(iter(self.weights.values())).device
        if config.precision == "auto":
            config = config.replace(precision="bfloat16" if multiplies_bfloat16(self.device) else "float32")
        self.config = config
        self.averages = tuple(EMA(model, half_life) for half_life in config.ema_half_life)

    def step(self, number: int) -> Tensor:
        """Optimiser step ``number`` >= 0. Returns the mean loss [] of the whole batch, on the device."""
        config, seen = self.config, number * self.config.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        parts = self._parts(number)
        with isolated(config.seed, DROPOUT, number, self.team.rank):
            loss = torch.stack([self._backward(part) for part in parts]).sum()
        self.team.add_up([loss, *(p.grad for p in self.weights.values() if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.weights.values(), config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, seen)
        self.optimiser.step()
        self._moved(number)
        for average in self.averages:
            average.update(self.model, batch_size=config.batch_size, images_seen=seen + config.batch_size)
        return loss + 0 * norm  # not finite where a gradient is not, which stops the training

    @abc.abstractmethod
    def _parts(self, number: int) -> Iterable[Any]:
        """What this process computes of a step, as batches that fit into memory."""

    @abc.abstractmethod
    def _backward(self, part: Any) -> Tensor:
        """Add to the gradients of the whole batch's mean loss; returns the share of this part in it, []."""

    def _moved(self, number: int) -> None:  # noqa: B027 - not every learner has something to do
        """Called when the weights have moved, before they are averaged."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name, not copied."""
        found = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for average in self.averages:
            found |= {f"ema-{average.half_life}/{name}": tensor for name, tensor in average.weights.items()}
        for name, p in self.weights.items():
            found |= {f"adam/{key}/{name}": tensor for key, tensor in sorted(self.optimiser.state[p].items())}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of ``tensors``. Raises KeyError or RuntimeError when something is missing."""
        self.model.load_state_dict(below(tensors, "weights"))
        for average in self.averages:
            average.load(below(tensors, f"ema-{average.half_life}"))
        counts_on = self.device if self.optimiser.defaults.get("fused") else torch.device("cpu")
        for key in ("exp_avg", "exp_avg_sq", "step"):
            for name, tensor in below(tensors, f"adam/{key}").items():
                weight = self.weights[name]
                moved = tensor.to(counts_on) if key == "step" else torch.empty_like(weight).copy_(tensor)
                self.optimiser.state[weight][key] = moved


class Learner(Trainee):
    """A model in training, and the target of the loss.

    Args:
        model: trained in place; of the objective's kind.
        images: uint8 [N, C, H, W] on the CPU.
        labels: int64 [N] for a class-conditional model; None for another.
        objective: losses per image.
        config: settings of the training.
        team: the processes that share a batch; each of them has a learner.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor | None,
        objective: Objective,
        config: TrainingConfig,
        team: Ranks | None = None,
    ) -> None:
        if type(model) is not MODELS[objective.kind]:
            raise SettingsError(
                f"The objective {objective.name!r} trains a {MODELS[objective.kind].__name__}, but this is a "
                f"{type(model).__name__}."
            )
        check_data(model, images, labels)
        on_cuda = next(model.parameters()).is_cuda
        if on_cuda if config.channels_last is None else config.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - not in torch's signature
        super().__init__(model.train(), config, team)
        self.objective = objective
        self.draws = Draws(images, labels, self.config, self.device, self.team)
        self.optimiser = torch.optim.Adam(self.weights.values(), betas=config.betas, fused=on_cuda or None)
        self.target = Target(model, objective.decay_at(0.0))
        self.progress = 0.0
        if config.compile:
            for compiled in {model.network, self.target.model.network}:
                compiled.compile()

    def _parts(self, number: int) -> Iterable[Batch]:
        batch = self.draws(number)
        self.progress = batch.progress
        share = len(batch.images)
        size = self.config.micro_batch or share
        return [batch.rows(slice(i, i + size)) for i in range(0, share, size)]

    def _backward(self, part: Batch) -> Tensor:
        model, target = self.model, self.target.model
        denoise, target_denoise = (functools.partial(m.denoise, class_labels=part.labels) for m in (model, target))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            losses = self.objective.losses(denoise, part, model.noise, target_denoise)
        loss = losses.sum() / self.config.batch_size
        loss.backward()
        return loss.detach()

    def _moved(self, number: int) -> None:
        self.target.update(self.model, self.objective.decay_at(self.progress))

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {f"target/{name}": tensor for name, tensor in self.target.weights.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        super().load(tensors)
        self.target.load(below(tensors, "target"))


def learning_rate(config: TrainingConfig, images_seen: float) -> float:
    """Linear warm-up, then a half cosine to zero at the end of the training."""
    rise = min(1.0, (images_seen + config.batch_size) / max(1, config.warmup_images))
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / config.length)))


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose name begins with the prefix and a slash, by the rest of it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
