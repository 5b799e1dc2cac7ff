"""Gradient modes in the wrapper: what each gives, that none is silently zero or detached, and what each costs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.backbones import CompactUNet, CompactUNetConfig, ConsistencyBackbone, NoiseRange
from cmap_defense.cmap.voting import log_mean_probability
from cmap_defense.errors import GradientError, PurifierError, SettingsError
from cmap_defense.gradients import Detached, GradientMode, Implicit, StraightThrough, Surrogate, Unrolled
from cmap_defense.gradients.base import Purification
from cmap_defense.purifiers import OneStep
from cmap_defense.results import PurificationResult
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
DOUBLE = torch.float64
SETTINGS = CMAPSettings(n_latents=3, iterations=7, learning_rate=0.05, l1_smoothing=0.05)
IMAGES = uniform(2, *SHAPE, seed=1, dtype=DOUBLE)
LABELS = torch.tensor([1, 3])
DIRECTION = noise(2, *SHAPE, seed=2, dtype=DOUBLE)


class SmoothClassifier(nn.Module):
    """Linear on squares, so that its own derivative depends on where it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * noise(5, 3 * 8 * 6, seed=7, dtype=DOUBLE))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).square() @ self.weight.mT


class CountingBackbone(ToyBackbone):
    """Counts the latents that pass through it; has a denoise as well."""

    def __init__(self) -> None:
        super().__init__(SHAPE)
        self.passes = 0

    def generate(self, latents: Tensor) -> Tensor:
        self.passes += len(latents)
        return super().generate(latents)

    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        self.passes += len(noisy)
        return super().generate(noisy / (1 + sigma))


def wrapped(gradient: GradientMode, settings: CMAPSettings = SETTINGS, **options: object) -> PurifiedClassifier:
    backbone = CountingBackbone().double().requires_grad_(False)
    chosen = {"vote": "soft", "seed": 3, "settings": settings, "gradient": gradient} | options
    return PurifiedClassifier(SmoothClassifier(), backbone, **chosen)  # pyright: ignore[reportArgumentType]


def loss_of(model: PurifiedClassifier, images: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), LABELS, reduction="sum")


def gradient_of(model: PurifiedClassifier, images: Tensor = IMAGES) -> Tensor:
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model, leaf), leaf)
    return gradient


ALL = [
    StraightThrough(),
    Unrolled(),
    Unrolled(last=3, checkpoint=False),
    Implicit(damping=30.0),
    Surrogate(),
    Surrogate(0.5, 5),
]
MODES = pytest.mark.parametrize("mode", ALL, ids=repr)


@MODES
@pytest.mark.parametrize("train", [False, True])
def test_gradient_is_there_finite_and_not_zero_for_every_image(mode: GradientMode, train: bool):
    gradient = gradient_of(wrapped(mode).train(train))
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().sum(dim=1) > 0).all()


@MODES
def test_values_do_not_depend_on_the_mode(mode: GradientMode):
    expected = wrapped(Detached())(IMAGES)
    torch.testing.assert_close(wrapped(mode)(IMAGES.clone().requires_grad_()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"max_parallel": 4}, {"max_parallel": 1}])
@pytest.mark.parametrize("train", [False, True])
def test_unrolled_is_the_derivative_of_the_whole_wrapper(options: dict, train: bool):
    model = wrapped(Unrolled(), **options).train(train)
    with torch.no_grad():
        ends = [loss_of(model, IMAGES + sign * 1e-6 * DIRECTION).item() for sign in (1, -1)]
    exact = (ends[0] - ends[1]) / 2e-6
    assert (gradient_of(model) * DIRECTION).sum().item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"max_parallel": 4}])
def test_unrolled_agrees_in_direction_with_wide_differences_of_the_shipped_objective(options: dict):
    """L1 as it is has no useful derivative; steps of h = 1e-2 see what the smoothed one promises."""
    model = wrapped(Unrolled(), SETTINGS.replace(l1_smoothing=0.0, iterations=5), **options)
    gradient = gradient_of(model)
    directions = [noise(2, *SHAPE, seed=20 + i, dtype=DOUBLE) for i in range(24)]
    wide, told = [], []
    with torch.no_grad():
        for direction in directions:
            ends = [loss_of(model, (IMAGES * 0.9 + 0.05) + sign * 1e-2 * direction).item() for sign in (1, -1)]
            wide.append((ends[0] - ends[1]) / 2e-2)
    gradient = gradient_of(model, IMAGES * 0.9 + 0.05)
    told = [(gradient * direction).sum().item() for direction in directions]
    correlation = torch.corrcoef(torch.tensor([wide, told]))[0, 1].item()
    assert correlation > 0.5


@MODES
def test_gradient_in_chunks_and_of_one_image_alone_is_the_same(mode: GradientMode):
    whole = gradient_of(wrapped(mode))
    torch.testing.assert_close(gradient_of(wrapped(mode, max_parallel=2)), whole, rtol=1e-7, atol=1e-10)


def test_straight_through_is_the_mean_over_the_purified_images():
    model = wrapped(StraightThrough())
    purified = model.purify(IMAGES).images.detach().requires_grad_()
    logits = model.classifier(purified.flatten(0, 1)).unflatten(0, purified.shape[:2])
    loss = nn.functional.cross_entropy(log_mean_probability(logits), LABELS, reduction="sum")
    (expected,) = torch.autograd.grad(loss, purified)
    torch.testing.assert_close(gradient_of(model), expected.sum(dim=1))


def test_surrogate_is_the_derivative_of_noising_and_denoising():
    """With a classifier that is linear in the images the two derivatives can be told apart by hand."""
    model = wrapped(Surrogate(sigma=0.3))
    leaf = IMAGES.clone().requires_grad_()
    result = model.purify(leaf)
    (gradient,) = torch.autograd.grad((result.images * 2).sum(), leaf)
    backbone, k = model.backbone, SETTINGS.n_latents
    from cmap_defense.common.rng import derived_seeds, draw_latents
    from cmap_defense.gradients.surrogate import STREAM

    drawn = draw_latents(derived_seeds(torch.tensor([3, 3]), STREAM), k, SHAPE).double()
    again = IMAGES.clone().requires_grad_()
    noisy = (2 * again - 1)[:, None] + 0.3 * drawn
    denoised = backbone.denoise(noisy.flatten(0, 1), 0.3).clamp(-1, 1)  # pyright: ignore[reportCallIssue]
    (expected,) = torch.autograd.grad(((denoised + 1) / 2 * 2).sum(), again)
    torch.testing.assert_close(gradient, expected)


def test_detached_refuses_and_names_the_others():
    with pytest.raises(GradientError, match=r"Unrolled.*StraightThrough.*Implicit.*Surrogate"):
        gradient_of(wrapped(Detached()))


@MODES
def test_call_that_needs_no_gradient_pays_nothing(mode: GradientMode):
    model, plain = wrapped(mode), wrapped(Detached())
    for leaf in (IMAGES, IMAGES.clone().requires_grad_()):
        with torch.no_grad():
            model(leaf)
            plain(leaf)
    assert model.backbone.passes == plain.backbone.passes
    assert not model(IMAGES).requires_grad or any(p.requires_grad for p in model.classifier.parameters())


def test_passes_of_the_backbone_are_those_that_the_docs_say():
    """B K N for the loop and B K at its end; what a backward pass adds per differentiated step and latent."""

    def passes(mode: GradientMode) -> tuple[int, int]:
        model = wrapped(mode, max_parallel=6)
        loss = loss_of(model, IMAGES.clone().requires_grad_())
        forward = model.backbone.passes
        loss.backward()
        return forward, model.backbone.passes - forward

    k, n = 2 * SETTINGS.n_latents, SETTINGS.iterations
    assert passes(StraightThrough()) == (k * (n + 1), 0)
    assert passes(Unrolled(checkpoint=False)) == (k * (n + 1), k * (n + 1))
    assert passes(Unrolled(checkpoint=True)) == (k * (n + 1), k * (2 * n + 1))
    assert passes(Unrolled(last=2, checkpoint=False)) == (k * (n + 1), k * 3)
    assert passes(Surrogate()) == (k * (n + 2), k)


def test_gradient_mode_leaves_weights_modes_and_random_state_alone():
    torch.manual_seed(5)
    for mode in ALL:
        model = wrapped(mode).train()
        before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
        gradient_of(model)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
        assert model.training
        assert not model.backbone.training
        assert all(p.grad is None for p in model.parameters())


@MODES
def test_modes_are_values_that_print_what_they_are(mode: GradientMode):
    assert copy.deepcopy(mode) == mode
    assert hash(copy.deepcopy(mode)) == hash(mode)
    assert eval(repr(mode)) == mode
    assert mode != Detached()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Unrolled, {"last": 0, "l1_smoothing": -1.0, "max_growth": 0.0}),
        (Implicit, {"iterations": 0, "damping": -0.1, "tolerance": float("nan")}),
        (Surrogate, {"sigma": 0.0, "steps": 0}),
        (Surrogate, {"sigma": 0.001}),
    ],
)
def test_settings_out_of_range_are_refused(kind: type[GradientMode], wrong: dict):
    for name, value in wrong.items():
        with pytest.raises(SettingsError, match=name):
            kind(**{name: value})


def test_a_surrogate_at_a_level_that_the_backbone_does_not_know_is_refused():
    model = wrapped(Surrogate(90.0))
    gradient_of(model)
    model.backbone.noise = NoiseRange(sigma_max=80.0)
    with pytest.raises(SettingsError, match="sigma is 90, but the backbone was trained for levels up to 80"):
        gradient_of(model)


@pytest.mark.parametrize("mode", [Unrolled(), Unrolled(last=2), Implicit()], ids=repr)
def test_second_derivatives_through_the_loop_are_an_error_and_no_zeros(mode: GradientMode):
    model = wrapped(mode)
    with pytest.raises(GradientError, match="Second derivatives through the optimisation over latents"):
        torch.autograd.functional.hvp(lambda images: loss_of(model, images), IMAGES, DIRECTION)
    leaf = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(model, leaf), leaf, create_graph=True)
    with pytest.raises(GradientError, match=r"StraightThrough\(\) or Surrogate\(\)"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("mode", [StraightThrough(), Surrogate()], ids=repr)
def test_these_modes_have_second_derivatives(mode: GradientMode):
    second = torch.autograd.functional.hvp(lambda images: loss_of(wrapped(mode), images), IMAGES, DIRECTION)[1]
    assert second.abs().max() > 0


class Wrong(GradientMode):
    """One of a user's that returns something else."""

    def purify(self, purification: Purification) -> PurificationResult:
        return purification.run().images  # pyright: ignore[reportReturnType]


def test_what_a_mode_of_a_user_returns_is_checked_by_its_name():
    with pytest.raises(PurifierError, match=r"^Wrong\.purify must return a PurificationResult, but returned Tensor"):
        wrapped(Wrong())(IMAGES)


def test_surrogate_without_denoise_says_so():
    model = PurifiedClassifier(
        SmoothClassifier(), ToyBackbone(SHAPE).double().requires_grad_(False), settings=SETTINGS, gradient=Surrogate()
    )
    with pytest.raises(GradientError, match="denoise"):
        model(IMAGES.clone().requires_grad_())


def test_implicit_reports_each_backward_pass():
    mode = Implicit(damping=30.0)
    model = wrapped(mode)
    assert mode.last_report is None
    gradient_of(model)
    first = mode.last_report
    assert first is not None
    assert first.residual.shape == (2,)
    gradient_of(model)
    assert mode.last_report is not first


@pytest.mark.parametrize("mode", [Unrolled(last=2), Implicit(iterations=3, damping=10.0), Surrogate()], ids=repr)
def test_modes_run_on_a_network_with_attention_in_bfloat16_and_under_autocast(mode: GradientMode):
    config = CompactUNetConfig(
        image_shape=(1, 8, 8), channels=(8, 16), blocks=1, attention=(False, True), head_channels=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = CompactUNet(config)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images = uniform(2, 1, 8, 8, seed=3)
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        backbone = ConsistencyBackbone(copy.deepcopy(network), (1, 8, 8)).to(dtype).requires_grad_(False)
        model = PurifiedClassifier(
            classifier, backbone, settings=CMAPSettings(n_latents=2, iterations=3), gradient=mode, seed=0
        )
        leaf = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(leaf).square().sum()
        loss.backward()
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.abs().sum() > 0


def test_the_noise_of_a_surrogate_is_that_of_the_seeds_where_the_first_noise_is_given() -> None:
    def gradient(seeds: list[int]) -> Tensor:
        model = PurifiedClassifier(
            SmoothClassifier(), CountingBackbone(), purifier=OneStep(n_latents=3), gradient=Surrogate()
        ).eval()
        x = IMAGES.clone().requires_grad_()
        result = model.purify(x, latents=noise(2, 3, *SHAPE, seed=4, dtype=DOUBLE), seeds=seeds)
        return torch.autograd.grad((result.images * DIRECTION[:, None]).sum(), x)[0]

    one, again, other = gradient([5, 6]), gradient([5, 6]), gradient([7, 6])
    assert torch.equal(one, again)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
