"""One optimiser step, and all that changes in it."""

from __future__ import annotations

import functools
import math

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


class Learner:
    """A model in training, with Adam's moments, averaged weights, and the target of the loss.

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
        self.team = team or Ranks()
        if type(model) is not MODELS[objective.kind]:
            raise SettingsError(
                f"The objective {objective.name!r} trains a {MODELS[objective.kind].__name__}, but this is a "
                f"{type(model).__name__}."
            )
        if config.batch_size < self.team.world:
            raise SettingsError(
                f"A batch of {config.batch_size} images cannot be shared by {self.team.world} processes: raise "
                "batch_size, or start fewer."
            )
        check_data(model, images, labels)
        self.model, self.objective = model.train(), objective
        self.device = next(model.parameters()).device
        on_cuda = self.device.type == "cuda"
        if config.precision == "auto":
            config = config.replace(precision="bfloat16" if multiplies_bfloat16(self.device) else "float32")
        self.config = config
        if on_cuda if config.channels_last is None else config.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - not in torch's signature
        self.draws = Draws(images, labels, config, self.device, self.team)
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.Adam(self.weights.values(), betas=config.betas, fused=on_cuda or None)
        self.averages = tuple(EMA(model, half_life) for half_life in config.ema_half_life)
        self.target = Target(model, objective.decay_at(0.0))
        if config.compile:
            for compiled in {model.network, self.target.model.network}:
                compiled.compile()

    def step(self, number: int) -> Tensor:
        """Optimiser step ``number`` >= 0. Returns the mean loss [] of the whole batch, on the device."""
        model, config, seen = self.model, self.config, number * self.config.batch_size
        batch = self.draws(number)
        self.optimiser.zero_grad(set_to_none=True)
        share = len(batch.images)
        size = config.micro_batch or share
        with isolated(config.seed, 3, number, self.team.rank):  # dropout draws from it
            loss = torch.stack([self._backward(batch.rows(slice(i, i + size))) for i in range(0, share, size)]).sum()
        self.team.add_up([loss, *(p.grad for p in self.weights.values() if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.weights.values(), config.clip_norm)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, seen)
        self.optimiser.step()

        self.target.update(model, self.objective.decay_at(batch.progress))
        for average in self.averages:
            average.update(model, batch_size=config.batch_size, images_seen=seen + config.batch_size)
        return loss + 0 * norm  # not finite where a gradient is not, which stops the training

    def _backward(self, batch: Batch) -> Tensor:
        """Add to the gradients of the whole batch's mean loss; returns the share of these images in it, []."""
        model, target = self.model, self.target.model
        denoise, target_denoise = (functools.partial(m.denoise, class_labels=batch.labels) for m in (model, target))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            losses = self.objective.losses(denoise, batch, model.noise, target_denoise)
        loss = losses.sum() / self.config.batch_size
        loss.backward()
        return loss.detach()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name, not copied."""
        found = {f"weights/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for average in self.averages:
            found |= {f"ema-{average.half_life}/{name}": tensor for name, tensor in average.weights.items()}
        found |= {f"target/{name}": tensor for name, tensor in self.target.weights.items()}
        for key in ("exp_avg", "exp_avg_sq", "step"):
            found |= {f"adam/{key}/{name}": self.optimiser.state[p][key] for name, p in self.weights.items()}
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of ``tensors``. Raises KeyError or RuntimeError when something is missing."""
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


def learning_rate(config: TrainingConfig, images_seen: float) -> float:
    """Linear warm-up, then a half cosine to zero at the end of the training."""
    rise = min(1.0, (images_seen + config.batch_size) / max(1, config.warmup_images))
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * min(1.0, images_seen / config.length)))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
