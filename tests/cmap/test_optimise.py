"""The latent loop: where it arrives, what a callback sees, and what it refuses."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmap_defense.cmap.losses import latent_moments, latent_term, perceptual_terms
from cmap_defense.cmap.objective import LatentObjective, objective_terms
from cmap_defense.cmap.optimise import LatentState, optimise_latents
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.cmap.ssim import SSIMReference
from cmap_defense.errors import BackboneError, InputValueError
from toys import LinearBackbone, ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
SHORT = CMAPSettings(n_latents=4, iterations=5)


def case(batch: int = 3, n_latents: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and latents [B, K, C, H, W]."""
    return uniform(batch, *SHAPE, seed=1, dtype=dtype), noise(batch, n_latents, *SHAPE, seed=2, dtype=dtype)


# -------------------------------------------------------------------------------------------------- where it arrives


def images_of(backbone: LinearBackbone, targets: Tensor) -> Tensor:
    """The images in [0, 1] whose exact latents are ``targets``."""
    return ((backbone.generate(targets) + 1) / 2).detach()


def test_without_latent_term_the_optimum_is_the_image_itself():
    """Every |a u + b - x'| has its kink at the exact latent; Adam with a fixed rate stays within a few rates of it."""
    backbone = LinearBackbone(SHAPE).double()
    targets = 3 * uniform(2, *SHAPE, seed=3, dtype=torch.float64) - 1.5
    latents = noise(2, 3, *SHAPE, seed=4, dtype=torch.float64)
    chosen = CMAPSettings(iterations=500, learning_rate=0.02, ssim_weight=0, latent_weight=0)
    found, history = optimise_latents(backbone.generate, images_of(backbone, targets), latents, chosen)
    assert (latents - targets[:, None]).abs().max().item() > 2
    assert (found - targets[:, None]).abs().max().item() < 5 * chosen.learning_rate
    assert (history.l1[-1] < 0.02 * history.l1[0]).all()


def test_with_the_ssim_term_the_image_is_still_the_optimum():
    """S is at most C H W, and reaches it at the image itself."""
    backbone = LinearBackbone(SHAPE).double()
    targets = 3 * uniform(2, *SHAPE, seed=3, dtype=torch.float64) - 1.5
    images = images_of(backbone, targets)
    chosen = CMAPSettings(iterations=500, learning_rate=0.02, ssim_weight=3.0, latent_weight=0)
    start = noise(2, 3, *SHAPE, seed=4, dtype=torch.float64)
    found, history = optimise_latents(backbone.generate, images, start, chosen)
    missing = 3 * 8 * 6 - history.ssim
    assert (missing >= -1e-9).all()
    assert (missing[-1] < 0.01 * missing[0]).all()
    assert (found - targets[:, None]).abs().max().item() < 5 * chosen.learning_rate


def test_two_latents_reach_the_exact_minimiser_with_the_latent_term():
    """K = 2, ssim_weight 0, and per element G(u) = a u + b with exact latent t, so that with u = m +- d, s = sqrt(2) d

        2 L = 2 a max(d, |m - t|) + 2 w (m^2 + (s - 1)^2),

    which is convex in (m, d) for d > 0. Its minimum, by setting the derivatives to zero:

    - t within +- d: m = 0 and s = 1 - a / (2 sqrt(2) w);
    - |t| well above d: m = sign(t) a / (2 w) and s = 1.

    The minimum is smooth in both cases, so that the loop gets there to 1e-6. eps is large to make Adam a plain
    gradient step near the end.
    """
    weight = 0.5
    backbone = LinearBackbone(SHAPE).double()
    sign = torch.where(uniform(2, *SHAPE, seed=5) < 0.5, -1.0, 1.0).double()
    near = uniform(2, *SHAPE, seed=6) < 0.5
    size = torch.where(near, 0.3 * uniform(2, *SHAPE, seed=7), 2 + 2 * uniform(2, *SHAPE, seed=8)).double()
    targets = sign * size
    chosen = CMAPSettings(n_latents=2, iterations=600, eps=0.1, ssim_weight=0, latent_weight=weight)
    start = noise(2, 2, *SHAPE, seed=9, dtype=torch.float64)
    found, history = optimise_latents(backbone.generate, images_of(backbone, targets), start, chosen)

    slope = backbone.slope.detach().expand_as(targets)
    best_mean = torch.where(near, 0.0, sign * slope / (2 * weight))
    best_std = torch.where(near, 1 - slope / (8**0.5 * weight), 1.0)
    mean, std = latent_moments(found)
    torch.testing.assert_close(mean, best_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(std, best_std, rtol=0, atol=1e-6)

    spread = best_std / 2**0.5
    l1 = slope * torch.maximum(spread, (best_mean - targets).abs())
    best = l1 + weight * (best_mean**2 + (best_std - 1) ** 2)
    torch.testing.assert_close(history.total[-1], best.flatten(1).sum(dim=1), rtol=1e-9, atol=1e-9)


def test_latent_term_alone_gives_latents_the_moments_of_the_prior():
    """The generator is constant in the latents (slope 0): what remains is L_d, whose minimum is 0."""
    backbone = LinearBackbone(SHAPE).double()
    backbone.slope.data.zero_()
    images, latents = case(2, 5, torch.float64)
    chosen = CMAPSettings(iterations=1500, eps=0.1, ssim_weight=0, latent_weight=1.0)
    found, _ = optimise_latents(backbone.generate, images, 3 * latents + 1, chosen)
    mean, std = latent_moments(found)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
    torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-6)


def test_objective_falls_with_a_curved_generator():
    images, latents = case()
    _, history = optimise_latents(ToyBackbone(SHAPE).generate, images, latents, CMAPSettings(iterations=40))
    assert (history.total[-1] < history.total[0]).all()


# ------------------------------------------------------------------------------- chunks, batches, precision, modes


@pytest.mark.parametrize("max_parallel", [1, 2, 5, 11, 12, 100])
def test_chunks_change_nothing_but_rounding(max_parallel: int):
    images, latents = case()
    generate = ToyBackbone(SHAPE).generate
    one_step = SHORT.replace(iterations=1)
    whole, whole_history = optimise_latents(generate, images, latents, one_step)
    parts, parts_history = optimise_latents(generate, images, latents, one_step, max_parallel=max_parallel)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts_history.total, whole_history.total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_parallel", [1, 5, 12])
def test_generate_never_sees_more_latents_than_allowed(max_parallel: int):
    images, latents = case()
    backbone, sizes = ToyBackbone(SHAPE), []

    def generate(u: Tensor) -> Tensor:
        sizes.append(len(u))
        return backbone.generate(u)

    optimise_latents(generate, images, latents, SHORT.replace(iterations=1), max_parallel=max_parallel)
    assert max(sizes) <= max_parallel
    assert sum(sizes) == latents.shape[0] * latents.shape[1]


def test_images_of_a_batch_are_optimised_as_if_each_were_alone():
    images, latents = case(dtype=torch.float64)
    generate = ToyBackbone(SHAPE).double().generate
    together, history = optimise_latents(generate, images, latents, SHORT)
    for b in range(len(images)):
        alone, own_history = optimise_latents(generate, images[b : b + 1], latents[b : b + 1], SHORT)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(history.total[:, b : b + 1], own_history.total, rtol=1e-9, atol=1e-9)


def test_inputs_are_not_changed_and_no_gradient_is_left_behind():
    images, latents = (tensor.requires_grad_() for tensor in case())
    before = images.detach().clone(), latents.detach().clone()
    backbone = ToyBackbone(SHAPE)
    found, history = optimise_latents(backbone.generate, images, latents, SHORT)
    assert torch.equal(images, before[0])
    assert torch.equal(latents, before[1])
    assert all(t.grad is None for t in (images, latents, *backbone.parameters()))
    assert not found.requires_grad
    assert not any(getattr(history, field.name).requires_grad for field in dataclasses.fields(history))


def test_result_is_the_same_without_grad_mode():
    images, latents = case()
    generate = ToyBackbone(SHAPE).generate
    expected, _ = optimise_latents(generate, images, latents, SHORT)
    with torch.no_grad():
        found, _ = optimise_latents(generate, images, latents, SHORT)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_and_history_keep_the_precision_of_the_latents(dtype: torch.dtype):
    images, latents = case(dtype=dtype)
    backbone = ToyBackbone(SHAPE).bfloat16()
    found, history = optimise_latents(lambda u: backbone.generate(u.bfloat16()), images.float(), latents, SHORT)
    assert found.dtype == dtype
    assert all(getattr(history, field.name).dtype == dtype for field in dataclasses.fields(history))


def test_history_holds_the_terms_and_moments_before_every_step():
    images, latents = case(dtype=torch.float64)
    states: list[LatentState] = []
    _, history = optimise_latents(ToyBackbone(SHAPE).double().generate, images, latents, SHORT, callback=states.append)
    for n, state in enumerate(states):
        elements = state.latents.flatten(1)
        expected = {
            "l1": state.terms.l1.mean(dim=1),
            "ssim": state.terms.ssim.mean(dim=1),
            "latent": state.terms.latent,
            "total": state.terms.total,
            "latent_mean": elements.mean(dim=1),
            "latent_std": elements.std(dim=1),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(history, name)[n], value, rtol=1e-12, atol=1e-12, msg=name)


def test_the_images_of_latents_in_chunks_are_generate_without_a_graph():
    targets, latents = case(2, 3)
    backbone = ToyBackbone(SHAPE)
    expected = backbone.generate(latents.flatten(0, 1)).view_as(latents).detach()
    for max_parallel in (None, 1, 4, 6):
        objective = LatentObjective(backbone.generate, targets, 3, CMAPSettings(), max_parallel=max_parallel)
        images = objective.images_of(latents)
        assert not images.requires_grad
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- callback


@pytest.mark.parametrize("max_parallel", [None, 5])
def test_callback_sees_latents_images_and_terms_that_belong_together(max_parallel: int | None):
    images, latents = case(dtype=torch.float64)
    backbone = ToyBackbone(SHAPE).double()
    states: list[LatentState] = []
    optimise_latents(backbone.generate, images, latents, SHORT, callback=states.append, max_parallel=max_parallel)
    owners = torch.arange(len(images)).repeat_interleave(latents.shape[1])
    assert [state.iteration for state in states] == list(range(SHORT.iterations))
    assert torch.equal(states[0].latents, latents)
    for state in states:
        flat = state.latents.flatten(0, 1)
        torch.testing.assert_close(
            state.generated.flatten(0, 1), backbone.generate(flat).detach(), rtol=1e-12, atol=1e-12
        )
        l1, ssim = perceptual_terms(state.generated.flatten(0, 1), SSIMReference.of(images).take(owners))
        torch.testing.assert_close(state.terms.l1.flatten(), l1, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.terms.ssim.flatten(), ssim, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state.terms.latent, latent_term(state.latents), rtol=1e-12, atol=1e-12)
        assert torch.equal(state.images, images)
        assert state.image_indices.tolist() == list(range(len(images)))
        leaf = state.latents.clone().requires_grad_()
        terms = objective_terms(leaf, backbone.generate(leaf.flatten(0, 1)).view_as(leaf), images, SHORT)
        (gradient,) = torch.autograd.grad(leaf.shape[1] * terms.total.sum(), leaf)
        torch.testing.assert_close(state.gradient, gradient, rtol=1e-9, atol=1e-12)


def test_callback_sees_no_graph():
    images, latents = case()
    states: list[LatentState] = []
    optimise_latents(
        ToyBackbone(SHAPE).generate, images.requires_grad_(), latents.requires_grad_(), SHORT, callback=states.append
    )
    for state in states:
        terms = state.terms
        tensors = (state.latents, state.generated, state.images, terms.l1, terms.ssim, terms.latent, terms.total)
        assert not any(t.requires_grad for t in tensors)


def test_watching_changes_nothing():
    images, latents = case()
    generate = ToyBackbone(SHAPE).generate
    alone, _ = optimise_latents(generate, images, latents, SHORT)
    watched, _ = optimise_latents(generate, images, latents, SHORT, callback=lambda state: None)
    assert torch.equal(alone, watched)


def test_latents_returned_before_the_first_step_are_a_new_start():
    images, latents = case()
    other = noise(*latents.shape, seed=77)
    generate = ToyBackbone(SHAPE).generate
    expected, expected_history = optimise_latents(generate, images, other, SHORT)
    found, history = optimise_latents(
        generate, images, latents, SHORT, callback=lambda state: other if state.iteration == 0 else None
    )
    assert torch.equal(found, expected)
    assert torch.equal(history.total, expected_history.total)


def test_latents_returned_later_take_the_place_of_the_state():
    images, latents = case()
    other = noise(*latents.shape, seed=77)
    states: list[LatentState] = []

    def callback(state: LatentState) -> Tensor | None:
        states.append(state)
        return other if state.iteration == 2 else None

    _, history = optimise_latents(ToyBackbone(SHAPE).generate, images, latents, SHORT, callback=callback)
    moved = (states[3].latents - other).abs().max().item()
    assert 0 < moved < 10 * SHORT.learning_rate
    torch.testing.assert_close(history.latent[2], latent_term(other))
    assert not torch.allclose(history.latent[2], states[2].terms.latent)


def test_an_exception_in_a_callback_comes_out():
    images, latents = case()

    def callback(state: LatentState) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimise_latents(ToyBackbone(SHAPE).generate, images, latents, SHORT, callback=callback)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("image_shape", "latent_shape"),
    [
        ((3, *SHAPE), (2, 4, *SHAPE)),
        ((2, *SHAPE), (2, *SHAPE)),
        ((2, *SHAPE), (2, 4, 1, *SHAPE)),
        ((2, *SHAPE), (2, 4, 3, 6, 8)),
        ((2, *SHAPE), (2, 4, 1, 8, 6)),
        (SHAPE, (2, 4, *SHAPE)),
        ((2, 3, 8), (2, 4, 3, 8)),
    ],
)
def test_latents_that_do_not_fit_the_images_are_refused(image_shape: tuple[int, ...], latent_shape: tuple[int, ...]):
    with pytest.raises(InputValueError, match=r"\[B, K, C, H, W\]"):
        optimise_latents(ToyBackbone(SHAPE).generate, torch.zeros(image_shape), torch.zeros(latent_shape), SHORT)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda images: images[:, :1],
        lambda images: images[..., :-1],
        lambda images: images[:-1],
        lambda images: images.mT,
        lambda images: images.flatten(1),
        lambda images: None,
        lambda images: (images,),
    ],
    ids=["channels", "width", "batch", "transposed", "rank", "none", "tuple"],
)
def test_generate_that_returns_another_shape_is_refused(wrong: Callable):
    images, latents = case()
    backbone = ToyBackbone(SHAPE)
    with pytest.raises(BackboneError, match="shaped"):
        optimise_latents(lambda u: wrong(backbone.generate(u)), images, latents, SHORT)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda generate: lambda u: generate(u).detach(), "detach"),
        (lambda generate: lambda u: generate(u.detach()), "detach"),
        (torch.no_grad(), "no_grad"),
    ],
    ids=["images", "latents", "no_grad"],
)
def test_generate_without_a_gradient_in_the_latents_is_refused(spoil: Callable, word: str):
    """Also where its weights have one."""
    images, latents = case()
    backbone = ToyBackbone(SHAPE)
    assert all(p.requires_grad for p in backbone.parameters())
    with pytest.raises(BackboneError, match=word):
        optimise_latents(spoil(backbone.generate), images, latents, SHORT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_generate_that_returns_values_that_are_not_finite_is_refused(bad: float):
    images, latents = case()
    backbone = ToyBackbone(SHAPE)

    def generate(u: Tensor) -> Tensor:
        spoilt = torch.zeros_like(u)
        spoilt[0, 0, 0, 0] = bad
        return backbone.generate(u) + spoilt

    with pytest.raises(BackboneError, match="NaN or infinite"):
        optimise_latents(generate, images, latents, SHORT)


def test_gradients_that_are_not_finite_are_refused():
    """The images are finite, the derivative of the square root at 0 is not."""
    images, latents = case()
    with pytest.raises(BackboneError, match="NaN or infinite"):
        optimise_latents(lambda u: (0 * u).sqrt(), images, latents, SHORT)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 4, 3, 8, 5), torch.zeros(3, 3, 8, 6), "latents", 0])
def test_callback_that_returns_something_else_is_refused(wrong: object):
    images, latents = case()
    with pytest.raises(InputValueError, match="callback"):
        optimise_latents(ToyBackbone(SHAPE).generate, images, latents, SHORT, callback=lambda state: wrong)
