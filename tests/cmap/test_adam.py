"""adam_step is torch.optim.Adam, as a pure function that gradients flow through."""

import pytest
import torch
from torch import Tensor

from cmap_defense.cmap.adam import AdamState, adam_step
from cmap_defense.cmap.settings import CMAPSettings
from toys import noise, uniform

SHAPE = (2, 3, 2, 4, 3)
SETTINGS = [
    CMAPSettings(),
    CMAPSettings.preset("imagenet100"),
    CMAPSettings(learning_rate=0.3, betas=(0.0, 0.5), eps=1e-3),
    CMAPSettings(betas=(0.5, 0.0)),
    CMAPSettings(schedule="cosine", iterations=12),
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=["cifar10", "imagenet100", "no-first", "no-second", "cosine"])
def test_steps_are_those_of_torch_adam(chosen: CMAPSettings):
    latents = noise(*SHAPE, seed=1, dtype=torch.float64)
    theirs = torch.nn.Parameter(latents.clone())
    optimiser = torch.optim.Adam([theirs], lr=chosen.learning_rate, betas=chosen.betas, eps=chosen.eps)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=12) if chosen.schedule == "cosine" else None
    state = AdamState.start(latents)
    for step in range(12):
        gradient = 10 ** (step % 4 - 2) * noise(*SHAPE, seed=100 + step, dtype=torch.float64)
        theirs.grad = gradient.clone()
        optimiser.step()
        if schedule is not None:
            schedule.step()
        latents, state = adam_step(latents, gradient, state, chosen)
        torch.testing.assert_close(latents, theirs.detach(), rtol=0, atol=1e-12)
    assert state.step == 12


def test_nothing_is_changed_in_place():
    latents, gradient = noise(*SHAPE, seed=2), noise(*SHAPE, seed=3)
    state = AdamState(3, noise(*SHAPE, seed=4), uniform(*SHAPE, seed=5))
    before = [t.clone() for t in (latents, gradient, state.first, state.second)]
    adam_step(latents, gradient, state, CMAPSettings())
    after = (latents, gradient, state.first, state.second)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert state.step == 3


def test_step_is_differentiable_in_latents_gradient_and_state():
    """eps is of the gradients' size here, so that its part in the derivative is seen."""
    chosen = CMAPSettings(eps=0.1)
    shape = (2, 1, 3, 2)

    def step(latents: Tensor, gradient: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved, state = adam_step(latents, gradient, AdamState(2, first, second), chosen)
        return moved, state.first, state.second

    inputs = [noise(*shape, seed=seed, dtype=torch.float64) for seed in (6, 7, 8)]
    inputs.append(0.5 + uniform(*shape, seed=9, dtype=torch.float64))
    assert torch.autograd.gradcheck(step, [t.requires_grad_() for t in inputs])


def test_first_step_is_differentiable_in_the_gradient():
    chosen = CMAPSettings(eps=0.1)
    latents = noise(2, 1, 3, 2, seed=10, dtype=torch.float64)
    gradient = noise(2, 1, 3, 2, seed=11, dtype=torch.float64).requires_grad_()

    def step(gradient: Tensor) -> Tensor:
        return adam_step(latents, gradient, AdamState.start(latents), chosen)[0]

    assert torch.autograd.gradcheck(step, gradient)


def test_derivative_of_the_first_step_where_the_gradient_is_zero():
    """The step is -lr g / (|g| + eps), whose derivative at g = 0 is -lr / eps."""
    chosen = CMAPSettings(learning_rate=0.5, eps=0.25)
    latents = noise(2, 1, 3, 2, seed=12, dtype=torch.float64)
    gradient = torch.zeros_like(latents, requires_grad=True)
    moved, _ = adam_step(latents, gradient, AdamState.start(latents), chosen)
    (derivative,) = torch.autograd.grad(moved.sum(), gradient)
    torch.testing.assert_close(derivative, torch.full_like(derivative, -2.0), rtol=1e-9, atol=0)


def test_elements_with_zero_gradient_stay():
    latents = noise(*SHAPE, seed=13)
    moved, _ = adam_step(latents, torch.zeros_like(latents), AdamState.start(latents), CMAPSettings())
    assert torch.equal(moved, latents)
