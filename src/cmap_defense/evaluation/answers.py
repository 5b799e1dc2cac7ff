"""Fresh answers of a model: the only thing that accuracy is counted on."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from cmap_defense.attacks import SeededModel
from cmap_defense.attacks.oracle import Model
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cmap.optimise import LatentState
from cmap_defense.cmap.voting import nearest_voter, vote_logits
from cmap_defense.evaluation.protocol import answer_seeds
from cmap_defense.inputs import check_logits
from cmap_defense.results import History
from cmap_defense.rng import isolated

__all__ = ["Answers", "ask", "looked_at"]


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """labels: [A, B] int64, the predicted classes.

    Of a purified classifier besides (None and empty for another model):

    one_latent: [A, B], the share of the K latents that are right by themselves: the accuracy without a vote.
    purified: [B, C, H, W] uint8, of the first answer the purified image nearest in L1 of those that are classified as
    the vote says (:func:`~cmap_defense.cmap.voting.nearest_voter`).
    loop: by name the terms and moments of :class:`~cmap_defense.results.History`, [iterations, B], means over the
    answers. on_the_way: [T, B] bool, whether the vote of the first answer is right at :func:`looked_at`'s iterations.
    """

    labels: Tensor
    one_latent: Tensor | None = None
    purified: Tensor | None = None
    loop: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    on_the_way: Tensor | None = None


def looked_at(iterations: int) -> list[int]:
    """At which of N iterations the vote is taken, to see how it comes about: about ten, 0 and N among them."""
    count = min(iterations, 10)
    return [round(iterations * part / count) for part in range(count + 1)]


def ask(model: Model, images: Tensor, labels: Tensor, indices: Tensor, numbers: Iterable[int]) -> Answers:
    """Answers about images [B, C, H, W] in [0, 1], without gradients; on the CPU.

    Args:
        model: images to logits. A purified classifier that takes normalised images is not for here.
        images: float, valid.
        labels: [B], the true classes.
        indices: [B] noise indices (see :func:`~cmap_defense.evaluation.protocol.run_indices`).
        numbers: of the answers; each number is a noise of its own, whatever the others are.
    """
    numbers = list(numbers)
    with torch.no_grad():
        if isinstance(model, PurifiedClassifier):
            return _ask_purified(model, images, labels, indices, numbers)
        predicted = []
        for number in numbers:
            seeds = answer_seeds(indices, number)
            if isinstance(model, SeededModel):
                answer = model(images, seeds=None if model.seed is not None else seeds)
            else:
                with isolated(*seeds.tolist()):
                    answer = model(images)
            predicted.append(check_logits(answer, len(images)).argmax(dim=1))
    return Answers(torch.stack(predicted).cpu())


def _ask_purified(
    model: PurifiedClassifier, images: Tensor, labels: Tensor, indices: Tensor, numbers: Sequence[int]
) -> Answers:
    predicted, shares, way = [], [], _Way(model, images, labels)
    sums: dict[str, Tensor] = {}
    purified = None
    for number in numbers:
        with way.watched() if number == numbers[0] else contextlib.nullcontext():
            seeds = answer_seeds(indices, number) if model.seed is None else None
            result = model.purify(images, seeds=seeds)
        assert result.logits is not None
        shares.append((result.logits.argmax(dim=-1) == labels[:, None]).float().mean(dim=1))
        predicted.append(vote_logits(result.logits, lift=model.vote == "label").argmax(dim=1))
        if purified is None:
            voter = nearest_voter(images, result.images, result.logits, predicted[0])
            shown = result.images[torch.arange(len(voter), device=voter.device), voter]
            purified = (shown * 255).round().to(torch.uint8).cpu()
        for field in dataclasses.fields(History) if result.history is not None else ():
            values = getattr(result.history, field.name).double().cpu()
            sums[field.name] = sums.get(field.name, 0) + values / len(numbers)
    found = torch.stack(predicted).cpu()
    return Answers(
        found,
        torch.stack(shares).cpu(),
        purified,
        {name: values.float() for name, values in sums.items()},
        torch.cat([way.right, found[:1] == labels.cpu()]) if way.iterations else None,
    )


class _Way:
    """The vote at some iterations of one purification; right: [T - 1, B] bool on the CPU, the end left out."""

    def __init__(self, model: PurifiedClassifier, images: Tensor, labels: Tensor) -> None:
        self.model, self.size, self.labels = model, images.shape[2:], labels.cpu()
        self.iterations = looked_at(model.settings.iterations)[:-1] if model.purifier.optimises_latents else []
        self.right = torch.zeros((len(self.iterations), len(images)), dtype=torch.bool)

    def watched(self) -> contextlib.AbstractContextManager[object]:
        if not self.iterations:
            return contextlib.nullcontext()
        return self.model.register_latent_hook(self._look, iterations=self.iterations)

    def _look(self, state: LatentState) -> None:
        shown = self.model.preprocessing.resized((state.generated.flatten(0, 1) + 1) / 2, self.size)
        logits = self.model.undefended(shown, check=False).unflatten(0, state.latents.shape[:2])
        answer = vote_logits(logits, lift=self.model.vote == "label").argmax(dim=1).cpu()
        rows = state.image_indices
        for number in [n for n, iteration in enumerate(self.iterations) if iteration == state.iteration]:
            self.right[number, rows] = answer == self.labels[rows]
