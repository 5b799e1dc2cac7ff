"""An attack leaves no traces: generators, tensors, weights, modes and hooks stay as they were, after a failure too."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attack_toys import EVERY, THREATS, Denoiser, Linear, labelled, suite, wrapped


class Dropping(Linear):
    """A classifier that draws from torch's global generator, in every mode, and fails in its call ``fails_at``."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.frozen = nn.Dropout(0.3), nn.Dropout(0.3)
        self.fails_at: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self.calls + 1 == self.fails_at:
            raise ZeroDivisionError("on purpose")
        drawn = nn.functional.dropout(images, 0.3, training=True)
        return super().forward(self.frozen(self.dropout(drawn)))


def state_of(*watched: Any) -> list[Any]:
    """Everything that an attack could have changed, copied."""
    state: list[Any] = [torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()]  # noqa: NPY002
    for thing in watched:
        if isinstance(thing, Tensor):
            state += [thing.clone(), thing.requires_grad, thing._version]
        else:
            for module in thing.modules():
                state.append((module.training, len(module._forward_hooks)))
            for weight in (*thing.parameters(), *thing.buffers()):
                state += [weight.detach().clone(), weight.grad.clone(), weight.requires_grad, weight._version]
    return state


def same(before: list[Any], after: list[Any]) -> Iterator[bool]:
    for first, second in zip(before, after, strict=True):
        if isinstance(first, Tensor):
            yield torch.equal(first, second)
        elif isinstance(first, np.ndarray):
            yield bool((first == second).all())
        else:
            yield first == second


@EVERY
@pytest.mark.parametrize("fails_at", [None, 1, 2])
def test_nothing_is_left_after_a_run_or_a_failure(name: str, fails_at: int | None):
    """Of a wrapper in train mode with one part in eval mode, weights with gradients, and a hook."""
    model: Any = wrapped(classifier=Dropping(), backbone=Denoiser()).train()
    model.classifier.frozen.eval()
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 7.0)
    seen: list[int] = []
    model.register_step_hook(lambda state: seen.append(state.iteration))
    images, labels = labelled(2)
    targets, indices = (labels + 1) % 4, torch.tensor([4, 9])
    arguments = (images.requires_grad_(), labels, targets, indices)
    aim = None if name == "ConsistencyDisruption released" else targets  # it takes none
    attack = suite(THREATS["linf"])[name]
    before, hooks, kept = state_of(model, *arguments), list(model._step_hooks), images.detach().clone()
    model.classifier.fails_at = fails_at
    if fails_at:
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            attack(model, images, labels, targets=aim, indices=indices)
    else:
        result = attack(model, images, labels, targets=aim, indices=indices)
    assert all(same(before, state_of(model, *arguments)))
    assert images.grad is None
    assert list(model._step_hooks) == hooks
    assert torch.is_grad_enabled()
    if fails_at:
        seen.clear()
        model.classifier.fails_at = None
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(images)
        assert seen == [0, 1, 2]
        return
    for tensor in (result.images, result.candidates, result.success, *result.history.values()):
        assert not tensor.requires_grad
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        torch.rand(5)
        again = attack(model, images, labels, targets=aim, indices=indices)
    assert torch.equal(result.images, again.images), "the model's own draws are those of the attack's seed"
    assert torch.equal(result.predictions, again.predictions)
    result.images.fill_(0.5)
    result.candidates.fill_(0.5)
    assert torch.equal(images.detach(), kept)


@EVERY
def test_the_callers_grad_and_inference_modes_make_no_difference(name: str):
    model, (images, labels) = wrapped(), labelled(2)
    attack = suite(THREATS["linf"])[name]
    expected = attack(model, images, labels)
    with torch.inference_mode():
        made = images + 0
        results = [attack(model, images, labels)]
    with torch.no_grad():
        results.append(attack(model, images, labels))
        assert not torch.is_grad_enabled()
    results.append(attack(model, made, labels))
    for result in results:
        assert torch.equal(result.images, expected.images)
        assert torch.equal(result.predictions, expected.predictions)
