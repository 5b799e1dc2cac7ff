"""The trajectories of the authors' loss and optimiser around a toy generator are reproduced, step by step."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmap_defense.cmap.optimise import LatentState, optimise_latents
from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.results import History

FOLDER = Path(__file__).parent.parent / "golden"
NAMES = ("cifar", "imagenet")
CHUNKS = (1, 3, 7)


@dataclasses.dataclass
class Golden:
    """One recorded trajectory. Arrays over latents are turned to [B, K, C, H, W]."""

    values: dict
    arrays: dict[str, Tensor]
    settings: CMAPSettings

    def generate(self, latents: Tensor) -> Tensor:
        """The toy generator, in the precision of ``latents``."""
        w1, b1, w2, b2 = (self.arrays[name].to(latents.dtype) for name in ("w1", "b1", "w2", "b2"))
        return F.conv2d(F.silu(F.conv2d(latents, w1, b1, padding=1)), w2, b2, padding=1).clamp(-1, 1)


@dataclasses.dataclass
class Run:
    """What our loop did: its states before each step, its last latents, its history."""

    states: list[LatentState]
    latents: Tensor
    history: History

    def latents_after(self, steps: int) -> Tensor:
        return self.states[steps].latents if steps < len(self.states) else self.latents


def load(name: str) -> Golden:
    values = json.loads((FOLDER / f"cmap_{name}_settings.json").read_text())
    with np.load(FOLDER / f"cmap_{name}_settings.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    for key, array in arrays.items():
        if array.ndim == 5:
            arrays[key] = array.transpose(0, 1).contiguous()
    settings = CMAPSettings(
        n_latents=values["K"],
        iterations=values["iterations"],
        learning_rate=values["lr_on_u"],
        betas=tuple(values["betas"]),
        eps=80 * values["eps"] / values["scale_factor"],
        ssim_weight=values["ssim_weight"],
        latent_weight=values["latent_weight_unit_latents"],
    )
    return Golden(values, arrays, settings)


def run(golden: Golden, *, max_parallel: int | None = None, dtype: torch.dtype = torch.float32) -> Run:
    states: list[LatentState] = []
    latents, history = optimise_latents(
        golden.generate,
        golden.arrays["images"].to(dtype),
        golden.arrays["latents_init"].to(dtype),
        golden.settings,
        callback=states.append,
        max_parallel=max_parallel,
    )
    return Run(states, latents, history)


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load(request.param)


@pytest.fixture(scope="module")
def ours(golden: Golden) -> Run:
    return run(golden)


def test_the_settings_of_the_recording_are_those_of_the_preset_of_its_name():
    for name, preset in (("cifar", "cifar10"), ("imagenet", "imagenet100")):
        recorded, ours = load(name).settings, CMAPSettings.preset(preset)
        same_size = ours.replace(n_latents=recorded.n_latents, iterations=recorded.iterations)
        for field in dataclasses.fields(CMAPSettings):
            found, expected = getattr(same_size, field.name), getattr(recorded, field.name)
            plain = expected is None or isinstance(expected, str)
            assert found == (expected if plain else pytest.approx(expected, rel=1e-12)), field.name


def check_latents(ours: Run, golden: Golden) -> None:
    for steps in golden.values["marks"]:
        difference = (ours.latents_after(steps) - golden.arrays[f"latents_after_{steps}"]).abs().max().item()
        assert difference <= 1e-5, f"after {steps} steps"


def test_latents_agree_within_1e_5_after_every_marked_step(golden: Golden, ours: Run):
    check_latents(ours, golden)


@pytest.mark.parametrize("max_parallel", CHUNKS)
def test_latents_agree_within_1e_5_in_chunks_of_any_size(golden: Golden, max_parallel: int):
    check_latents(run(golden, max_parallel=max_parallel), golden)


def test_first_gradient_agrees(golden: Golden):
    """Read off one step: with betas (0, 0), Adam moves by -lr g / (|g| + eps), which is -g for a huge lr = eps."""
    eps = 1e12
    plain = dataclasses.replace(
        golden, settings=golden.settings.replace(iterations=1, betas=(0.0, 0.0), learning_rate=eps, eps=eps)
    )
    start = golden.arrays["latents_init"].double()
    gradient = start - run(plain, dtype=torch.float64).latents
    recorded = 80 / golden.values["scale_factor"] * golden.arrays["grad_first_step_wrt_80u"]
    scale = recorded.abs().max().item()
    assert (gradient - recorded).abs().max().item() <= 1e-5 * scale


def test_generated_images_agree_at_the_start_of_every_marked_step(golden: Golden, ours: Run):
    for step in golden.values["marks"]:
        difference = (ours.states[step - 1].generated - golden.arrays[f"generated_at_{step}"]).abs().max().item()
        assert difference <= 1e-5, f"at the start of step {step}"


def test_loss_agrees_at_every_step(golden: Golden, ours: Run):
    """To 1e-6 of the sum of its parts' sizes: the loss itself passes through zero."""
    values, arrays = golden.values, golden.arrays
    parts = (
        arrays["l1_sum"]
        + values["ssim_weight"] * arrays["ssim_sum"]
        + values["K"] * values["latent_weight_author_units"] * arrays["latent_sum"]
    )
    loss = values["K"] * ours.history.total.double().sum(dim=1)
    difference = (loss - arrays["loss"] / values["scale_factor"]).abs()
    assert (difference <= 1e-6 * parts).all()


@pytest.mark.parametrize("term", ["l1", "ssim", "latent"])
def test_sum_of_each_term_agrees_at_every_step(golden: Golden, ours: Run, term: str):
    factor = 80**2 if term == "latent" else golden.values["K"]
    sums = factor * getattr(ours.history, term).double().sum(dim=1)
    torch.testing.assert_close(sums, golden.arrays[f"{term}_sum"], rtol=1e-5, atol=0)


def test_history_has_one_entry_per_step_and_image(golden: Golden, ours: Run):
    expected = (golden.values["iterations"], golden.values["B"])
    for field in dataclasses.fields(ours.history):
        assert getattr(ours.history, field.name).shape == expected, field.name


@pytest.fixture(scope="module")
def ours64(golden: Golden) -> Run:
    return run(golden, dtype=torch.float64)


def test_float64_run_stays_within_1e_5_of_the_recording(golden: Golden, ours64: Run):
    assert ours64.latents.dtype == torch.float64
    check_latents(ours64, golden)


def plain_loop(golden: Golden) -> tuple[Tensor, list[float]]:
    """Algorithm 1 as it stands in the paper: no chunks, no shared moments, no pure functions; all in float64.

    Returns the last latents and K L, summed over the images, before every step.
    """
    settings, n_latents = golden.settings, golden.values["K"]
    images = golden.arrays["images"].double()[:, None]
    latents = golden.arrays["latents_init"].double().requires_grad_()
    first, second = torch.zeros_like(latents), torch.zeros_like(latents)
    losses = []
    for step in range(1, settings.iterations + 1):
        generated = golden.generate(latents.flatten(0, 1)).view_as(latents)
        l1 = (generated - (2 * images - 1)).abs().sum(dim=(1, 2, 3, 4))
        ssim = ssim_map((generated + 1) / 2, images).sum(dim=(1, 2, 3, 4))
        mean = sum(latents.unbind(1)) / n_latents
        std = (sum((latent - mean) ** 2 for latent in latents.unbind(1)) / (n_latents - 1)).sqrt()
        moments = (mean**2).sum(dim=(1, 2, 3)) + ((std - 1) ** 2).sum(dim=(1, 2, 3))
        loss = (l1 - settings.ssim_weight * ssim + n_latents * settings.latent_weight * moments).sum()
        losses.append(loss.item())
        loss.backward()
        gradient, latents.grad = latents.grad, None
        beta1, beta2 = settings.betas
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        with torch.no_grad():
            moved = (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + settings.eps)
            latents -= settings.learning_rate * moved
    return latents.detach(), losses


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """The SSIM map of images [..., H, W] in [0, 1], zeros outside, with one two-dimensional Gaussian window."""
    offsets = torch.arange(11) - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))  # float32, as pytorch-msssim has it
    window = (window / window.sum()).double()
    kernel = (window[:, None] * window[None, :])[None, None]

    def local_mean(x: Tensor) -> Tensor:
        return F.conv2d(x.reshape(-1, 1, *x.shape[-2:]), kernel, padding=5).view(x.shape)

    b = b.expand_as(a)
    mean_a, mean_b = local_mean(a), local_mean(b)
    var_a, var_b = local_mean(a * a) - mean_a**2, local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return luminance * (2 * covariance + 0.03**2) / (var_a + var_b + 0.03**2)


def test_float64_run_is_the_plain_loop_written_from_the_formulas(golden: Golden, ours64: Run):
    latents, losses = plain_loop(golden)
    torch.testing.assert_close(ours64.latents, latents, rtol=0, atol=1e-9)
    ours = golden.values["K"] * ours64.history.total.sum(dim=1)
    torch.testing.assert_close(ours, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-9)
