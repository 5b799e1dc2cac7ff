"""The demonstration's measurement: an undefended classifier attacked, and the same images behind the defence.

The attack is made on the bare classifier: the attacker does not know the defence. It shows how the defence works,
and says little about how robust it is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmap_defense.attacks.pgd import PGD
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.common.modules import evaluating
from cmap_defense.common.statistics import Accuracy
from cmap_defense.results import History, PurificationResult
from cmap_defense.threat import ThreatModel


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """Images and their purified versions, and four accuracies. The dicts have the entries "clean" and "attacked".

    Attributes:
        clean: images [B, C, H, W].
        attacked: the same, attacked.
        labels: [B], the true classes.
        purified_clean: of the clean images.
        purified_attacked: of the attacked images.
        bare_labels: [B], predictions of the bare classifier.
        bare_accuracy: of the bare classifier.
        purified_accuracy: of the vote.
        constrained: history of the clean images' optimisation with eq. 12.
        unconstrained: the same without it, on the same images and seeds (Fig. 6 of the paper).
        seconds: that purification took.
    """

    clean: Tensor
    attacked: Tensor
    labels: Tensor
    purified_clean: PurificationResult
    purified_attacked: PurificationResult
    bare_labels: dict[str, Tensor]
    bare_accuracy: dict[str, Accuracy]
    purified_accuracy: dict[str, Accuracy]
    constrained: History
    unconstrained: History
    seconds: float


def over_margin(result: PurificationResult, labels: Tensor, count: int) -> Tensor:
    """[count] int64, images of a purification to show: evenly over the margin of the vote, the largest first.

    The margin is the lead of the true class over the best other one in shares of the votes, and among equal leads in
    mean probability. So the share of images shown that the vote gets right differs from the accuracy by one image at
    most.

    Args:
        result: with the votes of a classifier.
        labels: int64 [B], the true classes.
        count: at most B.
    """
    assert result.logits is not None
    assert result.votes is not None
    own = labels[:, None]

    def lead(values: Tensor) -> Tensor:
        others = values.scatter(1, own, -torch.inf).amax(dim=1)
        return values.gather(1, own)[:, 0] - others

    keys = (lead(result.logits.double().softmax(dim=-1).mean(dim=1)), lead(result.votes.double()))
    order = torch.arange(len(labels))
    for key in (*keys, result.labels == labels):  # the last one counts most
        order = order[key[order].double().argsort(descending=True, stable=True)]
    return order[((torch.arange(count) + 0.5) * len(order) / count).long()]


def demonstrate(
    classifier: nn.Module,
    defended: PurifiedClassifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    steps: int,
    seed: int,
    shown: int,
    on_step: Callable[[str], None] | None = None,
) -> Demonstration:
    """Attack ``classifier`` with PGD, purify clean and attacked images, classify all four.

    Args:
        classifier: undefended, images in [0, 1] to logits.
        defended: the same classifier behind the defence.
        images: float [B, C, H, W] in [0, 1].
        labels: int64 [B].
        eps: of the linf PGD attack.
        steps: of the same.
        seed: of the attack's start and of the purification's noise.
        shown: how many of the images the comparison without eq. 12 is made on.
        on_step: called with the name of each part as it begins, and once per latent iteration with "".
    """
    say = on_step or (lambda name: None)
    say("attacking the bare classifier")
    attacked = PGD(ThreatModel(norm="linf", eps=eps), steps=steps, seed=seed)(classifier, images, labels).images
    seeds = torch.arange(len(images)) + 1_000_003 * seed
    with torch.no_grad(), evaluating(classifier, defended), defended.register_latent_hook(lambda state: say("")):
        bare = {"clean": classifier(images).argmax(1), "attacked": classifier(attacked).argmax(1)}
        start = time.perf_counter()
        say("purifying the clean images")
        purified_clean = defended.purify(images, seeds=seeds)
        say("purifying the attacked images")
        purified_attacked = defended.purify(attacked, seeds=seeds)
        seconds = time.perf_counter() - start
        say("purifying without the latent constraint")
        loose = PurifiedClassifier(classifier, defended.backbone, settings=defended.settings.replace(latent_weight=0.0))
        with loose.register_latent_hook(lambda state: say("")):
            unconstrained = loose.purify(images[:shown], seeds=seeds[:shown]).history
    assert purified_clean.history is not None
    assert unconstrained is not None
    votes = {"clean": purified_clean.labels, "attacked": purified_attacked.labels}
    return Demonstration(
        clean=images,
        attacked=attacked,
        labels=labels,
        purified_clean=purified_clean,
        purified_attacked=purified_attacked,
        bare_labels=bare,
        bare_accuracy={name: Accuracy.of(predicted, labels) for name, predicted in bare.items()},
        purified_accuracy={name: Accuracy.of(p, labels) for name, p in votes.items() if p is not None},
        constrained=History(
            *(getattr(purified_clean.history, field.name)[:, :shown] for field in dataclasses.fields(History))
        ),
        unconstrained=unconstrained,
        seconds=seconds,
    )
