"""An attack leaves nothing behind: generators, tensors, weights, modes, hooks are as they were; after a failure too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attack_toys import NAMES, THREATS, Denoiser, Linear, labelled, suite, wrapped
from cmap_defense.attacks import PGD, ThreatModel

EVERY = pytest.mark.parametrize("name", NAMES)


class Dropping(Linear):
    """A classifier that draws from torch's global generator, in every mode, and fails when told to."""

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


def scene() -> tuple[Any, list[Any], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """A wrapper in train mode with one part in eval mode, weights with gradients, a hook; and its arguments."""
    model = wrapped(classifier=Dropping(), backbone=Denoiser()).train()
    model.classifier.frozen.eval()
    for weight in model.parameters():
        weight.grad = torch.full_like(weight, 7.0)
    seen: list[int] = []
    model.register_latent_hook(lambda state: seen.append(state.iteration))
    images, labels = labelled(2)
    return model, seen, (images.requires_grad_(), labels, (labels + 1) % 4, torch.tensor([4, 9]))


@EVERY
def test_nothing_is_left_after_a_normal_run(name: str):
    model, _, arguments = scene()
    images, labels, targets, indices = arguments
    aim = None if name == "ConsistencyDisruption released" else targets  # it takes none
    before, hooks = state_of(model, *arguments), list(model._latent_hooks)
    kept = images.detach().clone()
    result = suite(THREATS["linf"])[name](model, images, labels, targets=aim, indices=indices, reevaluations=2)
    assert all(same(before, state_of(model, *arguments)))
    assert images.grad is None
    assert list(model._latent_hooks) == hooks
    for tensor in (result.images, result.candidates, result.success, *result.history.values()):
        assert not tensor.requires_grad
    result.images.fill_(0.5)
    result.candidates.fill_(0.5)
    assert torch.equal(images.detach(), kept)


@EVERY
@pytest.mark.parametrize("call", [1, 2])
def test_nothing_is_left_after_a_failure(name: str, call: int):
    model, seen, arguments = scene()
    images, labels, targets, indices = arguments
    aim = None if name == "ConsistencyDisruption released" else targets  # it takes none
    before, hooks = state_of(model, *arguments), list(model._latent_hooks)
    model.classifier.fails_at = call
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        suite(THREATS["l2"])[name](model, images, labels, targets=aim, indices=indices)
    assert all(same(before, state_of(model, *arguments)))
    assert images.grad is None
    assert list(model._latent_hooks) == hooks
    assert torch.is_grad_enabled()
    seen.clear()
    model.classifier.fails_at = None
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        model.eval()(images)
    assert seen == [0, 1, 2]


@EVERY
def test_a_model_that_draws_from_the_global_generator_gives_the_same_again(name: str):
    model, _, (images, labels, _, _) = scene()
    first = suite(THREATS["linf"])[name](model, images, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        torch.rand(5)
        again = suite(THREATS["linf"])[name](model, images, labels)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.predictions, again.predictions)


@EVERY
def test_it_works_under_no_grad_and_gives_the_same(name: str):
    model, (images, labels) = wrapped(), labelled(2)
    attack = suite(THREATS["linf"])[name]
    expected = attack(model, images, labels)
    with torch.no_grad():
        result = attack(model, images, labels)
        assert not torch.is_grad_enabled()
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.predictions, expected.predictions)


@EVERY
def test_images_made_in_inference_mode(name: str):
    images, labels = labelled(2)
    expected = suite(THREATS["linf"])[name](wrapped(), images, labels)
    with torch.inference_mode():
        made = images + 0
    assert torch.equal(suite(THREATS["linf"])[name](wrapped(), made, labels).images, expected.images)


@EVERY
def test_it_works_under_inference_mode(name: str):
    model, (images, labels) = wrapped(), labelled(2)
    expected = suite(THREATS["linf"])[name](model, images, labels)
    with torch.inference_mode():
        result = suite(THREATS["linf"])[name](model, images, labels)
    assert torch.equal(result.images, expected.images)


def test_results_share_no_memory_with_the_callers_images():
    images, labels = labelled()
    kept = images.clone()
    result = PGD(ThreatModel(eps=0.0), steps=1)(Linear(), images, labels)
    result.images.zero_()
    result.candidates.zero_()
    assert torch.equal(images, kept)


def test_results_share_no_memory_with_the_callers_labels():
    images, labels = labelled()
    result = PGD(ThreatModel(eps=1.0), steps=3)(Linear(), images, labels)
    before = result.any_success.clone()
    labels.copy_(result.predictions[0])
    assert torch.equal(result.any_success, before)
