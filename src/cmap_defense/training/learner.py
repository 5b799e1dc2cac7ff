"""One optimiser step, and all that changes in it."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cmap_defense.errors import SettingsError
from cmap_defense.ranks import Ranks
from cmap_defense.rng import isolated
from cmap_defense.training.draws import Draws, fits_beside
from cmap_defense.training.ema import EMA, Target
from cmap_defense.training.models import MODELS, Model
from cmap_defense.training.objectives import Batch, Objective
from cmap_defense.training.settings import Execution, TrainSettings

__all__ = ["Learner", "learning_rate"]


class Learner:
    """A model, Adam's moments, averaged weights, and the target of the loss.

    Args:
        model: trained in place; in the kind of the objective.
        images: uint8 [N, C, H, W] on the CPU. labels: int64 [N], or None.
        objective, settings, execution: what is minimised, and how.
        team: the processes that share a batch; each of them has a learner.

    Raises:
        SettingsError: the objective trains another kind of model, or there are more processes than images in a batch.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor | None,
        objective: Objective,
        settings: TrainSettings,
        execution: Execution,
        team: Ranks,
    ) -> None:
        _check_fits(model, objective, settings, team)
        self.model, self.objective, self.settings, self.team = model, objective, settings, team
        self.execution = execution
        self.device = next(model.parameters()).device
        on_cuda = self.device.type == "cuda"
        if on_cuda if execution.channels_last is None else execution.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - not in torch's signature
        hold = fits_beside(images, self.device) if execution.hold_images is None else execution.hold_images
        self.draws = Draws(images, labels, settings, device=self.device, hold=hold, team=team)
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.Adam(self.weights.values(), betas=settings.betas, fused=on_cuda or None)
        self.averages = tuple(EMA(model, half_life) for half_life in settings.ema_half_lives)
        self.target = Target(model, objective.target_decay(0.0))
        if execution.compile:
            for compiled in {model.network, self.target.model.network}:
                compiled.compile()

    def step(self, number: int) -> Tensor:
        """Optimiser step ``number`` >= 0. Returns the mean loss [] of the whole batch, on the device."""
        model, settings, seen = self.model, self.settings, number * self.settings.batch_size
        batch = self.draws(number)
        self.optimiser.zero_grad(set_to_none=True)
        with isolated(settings.seed, 3, number, self.team.rank):  # what dropout draws
            loss = sum(self._backward(part) for part in self._parts(batch))
        assert isinstance(loss, Tensor)
        self.team.add_up([loss, *(p.grad for p in self.weights.values() if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.weights.values(), settings.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(settings, seen)
        self.optimiser.step()

        self.target.update(model, self.objective.target_decay(batch.progress))
        for average in self.averages:
            average.update(model, batch_size=settings.batch_size, images_seen=seen + settings.batch_size)
        return loss + 0 * norm  # no number where a gradient is none: what reads the loss stops the training

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """As many images of this process's share at a time as go through the network together."""
        size = self.execution.micro_batch or len(batch.images)
        for start in range(0, len(batch.images), size):
            yield batch.rows(slice(start, start + size))

    def _backward(self, batch: Batch) -> Tensor:
        """Add to the gradients of the whole batch's mean loss; what these images are of it, [], without a graph."""
        model, target = self.model, self.target.model
        denoise, target_denoise = (functools.partial(m.denoise, class_labels=batch.labels) for m in (model, target))
        with self._precision():
            losses = self.objective.losses(denoise, batch, model.noise, target_denoise)
        loss = losses.sum() / self.settings.batch_size
        loss.backward()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint has to hold, by name; not copied."""
        found = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for average in self.averages:
            found |= {f"ema-{average.half_life}/{name}": tensor for name, tensor in average.weights.items()}
        found |= {f"target/{name}": tensor for name, tensor in self.target.weights.items()}
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found |= {f"adam/{key}/{name}": self.optimiser.state[p][key] for name, p in self.weights.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what :meth:`tensors` gave. Raises KeyError or RuntimeError when something is missing."""
        self.model.load_state_dict(_below(tensors, "weights"))
        for average in self.averages:
            average.load(_below(tensors, f"ema-{average.half_life}"))
        self.target.load(_below(tensors, "target"))
        for key in ("exp_avg", "exp_avg_sq"):
            for name, moment in _below(tensors, f"adam/{key}").items():
                self.optimiser.state[self.weights[name]][key] = torch.empty_like(self.weights[name]).copy_(moment)
        counts_on = self.device if self.optimiser.defaults["fused"] else torch.device("cpu")
        for name, count in _below(tensors, "adam/step").items():
            self.optimiser.state[self.weights[name]]["step"] = count.to(counts_on)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")


def learning_rate(settings: TrainSettings, images_seen: float) -> float:
    """Linear warm-up, then a half cosine to zero at the end of the training."""
    rise = min(1.0, (images_seen + settings.batch_size) / max(1, settings.warmup_images))
    return settings.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / settings.images)))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def _check_fits(model: Model, objective: Objective, settings: TrainSettings, team: Ranks) -> None:
    if type(model) is not MODELS[objective.kind]:
        raise SettingsError(
            f"The objective {objective.name!r} trains a {MODELS[objective.kind].__name__}, but this is a "
            f"{type(model).__name__}."
        )
    if settings.batch_size < team.world:
        raise SettingsError(
            f"A batch of {settings.batch_size} images cannot be shared by {team.world} processes: raise batch_size, "
            "or start fewer."
        )
