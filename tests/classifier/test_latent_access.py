"""The latents in reach: hooks at chosen iterations and in the graph, and the pieces that attacks are made of."""

import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.cmap.optimise import LatentState
from cmap_defense.errors import InputValueError, SettingsError
from cmap_defense.gradients import GradientMode, Implicit, StraightThrough, Unrolled
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
SETTINGS = CMAPSettings(n_latents=3, iterations=6, learning_rate=0.05, l1_smoothing=0.05)
IMAGES = uniform(2, *SHAPE, seed=1, dtype=torch.float64)
DIRECTION = noise(2, *SHAPE, seed=2, dtype=torch.float64)


class Classifier(nn.Module):
    """Linear on squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * noise(5, 3 * 8 * 6, seed=7, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).square() @ self.weight.mT


def wrapped(gradient: GradientMode | None = None, **options: object) -> PurifiedClassifier:
    backbone = ToyBackbone(SHAPE).double().requires_grad_(False)
    chosen = {"settings": SETTINGS, "seed": 3, "gradient": gradient} | options
    return PurifiedClassifier(Classifier(), backbone, **chosen)  # pyright: ignore[reportArgumentType]


# -------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize(
    "gradient", [StraightThrough(), Unrolled(), Unrolled(last=2), Implicit(damping=30.0)], ids=repr
)
@pytest.mark.parametrize("wanted", [False, True])
def test_hook_is_called_at_its_iterations_once_each_whatever_the_gradient(gradient: GradientMode, wanted: bool):
    model, seen, every = wrapped(gradient), [], []
    model.register_step_hook(lambda state: seen.append(state.iteration), steps={0, 4})
    model.register_step_hook(lambda state: every.append(state.iteration))
    logits = model(IMAGES.clone().requires_grad_(wanted))
    if wanted:
        logits.sum().backward()
    assert seen == [0, 4]
    assert every == list(range(6))


def test_states_are_detached_and_say_whose_images_they_are():
    model, states = wrapped(Unrolled()), []
    model.register_step_hook(states.append, steps=range(0, 6, 5))
    model(IMAGES.clone().requires_grad_())
    for state in states:
        assert not state.latents.requires_grad
        assert not state.generated.requires_grad
        assert not state.terms.total.requires_grad
        assert state.image_indices.tolist() == [0, 1]
        assert state.latents.shape == state.generated.shape == (2, 3, *SHAPE)
        assert state.terms.l1.shape == (2, 3)
        assert torch.equal(state.images, IMAGES)


def live_value(model: PurifiedClassifier, images: Tensor) -> Tensor:
    """A number made of intermediate latents, images and terms, as a live hook sees them."""
    parts: list[Tensor] = []

    def look(state: LatentState) -> None:
        parts.append(state.latents.square().sum() + state.generated.sum() + 1e-3 * state.terms.total.sum())

    with model.register_step_hook(look, steps={2, 5}, live=True):
        model(images)
    assert len(parts) == 2
    return torch.stack(parts).sum()


def test_a_live_hook_in_another_gradient_mode_is_an_error_not_a_detached_state() -> None:
    model = wrapped(Unrolled())
    with model.register_step_hook(lambda state: None, live=True):
        other = model.variant(hooks=True, gradient=StraightThrough())
        other(IMAGES)
        with pytest.raises(SettingsError, match="StraightThrough"):
            other(IMAGES.clone().requires_grad_())


@pytest.mark.parametrize("options", [{}, {"max_parallel": 4}])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_live_states_are_part_of_the_graph(options: dict, checkpoint: bool):
    model = wrapped(Unrolled(checkpoint=checkpoint), **options)
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(live_value(model, leaf), leaf)
    ends = [live_value(model, IMAGES + sign * 1e-6 * DIRECTION).item() for sign in (1, -1)]
    assert (gradient * DIRECTION).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_latents_that_a_live_hook_returns_stay_part_of_the_graph():
    def value(images: Tensor) -> Tensor:
        model = wrapped(Unrolled())
        shift = images.mean(dim=(1, 2, 3))[:, None, None, None, None]
        with model.register_step_hook(lambda state: state.latents + shift, steps={3}, live=True):
            return model.purify(images).images.square().sum()

    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    # images that require a gradient everywhere: without one the hook runs on detached states, with the same values
    with torch.no_grad():
        ends = [value(IMAGES + sign * 1e-6 * DIRECTION).item() for sign in (1, -1)]
    assert (gradient * DIRECTION).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_live_hook_without_a_gradient_in_sight_sees_the_same_values():
    seen: list[list[Tensor]] = [[], []]
    for wanted in (False, True):
        model = wrapped(Unrolled())
        model.register_step_hook(lambda state, w=wanted: seen[w].append(state.latents.detach()), live=True)
        model(IMAGES.clone().requires_grad_(wanted))
    assert len(seen[0]) == len(seen[1]) == 6
    for plain, live in zip(*seen, strict=True):
        torch.testing.assert_close(plain, live, rtol=0, atol=0)


def test_hooks_that_make_no_sense_are_refused():
    with pytest.raises(SettingsError, match="Unrolled"):
        wrapped().register_step_hook(print, live=True)
    with pytest.raises(SettingsError, match="steps must be a set"):
        wrapped().register_step_hook(print, steps=3)  # pyright: ignore[reportArgumentType]


def test_hook_is_gone_after_an_exception_inside_its_block():
    model = wrapped(Unrolled())

    def fail(state: LatentState) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), model.register_step_hook(fail, live=True):
        model(IMAGES.clone().requires_grad_())
    model(IMAGES.clone().requires_grad_()).sum().backward()


# ------------------------------------------------------------------------------------------------------------- pieces


def test_parts_make_up_the_forward_pass():
    model = wrapped()
    start = model.initial_latents(IMAGES)
    assert start.shape == (2, 3, *SHAPE)
    assert start.dtype == torch.float64
    result = model.purify(IMAGES, latents=start)
    torch.testing.assert_close(model.purify(IMAGES).latents, result.latents, rtol=0, atol=0)
    torch.testing.assert_close(model.generate(result.latents), result.images)
    torch.testing.assert_close(model.classify_latents(result.latents), result.logits)
    torch.testing.assert_close(model.forward_from_latents(result.latents), model(IMAGES))
    assert result.history is not None
    terms = model.objective(start, IMAGES)
    torch.testing.assert_close(terms.total, result.history.total[0])
    torch.testing.assert_close(terms.l1.mean(1), result.history.l1[0])


def test_initial_latents_belong_to_the_seeds():
    model = wrapped(seed=None)
    assert torch.equal(model.initial_latents(IMAGES, seeds=[5, 6])[1:], model.initial_latents(IMAGES[1:], seeds=[6]))


@pytest.mark.parametrize("options", [{}, {"max_parallel": 2}])
def test_parts_are_differentiable_twice_in_latents_and_once_in_images(options: dict):
    model = wrapped(**options)
    latents = model.initial_latents(IMAGES).requires_grad_()
    images = IMAGES.clone().requires_grad_()
    weights = noise(2, 3, *SHAPE, seed=4, dtype=torch.float64)

    def value(u: Tensor, x: Tensor) -> Tensor:
        return model.objective(u, x).total.sum() + model.forward_from_latents(u)[:, 1].sum()

    to_latents, to_images = torch.autograd.grad(value(latents, images), (latents, images), create_graph=True)
    (second,) = torch.autograd.grad(to_latents, latents, weights)
    h = 1e-6
    with torch.no_grad():
        moved = [value(latents + s * h * weights, images).item() for s in (1, -1)]
        shifted = [value(latents, images + s * h * DIRECTION).item() for s in (1, -1)]
    assert (to_latents * weights).sum().item() == pytest.approx((moved[0] - moved[1]) / (2 * h), rel=1e-5)
    assert (to_images * DIRECTION).sum().item() == pytest.approx((shifted[0] - shifted[1]) / (2 * h), rel=1e-5)
    ends = []
    for s in (1, -1):
        there = (latents + s * h * weights).detach().requires_grad_()
        ends.append(torch.autograd.grad(value(there, images.detach()), there)[0])
    torch.testing.assert_close(second, (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)


def test_parts_of_a_wrapper_that_resizes_and_normalises():
    backbone = ToyBackbone(SHAPE).double().requires_grad_(False)
    seen: list[tuple[int, ...]] = []

    def classifier(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[1:]))
        return images.mean(dim=(2, 3)) - 0.1

    model = PurifiedClassifier(
        classifier, backbone, settings=SETTINGS, resize="bilinear", normalize=(0.5, 0.25), inputs="normalized", seed=0
    )
    large = (uniform(2, 3, 16, 12, seed=8, dtype=torch.float64) - 0.5) / 0.25
    start = model.initial_latents(large)
    result = model.purify(large, latents=start)
    torch.testing.assert_close(model.classify_latents(result.latents, size=(16, 12)), result.logits)
    assert result.history is not None
    torch.testing.assert_close(model.objective(start, large).total, result.history.total[0])
    assert set(seen) == {(3, 16, 12)}


@pytest.mark.parametrize("latents", [torch.zeros(2, 3, 3, 8), torch.zeros(2, 3, 3, 8, 8), "latents"])
def test_latents_of_another_shape_are_refused(latents: object):
    with pytest.raises(InputValueError, match=r"\[B, K, 3, 8, 6\]"):
        wrapped().generate(latents)  # pyright: ignore[reportArgumentType]


def test_latent_attack_takes_ten_lines():
    """Latents of images near the input that the classifier calls something else, written with the pieces alone."""
    model = wrapped(settings=SETTINGS.replace(n_latents=2))
    labels = model(IMAGES).argmax(dim=1)
    latents = model.initial_latents(IMAGES).requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=0.1)
    begun = None
    for _ in range(60):
        logits = model.classify_latents(latents)
        own = logits.gather(2, labels[:, None, None].expand(-1, 2, 1)).squeeze(2)
        other = logits.scatter(2, labels[:, None, None].expand(-1, 2, 1), -torch.inf).amax(dim=2)
        loss = (own - other).sum() + 1e-3 * model.objective(latents, IMAGES).total.sum()
        begun = loss.item() if begun is None else begun
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (model.classify_latents(latents).argmax(dim=2) != labels[:, None]).all()


def test_the_objective_is_that_of_the_loop_under_autocast_too() -> None:
    model, images = wrapped().float(), IMAGES.float()
    start = model.initial_latents(images, seeds=[3, 4])
    with torch.autocast("cpu"):
        ours, loop = model.objective(start, images), model.purify(images, latents=start).history
    assert ours.ssim.dtype == torch.float32
    torch.testing.assert_close(ours.ssim.mean(dim=1), loop.ssim[0], rtol=1e-6, atol=1e-4)
