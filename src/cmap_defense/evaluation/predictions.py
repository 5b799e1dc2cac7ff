"""Predictions with independent noise: the only thing that accuracy is computed from."""

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
from cmap_defense.common.inputs import check_logits
from cmap_defense.common.rng import isolated
from cmap_defense.evaluation.protocol import prediction_seeds
from cmap_defense.results import History


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """A predictions for each of B images, on the CPU. All but the labels are of purified classifiers alone.

    Attributes:
        labels: [A, B] int64, the predicted classes.
        one_latent: [A, B], the share of the K latents that are right by themselves: the accuracy without a vote.
        purified: [B, C, H, W] uint8, of the first prediction the purified image nearest in L1 among those that are
            classified as the vote says (``nearest_voter``).
        loop: by name the terms and moments of ``History``, [iterations, B], means over the
            predictions.
        vote_right: [T, B] bool, whether the vote of the first prediction is right at ``vote_iterations``.
    """

    labels: Tensor
    one_latent: Tensor | None = None
    purified: Tensor | None = None
    loop: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    vote_right: Tensor | None = None


def vote_iterations(iterations: int) -> list[int]:
    """The iterations, of N, at which the vote is taken: about ten, 0 and N among them."""
    if not iterations:
        return [0]
    count = min(iterations, 10)
    return [round(iterations * part / count) for part in range(count + 1)]


def predict(model: Model, images: Tensor, labels: Tensor, indices: Tensor, numbers: Iterable[int]) -> Predictions:
    """Predict images, without gradients."""
    numbers = list(numbers)
    if not numbers:
        return Predictions(torch.zeros((0, len(images)), dtype=torch.int64, device="cpu"))
    with torch.no_grad():
        if isinstance(model, PurifiedClassifier):
            return _predict_purified(model, images, labels, indices, numbers)
        predicted = []
        for number in numbers:
            seeds = prediction_seeds(indices, number)
            given = images.clone()  # a model may change it in place
            if isinstance(model, SeededModel):
                logits = model(given, seeds=None if model.seed is not None else seeds)
            else:
                with isolated(*seeds.tolist()):
                    logits = model(given)
            predicted.append(check_logits(logits, len(images)).argmax(dim=1))
    return Predictions(torch.stack(predicted).cpu())


def _predict_purified(
    model: PurifiedClassifier, images: Tensor, labels: Tensor, indices: Tensor, numbers: Sequence[int]
) -> Predictions:
    predicted, shares, recorder = [], [], _VoteRecorder(model, images, labels)
    sums: dict[str, Tensor] = {}
    purified = None
    for number in numbers:
        with recorder.recording() if number == numbers[0] else contextlib.nullcontext():
            seeds = prediction_seeds(indices, number) if model.seed is None else None
            result = model.purify(images, seeds=seeds)
        assert result.logits is not None
        shares.append((result.logits.argmax(dim=-1) == labels[:, None]).float().mean(dim=1))
        predicted.append(vote_logits(result.logits, lift=model.vote == "label").argmax(dim=1))
        if purified is None:
            voter = nearest_voter(images, result.images, result.logits, predicted[0])
            nearest = result.images[torch.arange(len(voter), device=voter.device), voter]
            purified = (nearest * 255).round().to(torch.uint8).cpu()
        for field in dataclasses.fields(History) if result.history is not None else ():
            values = _held(getattr(result.history, field.name).double().cpu())
            sums[field.name] = sums.get(field.name, 0) + values / len(numbers)
        if number == numbers[0] and result.iterations is not None:
            recorder.end(result.iterations, predicted[0] == labels)
    found = torch.stack(predicted).cpu()
    return Predictions(
        found,
        torch.stack(shares).cpu(),
        purified,
        {name: values.float() for name, values in sums.items()},
        torch.cat([recorder.right, found[:1] == labels.cpu()]) if recorder.iterations else None,
    )


def _held(values: Tensor) -> Tensor:
    """[N, B] of a history, an image's last value in place of NaN after its stop."""
    made = (~values.isnan()).sum(dim=0)
    return values.gather(0, torch.minimum(torch.arange(len(values), device="cpu")[:, None], made - 1))


class _VoteRecorder:
    """The vote at some iterations of one purification; right: [T - 1, B] bool on the CPU, the end left out."""

    def __init__(self, model: PurifiedClassifier, images: Tensor, labels: Tensor) -> None:
        self.model, self.size, self.labels = model, images.shape[2:], labels.cpu()
        self.iterations = vote_iterations(model.settings.iterations)[:-1] if model.purifier.optimises_latents else []
        self.right = torch.zeros((len(self.iterations), len(images)), dtype=torch.bool, device="cpu")

    def recording(self) -> contextlib.AbstractContextManager[object]:
        if not self.iterations:
            return contextlib.nullcontext()
        return self.model.register_step_hook(self._record, steps=self.iterations)

    def _record(self, state: LatentState) -> None:
        shown = self.model.preprocessing.resized((state.generated.flatten(0, 1) + 1) / 2, self.size)
        logits = self.model.undefended(shown, check=False).unflatten(0, state.latents.shape[:2])
        predicted = vote_logits(logits, lift=self.model.vote == "label").argmax(dim=1).cpu()
        rows = state.image_indices
        for number in [n for n, iteration in enumerate(self.iterations) if iteration == state.iteration]:
            self.right[number, rows] = predicted == self.labels[rows]

    def end(self, made: Tensor, right: Tensor) -> None:
        """An image that stopped after ``made`` [B] iterations keeps its last vote, which was right or not."""
        stopped = torch.tensor(self.iterations, device="cpu")[:, None] >= made
        self.right = torch.where(stopped, right.cpu(), self.right)
