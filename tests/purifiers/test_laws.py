"""What holds for every purifier: shapes, noise, chunks, cost, settings, and an exact gradient."""

import copy
import dataclasses
import functools
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import denoisers
from cmap_defense import CMAPSettings, PurifiedClassifier, errors
from cmap_defense.backbones.karras import EDMDenoiser
from cmap_defense.common.describe import describe
from cmap_defense.gradients import Detached, Implicit, StraightThrough, Surrogate, Unrolled
from cmap_defense.purifiers import (
    ADP,
    CMAP,
    GDMP,
    GNSP,
    Chain,
    DiffPure,
    Identity,
    LikelihoodMaximisation,
    MultiStepPurifier,
    OneStep,
    Purifier,
    StepState,
    by_name,
    from_texts,
)
from cmap_defense.purifiers.names import NAMES, purifier_from_dict, words_of
from denoisers import DOUBLE, SHAPE, Classifier, CurvedDenoiser, backbone_for, images_of, model_of
from toys import ToyBackbone, noise, uniform

EVERY = pytest.mark.parametrize("purifier", denoisers.ALL.values(), ids=denoisers.ALL)
NOISING = pytest.mark.parametrize("purifier", denoisers.SINGLE.values(), ids=denoisers.SINGLE)
SEEDS = torch.tensor([7, -8, 9])


def purified(purifier: Purifier, images: Tensor, seeds: Tensor, **options: Any) -> Any:
    with torch.no_grad():
        return purifier(backbone_for(purifier), images, seeds=seeds, **options)


@EVERY
def test_there_are_k_versions_within_bounds_and_no_trace_is_left(purifier: Purifier) -> None:
    images, state = images_of(3), torch.get_rng_state()
    before = images.clone()
    result = purified(purifier, images, SEEDS)
    assert result.images.shape == result.latents.shape == (3, purifier.n_latents, *SHAPE)
    assert result.images.dtype == DOUBLE
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert torch.equal(result.seeds, SEEDS)
    assert result.history is None or purifier.n_latents == 2
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not result.images.requires_grad


@EVERY
@pytest.mark.parametrize("max_parallel", [None, 1, 3])
def test_the_result_depends_on_seed_and_image_alone(purifier: Purifier, max_parallel: int | None) -> None:
    images = images_of(3)
    whole = purified(purifier, images, SEEDS)
    alone = purified(purifier, images[1:2], SEEDS[1:2], max_parallel=max_parallel)
    torch.testing.assert_close(alone.images[0], whole.images[1], rtol=0, atol=1e-12)
    assert torch.equal(purified(purifier, images, SEEDS).images, whole.images)
    if not isinstance(purifier, Identity):
        assert not torch.allclose(purified(purifier, images, SEEDS + 1).images, whole.images)
    if purifier.n_latents > 1:
        assert not torch.allclose(whole.images[:, 0], whole.images[:, 1])


@NOISING
def test_the_first_versions_are_the_same_for_every_larger_number(purifier: MultiStepPurifier) -> None:
    few, many = (purified(purifier.replace(n_latents=k), images_of(3), SEEDS).images for k in (2, 5))
    torch.testing.assert_close(many[:, :2], few, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [1, 2])
def test_the_first_versions_of_a_chain_are_the_same_for_every_larger_number(first: int) -> None:
    few, many = (
        purified(Chain(OneStep(n_latents=k), OneStep(level=0.2, n_latents=2)), images_of(), SEEDS[:2]).images
        for k in (first, 3)
    )
    torch.testing.assert_close(many[:, : 2 * first], few, rtol=0, atol=1e-12)


@EVERY
@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "device"])
def test_inference_mode_and_a_default_device_change_nothing(purifier: Purifier, around: Any) -> None:
    images, backbone = images_of(3), backbone_for(purifier)
    expected = purified(purifier, images, SEEDS).images
    with around():
        found = purifier(backbone, images, seeds=SEEDS).images
    assert torch.equal(found, expected)
    assert not found.is_inference()


@EVERY
def test_float32_and_weights_of_another_precision(purifier: Purifier) -> None:
    images = images_of(dtype=torch.float32)
    exact = purified(purifier, images.double(), SEEDS[:2]).images
    found = purified(purifier, images, SEEDS[:2]).images
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 2e-3
    assert purified(purifier, images.bfloat16(), SEEDS[:2]).images.dtype == torch.float32


@NOISING
def test_as_many_passes_as_were_announced(purifier: MultiStepPurifier) -> None:
    backbone = CurvedDenoiser()
    result = purifier(backbone, images_of(3), seeds=SEEDS, max_parallel=100)
    assert purifier.passes == purifier.n_latents * purifier.steps
    if result.passes is None:
        assert backbone.passes == 3 * purifier.passes
    else:
        assert backbone.passes == result.passes.sum()
        assert (result.passes <= purifier.passes).all()


def test_passes_of_a_chain() -> None:
    first, second = DiffPure(t=4, n_latents=2), OneStep(n_latents=3)
    assert Chain(first, second).passes == 2 * 4 + 2 * 3
    assert Chain(first, second, handed_on="mean").passes == 2 * 4 + 3
    assert (Chain(first, second).n_latents, Chain(first, second, handed_on="mean").n_latents) == (6, 3)
    backbone = CurvedDenoiser()
    counted = Chain(first, ADP(iterations=3, n_latents=2))
    result = counted(backbone, images_of(), seeds=SEEDS[:2], max_parallel=100)
    assert result.passes is not None
    assert backbone.passes == result.passes.sum()


@NOISING
def test_the_callback_sees_every_pass(purifier: MultiStepPurifier) -> None:
    states: list[StepState] = []
    purified(purifier, images_of(), SEEDS[:2], callback=states.append)
    assert [state.step for state in states] == sorted({state.step for state in states})
    assert {state.steps for state in states} == {purifier.steps}
    assert all(state.images.shape == (2, 2, *SHAPE) for state in states)
    assert max(state.level for state in states) == pytest.approx(purifier.level)
    if not isinstance(purifier, ADP):
        assert len(states) == purifier.steps


@NOISING
def test_noise_may_be_given(purifier: MultiStepPurifier) -> None:
    given = noise(2, 3, *SHAPE, seed=4, dtype=DOUBLE)
    result = purified(purifier, images_of(), SEEDS[:2], latents=given)
    assert torch.equal(result.latents, given)
    assert result.images.shape == given.shape
    assert result.seeds is None
    assert not torch.allclose(result.images[:, :2], purified(purifier, images_of(), SEEDS[:2]).images)


NOTHING: dict[str, Any] = {
    "one-step": OneStep(level=0, n_latents=2),
    "sde": DiffPure(t=0, n_latents=2),
    "ddpm": DiffPure(t=0, solver="ddpm"),
    "gdmp": GDMP(t=0),
    "gdmp no rounds": GDMP(rounds=0),
    "adp": ADP(iterations=0),
    "gnsp": GNSP(rounds=()),
    "likelihood": LikelihoodMaximisation(iterations=0),
    "identity": Identity(),
    "chain": Chain(Identity(), OneStep(level=0)),
}


@pytest.mark.parametrize("purifier", NOTHING.values(), ids=NOTHING)
def test_level_zero_gives_the_input_back(purifier: Purifier) -> None:
    images = images_of(dtype=torch.float32)
    backbone = CurvedDenoiser()
    result = purifier(backbone, images, seeds=SEEDS[:2])
    assert torch.equal(result.images, images[:, None].expand(-1, purifier.n_latents, -1, -1, -1))
    assert purifier.passes == backbone.passes == 0


# --- gradients --------------------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return (model(images) * noise(2, 4, seed=11, dtype=DOUBLE)).sum()


def gradient_of(model: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    return torch.autograd.grad(loss_of(model, leaf), leaf)[0]


def slopes(model: nn.Module, images: Tensor, size: float = 1e-6) -> list[tuple[float, float]]:
    """Along a direction for each of the two images: by the gradient, and by central differences."""
    torch.manual_seed(0)
    gradient, found = gradient_of(model, images), []
    for row in range(len(images)):
        direction = torch.zeros_like(images)
        direction[row] = noise(*images.shape[1:], seed=20 + row, dtype=DOUBLE)
        ends = []
        for sign in (1, -1):
            torch.manual_seed(0)  # of a classifier in training mode
            with torch.no_grad():
                ends.append(loss_of(model, images + sign * size * direction).item())
        found.append(((gradient * direction).sum().item(), (ends[0] - ends[1]) / (2 * size)))
    return found


class Dropping(Classifier):
    """A classifier with dropout, whose mode therefore matters."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images, 0.3, self.training))


@EVERY
@pytest.mark.filterwarnings("ignore:The classifier is in training mode")
@pytest.mark.parametrize("options", [{}, {"max_parallel": 3}, {"train": True}], ids=str)
def test_the_unrolled_gradient_is_that_of_finite_differences(purifier: Purifier, options: dict[str, Any]) -> None:
    chosen = dict(options)
    train = chosen.pop("train", False)
    model = model_of(purifier, gradient=Unrolled(), classifier=Dropping(), **chosen).train(train)
    if train:
        assert loss_of(model, images_of()) != loss_of(model, images_of())
    for exact, difference in slopes(model, images_of()):
        assert exact == pytest.approx(difference, rel=1e-4)
        assert exact != 0


@EVERY
def test_with_and_without_recomputation_and_chunks_the_gradient_is_the_same(purifier: Purifier) -> None:
    whole = gradient_of(model_of(purifier, gradient=Unrolled(checkpoint=False)), images_of())
    for options in ({}, {"max_parallel": 1}, {"max_parallel": 3}):
        again = gradient_of(model_of(purifier, gradient=Unrolled(), **options), images_of())
        torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-12)
    alone = model_of(purifier, gradient=Unrolled())
    leaf = images_of()[:1].requires_grad_()
    (one,) = torch.autograd.grad((alone(leaf) * noise(2, 4, seed=11, dtype=DOUBLE)[:1]).sum(), leaf)
    torch.testing.assert_close(one, whole[:1], rtol=1e-9, atol=1e-12)


class Level(nn.Module):
    """A network of the image and the level."""

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return torch.tanh(1.5 * x + 0.2 * x.flip(-1).sin() + level[:, None, None, None])


@pytest.mark.parametrize("options", [{}, {"max_parallel": 1}, {"gradient": Unrolled(checkpoint=False)}], ids=str)
def test_adaptive_levels_are_differentiated_through_a_network_that_takes_them(options: dict[str, Any]) -> None:
    """ADP's noise levels depend on the image."""
    purifier = ADP(iterations=4, n_latents=2)
    model = model_of(purifier, EDMDenoiser(Level(), SHAPE), **({"gradient": Unrolled()} | options))
    passes = model.purify(images_of()).passes
    assert passes is not None
    assert (passes > 2 * 2).all(), "a version that stops at once has no adaptive level"
    for exact, difference in slopes(model, images_of()):
        assert exact == pytest.approx(difference, rel=1e-4)


MEANS, STDS = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.mark.parametrize("name", ["one-step", "diffpure-sde", "adp"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
def test_the_gradient_through_resizing_and_normalisation(name: str, mode: str) -> None:
    mean, std = (torch.tensor(values, dtype=DOUBLE)[:, None, None] for values in (MEANS, STDS))
    unit, other = (
        model_of(
            denoisers.SINGLE[name],
            classifier=Classifier((3, 11, 9)),
            gradient=Unrolled(),
            resize=mode,
            normalize=(MEANS, STDS),
            max_parallel=3,
            inputs=inputs,
        )
        for inputs in ("unit", "normalized")
    )
    images = 0.25 + 0.5 * uniform(2, 3, 11, 9, seed=1, dtype=DOUBLE)
    normalised = (images - mean) / std
    for exact, difference in slopes(other, normalised):
        assert exact == pytest.approx(difference, rel=1e-4)
    torch.testing.assert_close(gradient_of(other, normalised), std * gradient_of(unit, images))


class Mixing(CurvedDenoiser):
    """With a product that autocast takes in bfloat16."""

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return super().denoise(noisy @ (torch.eye(6) + 0.1 * noise(6, 6, seed=3)), sigma)


@NOISING
def test_autocast_reaches_the_denoiser_alone_and_its_recomputation(purifier: MultiStepPurifier) -> None:
    images, found = images_of(dtype=torch.float32), []
    exact = model_of(purifier, Mixing()).purify(images)
    for mode in (Unrolled(checkpoint=True), Unrolled(checkpoint=False)):
        model, leaf = model_of(purifier, Mixing(), gradient=mode, max_parallel=3), images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            result = model.purify(leaf)
        assert result.images.dtype == torch.float32
        assert not torch.equal(result.images, exact.images)
        found.append(torch.autograd.grad(result.images.square().sum(), leaf)[0])
    torch.testing.assert_close(*found)


class WithHook(nn.Module):
    """The mean square of the images before the steps of a purification, after the model."""

    def __init__(self, model: PurifiedClassifier, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, images: Tensor) -> Tensor:
        sizes: list[Tensor] = []
        weights = noise(2, 1, *SHAPE, seed=12, dtype=DOUBLE)

        def hook(state: StepState) -> None:
            sizes.append((state.images.unflatten(0, (2, -1)) * weights[:, None]).flatten(1).square().mean(dim=1))

        with self.model.register_step_hook(hook, **self.options):
            logits = self.model(images)
        return logits + torch.stack(sizes).sum(dim=0)[:, None]


WITHOUT_LATENTS = {name: p for name, p in denoisers.ALL.items() if not p.involves_latents and p.passes}


@pytest.mark.parametrize("purifier", WITHOUT_LATENTS.values(), ids=WITHOUT_LATENTS)
@pytest.mark.parametrize("checkpoint", [True, False])
def test_live_states_have_the_gradient_of_finite_differences(purifier: Purifier, checkpoint: bool) -> None:
    model = model_of(purifier, gradient=Unrolled(checkpoint=checkpoint), max_parallel=3)
    for exact, difference in slopes(WithHook(model, live=True), images_of()):
        assert exact == pytest.approx(difference, rel=1e-4)
    plain = gradient_of(WithHook(model), images_of())
    torch.testing.assert_close(plain, gradient_of(model, images_of()), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(plain, gradient_of(WithHook(model, live=True), images_of()))


@NOISING
def test_images_that_a_hook_returns_take_the_place_of_the_states(purifier: MultiStepPurifier) -> None:
    model, seen = model_of(purifier, gradient=Unrolled()), list[StepState]()
    with model.register_step_hook(seen.append):
        expected, exact = model(images_of()), gradient_of(model, images_of())
    with model.register_step_hook(lambda state: state.images.clone(), live=True):  # the same images
        torch.testing.assert_close(model(images_of()), expected)
        torch.testing.assert_close(gradient_of(model, images_of()), exact, rtol=1e-6, atol=1e-9)
    replaced = []
    for live in (True, False):
        with model.register_step_hook(lambda state: 0.9 * state.images, steps={seen[-1].step}, live=live):
            replaced.append(model(images_of()))
    assert not torch.allclose(replaced[0], expected)
    assert torch.equal(*replaced)


def test_a_hook_that_is_not_live_cuts_the_gradient_where_it_replaces() -> None:
    model = model_of(DiffPure(t=3, n_latents=2), gradient=Unrolled())
    with (
        model.register_step_hook(lambda state: state.images, steps={1}),
        pytest.raises(errors.GradientError, match="do not depend on its input"),
    ):
        gradient_of(model, images_of())


def test_hooks_see_the_steps_that_they_name_and_those_of_each_purifier_of_a_chain() -> None:
    model = model_of(Chain(DiffPure(t=4, n_latents=2), OneStep(level=0.3, n_latents=1)))
    every: list[tuple[int, int]] = []
    some: list[tuple[int, int]] = []
    model.register_step_hook(lambda state: every.append((state.step, state.steps)))
    with model.register_step_hook(lambda state: some.append((state.step, state.steps)), steps=range(0, 4, 2)):
        model(images_of())
    model(images_of())
    steps = DiffPure(t=4).steps
    assert every == 2 * [*((n, steps) for n in range(steps)), (0, 1)]
    assert some == [*((n, steps) for n in range(0, steps, 2)), (0, 1)]


def test_hooks_that_see_nothing_or_replace_too_much_are_refused() -> None:
    with pytest.raises(errors.SettingsError, match="makes no steps"):
        model_of(OneStep(level=0.0)).register_step_hook(print)
    both = Chain(OneStep(level=0.3), CMAP(CMAPSettings(level=0.3, n_latents=2, iterations=1)))
    with pytest.raises(errors.SettingsError, match="inside a Chain"):
        model_of(both, gradient=Unrolled()).register_step_hook(print, live=True)
    model = model_of(OneStep(level=0.3))
    with model.register_step_hook(lambda state: state.images[:1]):
        with pytest.raises(errors.InputValueError, match=r"shaped \[2, 4, 3, 8, 6\]"):
            model(images_of())
        with (
            model.register_step_hook(lambda state: state.images),
            pytest.raises(errors.InputValueError, match="2 step hooks"),
        ):
            model(images_of())


@EVERY
def test_values_do_not_depend_on_the_gradient_mode(purifier: Purifier) -> None:
    expected = model_of(purifier, gradient=Detached())(images_of())
    for mode in (Unrolled(), Unrolled(checkpoint=False), StraightThrough(), Surrogate()):
        model = model_of(purifier, gradient=mode)
        torch.testing.assert_close(model(images_of().requires_grad_()), expected, rtol=1e-10, atol=1e-10)
        gradient = gradient_of(model, images_of())
        assert torch.isfinite(gradient).all()
        assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()


@EVERY
def test_what_belongs_to_the_optimisation_over_latents_says_so(purifier: Purifier) -> None:
    model = model_of(purifier, gradient=Implicit())
    with pytest.raises(errors.GradientError, match="optimisation over latents, which this purifier is not"):
        model(images_of().requires_grad_())
    where = "is out of reach inside a" if purifier.involves_latents else "is no part of"
    with pytest.raises(errors.SettingsError, match=rf"settings belongs to the optimisation .*which {where} \w+\."):
        model.settings  # noqa: B018


class Drawing(CurvedDenoiser):
    """A denoiser with noise of its own from torch's generator."""

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return super().denoise(noisy, sigma) * (1 + 0.1 * torch.randn_like(noisy))


def test_noise_of_the_denoiser_itself_is_replayed_in_the_recomputation() -> None:
    found = []
    for checkpoint in (True, False):
        model = model_of(DiffPure(t=4), Drawing(), gradient=Unrolled(checkpoint=checkpoint))
        torch.manual_seed(3)
        found.append(gradient_of(model, images_of()))
    torch.testing.assert_close(found[0], found[1])


def test_memory_of_the_way_back_is_that_of_the_states() -> None:
    """What autograd keeps of a step does not grow with what the denoiser keeps inside."""

    class Deep(CurvedDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            for _ in range(50):
                noisy = noisy.tanh() + noisy.sin()
            return super().denoise(noisy, sigma)

    def kept(checkpoint: bool, purifier: DiffPure) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        held = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model = model_of(purifier, Deep(), gradient=Unrolled(checkpoint=checkpoint))
            held.append(model.purify(images_of().requires_grad_()).images)
        return sum(sizes.values())

    state = images_of().nbytes
    per_step = (kept(True, DiffPure(t=24)) - kept(True, DiffPure(t=12))) / 12
    assert per_step <= 2 * state
    assert (kept(False, DiffPure(t=24)) - kept(False, DiffPure(t=12))) / 12 > 20 * state


# --- backbones --------------------------------------------------------------------------------------------------------

DENOISING = {name: kind for name, kind in NAMES.items() if issubclass(kind, MultiStepPurifier) and kind is not OneStep}


class Consistency(ToyBackbone):
    """Both methods; what it is, it does not say."""

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return torch.tanh(noisy)


class Declared(Consistency):
    """Says that it is a denoiser."""

    kind = "denoiser"


@pytest.mark.parametrize("kind", DENOISING.values(), ids=DENOISING)
def test_steps_need_a_denoiser(kind: Any) -> None:
    words = (
        rf"{kind.__name__} needs a denoiser, but Consistency is a consistency model.*Of that kind are: .*cifar10-edm-"
    )
    with pytest.raises(errors.WrongKindError, match=words):
        model_of(kind(), Consistency(SHAPE))
    with pytest.raises(errors.WrongKindError, match=words):
        kind()(Consistency(SHAPE), images_of(), seeds=SEEDS[:2])
    with pytest.raises(errors.WrongKindError, match=r"consistency.*Of that kind are: .*fashion-mnist-edm"):
        model_of(kind(), "fashion-mnist-ct")
    assert model_of(kind(), Declared(SHAPE)).purifier == kind()


def test_one_step_takes_either_kind_and_cmap_a_consistency_model() -> None:
    for backbone in (Consistency(SHAPE), CurvedDenoiser()):
        assert model_of(OneStep(), backbone)(images_of()).shape == (2, 4)
    with pytest.raises(errors.WrongKindError, match=r"CMAP needs a consistency model, but Declared is a denoiser"):
        model_of(CMAP(), Declared(SHAPE))


def test_a_pair_of_backbones_serves_each_purifier() -> None:
    chain, images = Chain(DiffPure(t=3), denoisers.CMAP_QUICK), images_of()
    consistency, denoiser = ToyBackbone(SHAPE).double(), CurvedDenoiser()
    first = model_of(chain, (consistency, denoiser))
    assert torch.equal(first(images), model_of(chain, [denoiser, consistency])(images))
    assert first.variant(purifier=DiffPure(t=3))(images).shape == (2, 4)
    alone = model_of(DiffPure(t=3), denoiser)
    assert torch.equal(first.variant(purifier=DiffPure(t=3))(images), alone(images))
    assert torch.equal(
        first.variant(purifier=denoisers.CMAP_QUICK)(images), model_of(denoisers.CMAP_QUICK, consistency)(images)
    )
    assert "backbone.consistency.enter" in first.state_dict()
    for wrong in ((consistency, consistency), (denoiser,), (consistency, denoiser, denoiser)):
        with pytest.raises(errors.WrongKindError, match="one consistency model and one denoiser"):
            model_of(chain, wrong)
    with pytest.raises(errors.BackboneError, match="images of one shape"):
        model_of(chain, (ToyBackbone((3, 4, 4)), denoiser))
    for alone in (Consistency(SHAPE), CurvedDenoiser()):
        with pytest.raises(errors.WrongKindError, match=r"(CMAP|DiffPure) needs a .*take a pair: backbone="):
            model_of(chain, alone)


def test_every_purifier_of_a_chain_has_noise_of_its_own() -> None:
    images, chain = images_of(), Chain(OneStep(n_latents=2), OneStep(level=0.3, n_latents=2))
    drawn = purified(chain, images, SEEDS[:2]).latents
    first = purified(OneStep(n_latents=4), images, SEEDS[:2]).latents
    noises = torch.cat([drawn.flatten(0, 1), first.flatten(0, 1)]).flatten(1)
    similar = torch.corrcoef(noises) - torch.eye(len(noises), dtype=DOUBLE)
    assert similar.abs().max() < 0.4
    alone = Chain(OneStep(n_latents=4))
    assert torch.equal(purified(alone, images, SEEDS[:2]).latents, first)


@EVERY
def test_what_fits_is_measured_on_the_network_that_is_used(purifier: Purifier) -> None:
    assert purifier.fitting(backbone_for(purifier), SHAPE, torch.device("cpu")) > 100


def test_a_purifier_with_second_derivatives_fits_fewer_images_and_a_chain_what_each_of_its_parts_fits() -> None:
    backbone, device = CurvedDenoiser(), torch.device("cpu")
    plain, steep = OneStep(level=0.6), LikelihoodMaximisation()
    few, many = (purifier.fitting(backbone, SHAPE, device) for purifier in (steep, plain))
    assert few < many
    assert Chain(plain, steep).fitting(backbone, SHAPE, device) == few


DENOISING = {name: purifier for name, purifier in denoisers.SINGLE.items() if not isinstance(purifier, CMAP)}


@pytest.mark.parametrize("purifier", DENOISING.values(), ids=DENOISING)
def test_a_denoiser_without_a_graph_is_an_error_and_no_partial_gradient(purifier: Purifier) -> None:
    class WithoutGraph(CurvedDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            with torch.no_grad():
                return super().denoise(noisy, sigma)

    with pytest.raises(errors.BackboneError, match="do not depend on the noisy images for autograd"):
        gradient_of(model_of(purifier, WithoutGraph(), gradient=Unrolled()), images_of())


def test_noise_after_the_given_latents_is_fresh_or_that_of_the_seeds() -> None:
    model = model_of(DiffPure(t=4), seed=None)
    images, start = images_of()[:1].expand(2, -1, -1, -1), noise(1, 1, *SHAPE, seed=1).expand(2, -1, -1, -1, -1)
    one, other = model.purify(images, latents=start).images
    assert not torch.equal(one, other)
    given = [model.purify(images, latents=start, seeds=[3, 4]).images for _ in range(2)]
    assert torch.equal(*given)
    assert not torch.equal(*given[0])


def test_a_chain_with_a_purifier_of_ones_own_can_be_described() -> None:
    class Mine(OneStep):
        pass

    described = Chain(Mine(level=0.3), OneStep()).to_dict()
    assert described["purifiers"][0] == Mine(level=0.3).to_dict()
    assert described["purifiers"][1]["purifier"] == "one-step"


def test_a_chain_has_seeds_in_place_of_latents() -> None:
    with pytest.raises(errors.InputValueError, match="leave latents out"):
        purified(denoisers.ALL["chain"], images_of(), SEEDS[:2], latents=noise(2, 4, *SHAPE, seed=1))


def test_a_backbone_that_overflows_is_named() -> None:
    class Overflowing(CurvedDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            return noisy / 0

    with pytest.raises(errors.BackboneError, match="NaN or infinite"):
        DiffPure(t=2)(Overflowing(), images_of(), seeds=SEEDS[:2])


class Conditional(CurvedDenoiser):
    """Each class has another mean."""

    num_classes = 4

    def denoise(self, noisy: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        return super().denoise(noisy, sigma) + 0.1 * class_labels.to(noisy)[:, None, None, None]


@NOISING
def test_a_class_conditional_denoiser(purifier: MultiStepPurifier) -> None:
    images, backbone = images_of(3), Conditional()
    labels = torch.tensor([[0, 1], [2, 3], [1, 1]])
    whole = purifier(backbone, images, seeds=SEEDS, class_labels=labels)
    assert whole.class_labels is not None
    chunked = purifier(backbone, images, seeds=SEEDS, class_labels=labels, max_parallel=2)
    torch.testing.assert_close(chunked.images, whole.images)
    other = purifier(backbone, images, seeds=SEEDS, class_labels=labels.flip(1))
    assert not torch.allclose(other.images[0], whole.images[0])
    torch.testing.assert_close(other.images[2], whole.images[2])
    model = model_of(purifier, backbone, gradient=Unrolled())
    for exact, difference in slopes(model, images_of()):
        assert exact == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("handed_on", ["versions", "mean"])
def test_class_labels_of_a_chain(handed_on: str) -> None:
    chain = Chain(OneStep(n_latents=2), OneStep(level=0.2, n_latents=3), handed_on=handed_on)
    labels = torch.arange(2 * chain.n_latents).view(2, -1) % 4
    result = chain(Conditional(), images_of(), seeds=SEEDS[:2], class_labels=labels)
    assert result.class_labels is labels
    assert result.images.shape[1] == chain.n_latents
    model = model_of(chain, Conditional(), class_labels="spread")
    spread = model.purify(images_of()).class_labels
    assert spread is not None
    assert spread.shape == (2, chain.n_latents)


def test_weights_in_half_precision_keep_the_state_in_float32() -> None:
    class Weighted(CurvedDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16), requires_grad=False)

        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            assert noisy.dtype == torch.bfloat16
            return super().denoise(noisy, sigma) * self.weight

    images = images_of(dtype=torch.float32)
    found = DiffPure(t=20)(Weighted(), images, seeds=SEEDS[:2]).images
    assert found.dtype == torch.float32
    assert (found - DiffPure(t=20)(CurvedDenoiser(), images, seeds=SEEDS[:2]).images).abs().max() < 0.05


# --- settings ---------------------------------------------------------------------------------------------------------


@EVERY
def test_settings_go_through_json_and_repr(purifier: Any) -> None:
    values = json.loads(json.dumps(purifier.to_dict()))
    assert type(purifier).from_dict(values) == purifier
    assert hash(type(purifier).from_dict(values)) == hash(purifier)
    shown = eval(repr(purifier), {name: getattr(denoisers, name) for name in dir(denoisers)})
    assert shown == purifier
    assert repr(purifier) in repr(model_of(purifier))
    assert model_of(purifier).variant(seed=1).purifier == purifier
    assert model_of(purifier)(images_of()[:0]).shape == (0, 4)


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        st.builds(
            DiffPure,
            t=st.integers(0, 30),
            solver=st.sampled_from(["sde", "ode", "ddpm"]),
            step=st.floats(5e-4, 0.01),
            n_latents=st.integers(1, 3),
        ),
        st.builds(
            GDMP,
            t=st.integers(0, 6),
            rounds=st.integers(0, 2),
            guide=st.sampled_from(["mse", "ssim", "none"]),
            strength=st.floats(0, 1000),
            noise_target=st.booleans(),
            levels=st.sampled_from([100, 250, 1000]),
            n_latents=st.integers(1, 3),
        ),
        st.builds(ADP, noise=st.floats(0.01, 0.5), iterations=st.integers(0, 4), n_latents=st.integers(1, 3)),
        st.builds(GNSP, rounds=st.lists(st.integers(1, 6), max_size=3), eta=st.floats(0, 1)),
        st.builds(LikelihoodMaximisation, iterations=st.integers(0, 3), learning_rate=st.floats(0.01, 0.3)),
        st.builds(OneStep, level=st.floats(0, 2), n_latents=st.integers(1, 3)),
    )
)
def test_whatever_the_settings(purifier: Any) -> None:
    images = images_of(2, torch.float32)
    result = purified(purifier, images, SEEDS[:2])
    again = purified(type(purifier).from_json(purifier.to_json()), images[1:], SEEDS[1:2], max_parallel=2)
    torch.testing.assert_close(result.images[1:], again.images, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(result.images).all()
    assert result.images.shape[1] == purifier.n_latents


def test_a_chain_is_made_of_purifiers() -> None:
    with pytest.raises(errors.SettingsError, match="made of purifiers"):
        Chain()
    with pytest.raises(errors.SettingsError, match="made of purifiers"):
        Chain(DiffPure(), "cmap")  # pyright: ignore[reportArgumentType]
    with pytest.raises(errors.SettingsError, match="handed_on"):
        Chain(DiffPure(), handed_on="best")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(OneStep):
        pass

    with pytest.raises(errors.SettingsError, match="Mine is not one of the purifiers that have a name"):
        Chain(Mine()).to_json()
    assert Chain(Mine()).replace(handed_on="mean") == Chain(Mine(), handed_on="mean")


def test_presets() -> None:
    assert DiffPure.preset("cifar10-linf") == DiffPure(t=100)
    assert DiffPure.preset("cifar10-l2").t == 75
    assert CMAP.preset("cifar10-linf") == CMAP()
    assert Chain.preset("cifar10-linf") == Chain(DiffPure(t=100), CMAP())
    for kind in (DiffPure, GDMP, ADP, GNSP, LikelihoodMaximisation, Chain, CMAP):
        assert isinstance(kind.preset("cifar10-linf"), kind)
    with pytest.raises(
        errors.UnknownNameError, match=r"DiffPure has no preset 'mnist'. There are: cifar10-linf, cifar10-l2,"
    ):
        DiffPure.preset("mnist")
    with pytest.raises(errors.UnknownNameError, match=r"It has none: it is the step .*OneStep\(level=\.\.\.\)"):
        OneStep.preset("cifar10-linf")
    with pytest.raises(errors.UnknownNameError, match=r"no preset 'cifar10'. It has none\.$"):
        Identity.preset("cifar10")
    with pytest.raises(errors.UnknownNameError, match=r"DiffPure has no preset \[\]"):
        DiffPure.preset([])  # pyright: ignore[reportArgumentType]
    assert CMAP.preset("imagenet100-linf") == CMAP.preset("imagenet100")
    with pytest.raises(errors.UnknownNameError, match=r"'imagenet-linf'\. There are: .*imagenet100-linf"):
        CMAP.preset("imagenet-linf")


@pytest.mark.parametrize("name", NAMES)
def test_by_name(name: str) -> None:
    assert by_name(name).__name__.lower() == name.replace("-", "")
    if name != "chain":
        assert from_texts(name) == by_name(name)()


@pytest.mark.parametrize(
    ("name", "texts", "expected"),
    [
        ("diffpure", ["t=75", "solver=ode"], DiffPure(t=75, solver="ode")),
        ("diffpure", ["preset=cifar10-l2", "n_latents=4"], DiffPure(t=75, n_latents=4)),
        (
            "gdmp",
            ["eps=4/255", "noise_target=false", "guide = ssim"],
            GDMP(eps=4 / 255, noise_target=False, guide="ssim"),
        ),
        ("gnsp", ["rounds=30,50"], GNSP(rounds=(30, 50))),
        ("gnsp", ["rounds=30"], GNSP(rounds=(30,))),
        ("likelihood-maximisation", ["sigmas=0.1,0.2"], LikelihoodMaximisation(sigmas=(0.1, 0.2))),
        ("cmap", ["n_latents=3", "betas=0.5,0.9"], from_texts("cmap", ["betas=(0.5, 0.9)", "n_latents=3"])),
        ("cmap", ["preset=imagenet100"], CMAP.preset("imagenet100")),
        ("chain", ["purifiers=diffpure,cmap", "handed_on=mean"], Chain(DiffPure(), CMAP(), handed_on="mean")),
    ],
)
def test_from_texts(name: str, texts: list[str], expected: Purifier) -> None:
    assert from_texts(name, texts) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "chain purifiers=(diffpure t=60 step=0.01, cmap level=1/2 iterations=3) handed_on=mean",
            Chain(DiffPure(t=60, step=0.01), CMAP(CMAPSettings(level=0.5, iterations=3)), handed_on="mean"),
        ),
        ("chain purifiers=[diffpure preset=cifar10-l2,  one-step]", Chain(DiffPure(t=75), OneStep())),
        ("chain purifiers=gnsp", Chain(GNSP())),
        ("chain purifiers=((one-step), (gnsp rounds=(30,50)))", Chain(OneStep(), GNSP(rounds=(30, 50)))),
        ("chain purifiers=(one-step),(identity)", Chain(OneStep(), Identity())),
        (
            "chain purifiers=(chain purifiers=(one-step level=1, gnsp rounds=(30, 50)), identity)",
            Chain(Chain(OneStep(level=1.0), GNSP(rounds=(30, 50))), Identity()),
        ),
    ],
)
def test_purifiers_of_a_chain_have_settings_in_one_text(text: str, expected: Purifier) -> None:
    name, *settings = words_of(text)
    found = from_texts(name, settings)
    assert found == expected
    assert purifier_from_dict({"purifier": "chain", **json.loads(json.dumps(found.to_dict()))}) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("purifiers=diffpure,cmpa", r"^Purifier 2 of the chain, 'cmpa': There is no purifier 'cmpa'. .* 'cmap'"),
        (
            "purifiers=(diffpure tt=6, cmap)",
            "^Purifier 1 of the chain, 'diffpure tt=6': DiffPure has no setting 'tt'. Did you mean 't'",
        ),
        (
            "purifiers=chain purifiers=(identity, cmap levle=1)",
            r"^Purifier 1 of the chain, .*: Purifier 2 of the chain, 'cmap levle=1': .* mean 'level'",
        ),
        ("purifiers=diffpure t=many", "Purifier 1 of the chain, 'diffpure t=many': DiffPure.t must be an integer"),
        ("purifiers=gnsp rounds=30,50", r"Purifier 2 of the chain, '50': .* needs brackets: gnsp rounds=\(30,50\)"),
        ("purifiers=cmap betas=0.8,0.9", r"Purifier 1 of .*: CMAPSettings.betas must .* needs brackets"),
        ("purifiers=diffpure t", "Purifier 1 of the chain, 'diffpure t': A setting of a purifier is written key=value"),
        ("purifiers=(diffpure t=6", "A bracket in .* is not closed: write"),
        ("purifiers=diffpure t=6)", "A bracket in .* is not opened: write"),
        ("purifiers=", "Purifier 1 of the chain, '': There is no purifier ''"),
        ("purifiers=3", r"but got \(3,\). As text: purifiers=\(diffpure t=100, cmap\)"),
        ("t=60", r"Chain has no setting 't'. .* follow their names: purifiers=\(diffpure t=60, cmap\)"),
        ("handed=mean", "Did you mean 'handed_on'"),
        ("cmap", r"but is 'cmap'. A value with spaces needs brackets: purifiers=\(diffpure t=60, cmap\)"),
    ],
)
def test_texts_of_a_chain_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises((errors.SettingsError, errors.UnknownNameError), match=message):
        from_texts("chain", [text])


def test_texts_that_do_not_fit() -> None:
    with pytest.raises(errors.UnknownNameError, match=r"no purifier 'difpure'. Did you mean 'diffpure'"):
        from_texts("difpure")
    with pytest.raises(errors.SettingsError, match="key=value"):
        from_texts("diffpure", ["t"])
    with pytest.raises(errors.SettingsError, match="given twice"):
        from_texts("diffpure", ["t=1", "t=2"])
    with pytest.raises(errors.SettingsError, match=r"DiffPure has no setting 'time'"):
        from_texts("diffpure", ["time=1"])
    with pytest.raises(errors.SettingsError, match=r"DiffPure.t must be an integer"):
        from_texts("diffpure", ["t=many"])
    with pytest.raises(errors.UnknownNameError, match="has no preset"):
        from_texts("diffpure", ["preset=mnist"])
    with pytest.raises(errors.UnknownNameError, match="no purifier None"):
        Chain.from_dict({"purifiers": [{"t": 4}]})


def test_a_classifier_of_one_image_is_left_in_its_mode() -> None:
    model = model_of(DiffPure(t=2))
    assert isinstance(model.classifier, Classifier)
    assert not model.train().backbone.training


@pytest.mark.parametrize("count", [0, -1, True, 1.5])
def test_versions_of_a_purifier_of_ones_own_are_checked(count: Any) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(MultiStepPurifier):
        level: float = 0.1
        steps: int = 1
        n_latents: int = 2

        def reverse(self, run: Any) -> Tensor:
            return run.images

    assert Own().n_latents == 2
    with pytest.raises(errors.SettingsError, match=r"Own\.n_latents"):
        Own(n_latents=count)


def test_cmap_is_frozen_and_replaces_its_settings() -> None:
    purifier = CMAP(CMAPSettings(iterations=3))
    for name in ("settings", "other"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(purifier, name, CMAPSettings())
    changed = purifier.replace(n_latents=4)
    assert changed == CMAP(CMAPSettings(iterations=3, n_latents=4)) != purifier
    assert len({changed, purifier, CMAP(CMAPSettings(iterations=3))}) == 2
    with pytest.raises(errors.SettingsError, match="n_latents must be at least 1"):
        purifier.replace(n_latents=0)


class Stronger(CMAP):
    """CMAP with an option of its own."""

    def __init__(self, settings: CMAPSettings | None = None, strength: float = 1.0) -> None:
        super().__init__(settings)
        self.strength = strength


def test_a_subclass_of_cmap_keeps_its_options() -> None:
    purifier = Stronger(strength=2.0)
    for same in (purifier.replace(n_latents=3), copy.deepcopy(purifier), pickle.loads(pickle.dumps(purifier))):
        assert isinstance(same, Stronger)
        assert same.strength == 2.0
    assert purifier.replace(n_latents=3).n_latents == 3
    assert describe(Stronger(strength=1.0)) != describe(purifier)


def test_a_chain_takes_its_purifiers_without_a_list() -> None:
    with pytest.raises(errors.SettingsError, match=r"one by one: Chain\(DiffPure\(t=100\), CMAP\(\)\), without a list"):
        Chain([OneStep(), CMAP()])  # pyright: ignore[reportArgumentType]


def test_the_remedy_for_a_chain_without_a_denoiser_is_a_pair() -> None:
    with pytest.raises(errors.WrongKindError, match="DiffPure needs a denoiser") as caught:
        PurifiedClassifier(nn.Flatten(), "fashion-mnist-ct", purifier=Chain(DiffPure(), CMAP()))
    assert "--backbone twice" in str(caught.value)
    assert "OneStep" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoise": lambda noisy: noisy}, r"must have denoise\(noisy, sigma\), but its own is another"),
        ({"num_classes": 10}, r"must have denoise\(noisy, sigma, class_labels\), but its own is another"),
        (
            {"denoise": functools.wraps(lambda noisy, sigma: noisy)(lambda noisy: noisy)},
            r"must have denoise\(noisy, sigma\), but its own is another",
        ),
    ],
)
def test_a_backbone_whose_method_takes_other_arguments_is_refused(changes: dict[str, Any], message: str) -> None:
    backbone = CurvedDenoiser()
    for name, value in changes.items():
        setattr(backbone, name, value)
    with pytest.raises(errors.BackboneError, match=f"^CurvedDenoiser {message}"):
        model_of(OneStep(), backbone)


def test_a_method_that_is_wrapped_counts_by_what_it_takes_itself() -> None:
    backbone = CurvedDenoiser()
    backbone.num_classes = 4
    denoise = backbone.denoise

    @functools.wraps(denoise)
    def labelled(noisy: Tensor, sigma: Tensor | float, labels: Tensor) -> Tensor:
        return denoise(noisy, sigma)

    backbone.denoise = labelled
    assert model_of(OneStep(), backbone, class_labels="spread")(images_of()).isfinite().all()


@pytest.mark.parametrize("level", [torch.tensor(0.5), np.float32(0.5)], ids=["tensor", "numpy"])
def test_a_level_may_be_a_number_of_a_library(level: Any) -> None:
    class Own(Identity):
        pass

    Own.level = level
    assert model_of(Own())(images_of()).isfinite().all()


@pytest.mark.parametrize("purifier", [OneStep(), ADP(iterations=1), LikelihoodMaximisation(iterations=1)], ids=repr)
def test_what_a_denoiser_returns_is_checked(purifier: Purifier) -> None:
    backbone = CurvedDenoiser()
    backbone.noise = 0.1  # something of the module's own, no range of levels
    model = model_of(purifier, backbone)
    assert model.purify(images_of()).images.isfinite().all()
    for wrong in (
        lambda noisy, sigma: None,
        lambda noisy, sigma: noisy.detach().numpy(),
        lambda noisy, sigma: noisy[..., :1],
    ):
        backbone.denoise = wrong
        with pytest.raises(errors.BackboneError, match="denoise must return"), torch.no_grad():
            model(images_of())


def test_images_of_other_units_are_not_clamped_silently() -> None:
    class Bytes(CurvedDenoiser):
        def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
            return 127.5 * (super().denoise(noisy, sigma) + 1)

    with pytest.raises(errors.BackboneError, match=r"denoise must return images in \[-1, 1\]; where it does, OneStep"):
        model_of(OneStep(), Bytes())(images_of())


@pytest.mark.parametrize("purifier", [OneStep(), DiffPure(t=3), DiffPure(t=3, solver="ddpm")], ids=repr)
def test_functional_gradients_run_without_recomputation(purifier: Purifier) -> None:
    """As docs/gradients.md says."""
    model = model_of(purifier, gradient=Unrolled(checkpoint=False), max_parallel=3)
    images = images_of()
    found = torch.func.grad(lambda given: model(given, seeds=SEEDS[:2]).square().sum())(images)
    expected = images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(expected, seeds=SEEDS[:2]).square().sum(), expected)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("images_too", [True, False])
@pytest.mark.parametrize(
    "purifier", [OneStep(level=0.4), DiffPure(t=3), LikelihoodMaximisation(iterations=2)], ids=repr
)
def test_noise_of_the_caller_has_a_gradient(purifier: Purifier, images_too: bool, checkpoint: bool) -> None:
    """Against differences along a direction."""
    model = model_of(purifier, gradient=Unrolled(checkpoint=checkpoint), vote="soft")
    images = images_of().requires_grad_(images_too)
    start, direction = (noise(2, 3, *SHAPE, seed=n, dtype=DOUBLE) for n in (5, 6))

    def value(latents: Tensor) -> Tensor:
        return model.purify(images, latents=latents, seeds=None).logits.square().sum()

    leaf = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    step = 1e-6
    with torch.no_grad():
        slope = (value(start + step * direction) - value(start - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-7)
    assert not model.purify(images, latents=leaf).latents.requires_grad
