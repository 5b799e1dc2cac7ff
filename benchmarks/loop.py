"""How much faster is this package's latent loop than the way the authors' release works?

``python benchmarks/loop.py`` times both from the same start latents, in float32, and prints the ratio of their times.
The reference below does what the release does: one image after the other, the weights collect gradients that nobody
uses, the SSIM of both images is computed from scratch, the classifier runs in every iteration, a ``torch.optim.Adam``
moves the latents. Its inefficiencies are then removed one after the other; each line of the table has one less than
the line above. The ratio of the same loop on all images together is printed besides, for those who batch already.
``--compile`` adds lines through torch.compile, and ``--preset fast`` sets the release's loop at N = 200 against a
preset of the backbone.

A ratio counts only when both loops do the same work: every float32 loop must end at the same objective (eq. 9, mean
over the images, evaluated the same way for all) within 0.1 %; otherwise the exit status is 1. The loops take turns, and
the ratios are medians over the repeats, so that a busy machine disturbs them little; on a very busy one,
``--clock cpu --threads 1`` counts processor time instead. The times themselves depend on the machine.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from pytorch_msssim import ssim
from torch import Tensor, nn

from cmap_defense import PurifiedClassifier
from cmap_defense.backbones import ConsistencyBackbone, load_backbone
from cmap_defense.cmap import CMAPSettings
from cmap_defense.common.rng import draw_latents
from cmap_defense.embedded import load_classifier, load_test_images

AGREEMENT = 1e-3
"""How far, relative to the reference, the final objectives of float32 loops may be apart."""

FASTEST = "ours, dtype auto and compiled"
"""The line with all that ``PurifiedClassifier`` has for speed."""

PAD = (5, 5, 5, 5)

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Loop = Callable[[Tensor, Tensor], Tensor]
"""Images [B, C, H, W] in [0, 1] and unit start latents [B, K, C, H, W] to the final latents."""


@dataclasses.dataclass(frozen=True)
class Inefficiencies:
    """What the release does without need."""

    image_by_image: bool = True
    weight_gradients: bool = True
    ssim_from_scratch: bool = True
    classify_always: bool = True


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the table; ``same_work`` when its objective must agree with the reference's."""

    name: str
    run: Loop
    same_work: bool = True


# --- the reference ----------------------------------------------------------------------------------------------------


def reference_loop(
    backbone: ConsistencyBackbone, classifier: nn.Module, settings: CMAPSettings, inefficiencies: Inefficiencies
) -> Loop:
    """The release's loop, with those of its inefficiencies that ``inefficiencies`` names."""

    def run(images: Tensor, latents: Tensor) -> Tensor:
        backbone.requires_grad_(inefficiencies.weight_gradients)
        parts = 1 if inefficiencies.image_by_image else len(images)
        pairs = zip(images.split(parts), latents.split(parts), strict=True)
        found = torch.cat([_optimise(backbone, classifier, settings, inefficiencies, x, u) for x, u in pairs])
        backbone.zero_grad()
        return found

    return run


def _optimise(
    backbone: ConsistencyBackbone,
    classifier: nn.Module,
    settings: CMAPSettings,
    inefficiencies: Inefficiencies,
    images: Tensor,
    start: Tensor,
) -> Tensor:
    n_images, n_latents = start.shape[:2]
    targets = images.repeat_interleave(n_latents, dim=0)
    similarity = _ssim_from_scratch if inefficiencies.ssim_from_scratch else _KeptSSIM(targets)
    latents = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([latents], lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)
    for iteration in range(settings.iterations):
        optimiser.zero_grad()
        backbone.zero_grad()
        generated = backbone.generate(latents.flatten(0, 1))
        loss = n_latents * objective(generated, targets, latents, settings, similarity).sum()
        loss.backward()
        optimiser.step()
        if inefficiencies.classify_always or iteration == settings.iterations - 1:
            with torch.no_grad():
                logits = classifier((generated + 1) / 2)
    logits.argmax(dim=1).view(n_images, n_latents).mode(dim=1)
    return latents.detach()


def objective(
    generated: Tensor,
    targets: Tensor,
    latents: Tensor,
    settings: CMAPSettings,
    similarity: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """L (9) per image, [B]: ``generated`` [B K, C, H, W] in [-1, 1], ``targets`` alike in [0, 1]."""
    l1 = (generated - (2 * targets - 1)).abs().flatten(1).sum(dim=1)
    likeness = similarity((generated + 1) / 2, targets)
    perceptual = (l1 - settings.ssim_weight * likeness).view(latents.shape[:2]).mean(dim=1)
    mean, std = latents.mean(dim=1), latents.std(dim=1)
    distance = mean.square().flatten(1).sum(dim=1) + (std - 1).square().flatten(1).sum(dim=1)
    return perceptual + settings.latent_weight * distance


def _ssim_from_scratch(generated: Tensor, targets: Tensor) -> Tensor:
    """S of eq. 10, [M]."""
    mean = ssim(F.pad(generated, PAD), F.pad(targets, PAD), data_range=1.0, size_average=False)
    return mean * targets[0].numel()


class _KeptSSIM:
    """The same by the same convolutions, the local moments of the targets computed once."""

    def __init__(self, targets: Tensor) -> None:
        offsets = torch.arange(-5, 6, dtype=targets.dtype)
        window = torch.exp(-offsets.square() / (2 * 1.5**2))
        self.window = (window / window.sum()).repeat(targets.shape[1], 1, 1, 1)
        self.mean = self._filter(targets)
        self.variance = self._filter(targets.square()) - self.mean.square()

    def __call__(self, generated: Tensor, targets: Tensor) -> Tensor:
        mean = self._filter(generated)
        variance = self._filter(generated.square()) - mean.square()
        covariance = self._filter(generated * targets) - mean * self.mean
        luminance = (2 * mean * self.mean + 0.01**2) / (mean.square() + self.mean.square() + 0.01**2)
        structure = (2 * covariance + 0.03**2) / (variance + self.variance + 0.03**2)
        return (luminance * structure).flatten(1).sum(dim=1)

    def _filter(self, images: Tensor) -> Tensor:
        padded, channels = F.pad(images, PAD), images.shape[1]
        return F.conv2d(F.conv2d(padded, self.window.mT, groups=channels), self.window, groups=channels)


# --- ours -------------------------------------------------------------------------------------------------------------


def our_loop(backbone: ConsistencyBackbone, classifier: nn.Module, settings: CMAPSettings, **options: Any) -> Loop:
    """The whole defence as its users call it: checks, loop, generation from the final latents, classification, vote."""
    model = PurifiedClassifier(classifier, backbone=backbone, settings=settings, **options)

    def run(images: Tensor, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return model.purify(images, latents=latents).latents

    return run


# --- measuring --------------------------------------------------------------------------------------------------------


def entries(
    name: str, classifier: nn.Module, settings: CMAPSettings, *, image_by_image: bool, compiled: bool
) -> list[Entry]:
    """The lines of the table, the reference's first."""
    backbone = load_backbone(name).to(memory_format=torch.contiguous_format)  # as a plain loader leaves it
    left = Inefficiencies()
    found = [Entry("the release's loop, image by image", reference_loop(backbone, classifier, settings, left))]
    for title, removed in (
        ("- all images together", "image_by_image"),
        ("- weights without gradients", "weight_gradients"),
        ("- SSIM of the input kept", "ssim_from_scratch"),
        ("- classification once, at the end", "classify_always"),
    ):
        left = dataclasses.replace(left, **{removed: False})
        found.append(Entry(title, reference_loop(backbone, classifier, settings, left)))
    faster = load_backbone(name).to(memory_format=torch.channels_last)
    found.append(Entry("- weights laid out channels last", reference_loop(faster, classifier, settings, left)))
    found.append(Entry("ours", our_loop(load_backbone(name), classifier, settings)))
    if compiled:
        found.append(Entry("ours, compiled", our_loop(load_backbone(name), classifier, settings, compile=True)))
        fastest = our_loop(load_backbone(name), classifier, settings, dtype="auto", compile=True)
        found.append(Entry(FASTEST, fastest, same_work=False))
    half = load_backbone(name, dtype=torch.bfloat16)
    found.append(Entry("ours, network in bfloat16", our_loop(half, classifier, settings), same_work=False))
    return found if image_by_image else found[1:]


def measure(
    lines: list[Entry], images: Tensor, latents: Tensor, repeats: int, clock: Callable[[], float]
) -> tuple[list[list[float]], list[Tensor]]:
    """Seconds [line][repeat] and final latents [line]; the loops take turns, every second round in reverse."""
    seconds: list[list[float]] = [[] for _ in lines]
    final = [latents] * len(lines)
    numbered = list(enumerate(lines))
    for repeat in range(repeats):
        for i, line in numbered if repeat % 2 == 0 else numbered[::-1]:
            started = clock()
            final[i] = line.run(images, latents)
            seconds[i].append(clock() - started)
    return seconds, final


def against_preset(
    preset: str,
    name: str,
    classifier: nn.Module,
    settings: CMAPSettings,
    images: Tensor,
    latents: Tensor,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """The release's loop, image by image, and a preset of the backbone, which has a K and an N of its own."""
    backbone = load_backbone(name).to(memory_format=torch.contiguous_format)
    model = PurifiedClassifier(classifier, name, preset=preset).eval()

    @torch.no_grad()
    def predict(images: Tensor, latents: Tensor) -> Tensor:
        return model(images, seeds=torch.arange(len(images))).argmax(dim=1)

    both = [
        Entry("the release's loop", reference_loop(backbone, classifier, settings, Inefficiencies())),
        Entry(preset, predict, same_work=False),
    ]
    predict(images, latents)  # the first call is slow
    (release, ours), (found, labels) = measure(both, images, latents, repeats, clock)
    with torch.no_grad():
        logits = classifier((backbone.generate(found.flatten(0, 1)) + 1) / 2)
    voted = logits.argmax(dim=1).view(found.shape[:2]).mode(dim=1).values
    return {
        "preset": preset,
        "purifier": repr(model.purifier),
        "settings": settings.to_dict(),
        "seconds": [statistics.median(release), statistics.median(ours)],
        "ratio": statistics.median(r / t for r, t in zip(release, ours, strict=True)),
        "right": [(labels == load_test_images()[1][: len(images)]).sum().item() for labels in (voted, labels)],
    }


@torch.no_grad()
def mean_objective(backbone: ConsistencyBackbone, images: Tensor, latents: Tensor, settings: CMAPSettings) -> float:
    """L (9), mean over the images, by the reference's formulas in float32."""
    generated = backbone.generate(latents.flatten(0, 1))
    targets = images.repeat_interleave(latents.shape[1], dim=0)
    return objective(generated, targets, latents, settings, _ssim_from_scratch).mean().item()


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--backbone", "name", default="fashion-mnist-ct", show_default=True, help="name or folder; 28 x 28 grey")
@click.option("--images", "n_images", type=click.IntRange(1), default=4, show_default=True)
@click.option("--latents", "n_latents", type=click.IntRange(2), default=10, show_default=True, help="K")
@click.option("--iterations", type=click.IntRange(1), default=20, show_default=True, help="N")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--image-by-image/--no-image-by-image", default=True, help="have that line, or leave it out")
@click.option("--compile", "compiled", is_flag=True, help="have lines through torch.compile")
@click.option("--preset", help="set the release's loop against this preset of the backbone, such as fast")
@click.option(
    "--preset-iterations", type=click.IntRange(1), default=200, show_default=True, help="N of the release's loop there"
)
@click.option("--threads", type=click.IntRange(1), help="of torch; its own choice by default")
@click.option("--clock", type=click.Choice(sorted(CLOCKS)), default="wall", show_default=True)
@click.option("--json", "report", type=click.Path(path_type=Path, dir_okay=False), help="write the figures there")
def main(
    name: str,
    n_images: int,
    n_latents: int,
    iterations: int,
    repeats: int,
    image_by_image: bool,
    compiled: bool,
    preset: str | None,
    preset_iterations: int,
    threads: int | None,
    clock: str,
    report: Path | None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    reference = load_backbone(name)
    classifier = load_classifier().eval()
    images = load_test_images()[0][:n_images]
    if tuple(images.shape[1:]) != tuple(reference.image_shape):
        raise click.UsageError(
            f"The images are {list(images.shape[1:])}, but {name} has {list(reference.image_shape)}."
        )
    if len(images) < n_images:
        raise click.UsageError(f"There are only {len(images)} images.")
    if preset is not None:
        PurifiedClassifier(classifier, name, preset=preset)  # refuses one that is not there before anything is timed
    settings = CMAPSettings.from_dict(reference.default_settings or {})
    settings = settings.replace(n_latents=n_latents, iterations=iterations)
    latents = draw_latents(torch.arange(n_images), n_latents, reference.image_shape)

    lines = entries(name, classifier, settings, image_by_image=image_by_image, compiled=compiled)
    measure(lines, images, latents, 1, CLOCKS[clock])  # the first call of everything is slow
    seconds, final = measure(lines, images, latents, repeats, CLOCKS[clock])

    names = [line.name for line in lines]
    base, together = 0, names.index("- all images together")
    start = mean_objective(reference, images, latents, settings)
    values = [mean_objective(reference, images, u, settings) for u in final]
    rows = []
    for line, times, value in zip(lines, seconds, values, strict=True):
        difference = abs(value - values[base]) / abs(values[base])
        rows.append(
            {
                "loop": line.name,
                "seconds": statistics.median(times),
                "ratio": statistics.median(r / t for r, t in zip(seconds[base], times, strict=True)),
                "objective": value,
                "relative_difference": difference,
                "agrees": difference <= AGREEMENT if line.same_work else None,
            }
        )

    click.echo(
        f"{name}: {n_images} images, K = {n_latents}, N = {iterations}, {repeats} repeats, {clock} clock, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    click.echo(f"objective (eq. 9) at the start: {start:.4f}")
    click.echo(f"{'loop':<38}{'seconds':>9}{'ratio':>8}{'objective':>14}{'difference':>12}")
    for row in rows:
        click.echo(
            f"{row['loop']:<38}{row['seconds']:>9.2f}{row['ratio']:>7.2f}x{row['objective']:>14.4f}"
            f"{row['relative_difference']:>10.1e}{'  NOT THE SAME WORK' if row['agrees'] is False else ''}"
        )
    ours = next(row for row in rows if row["loop"] == "ours")
    index = names.index("ours")
    batch = statistics.median(r / t for r, t in zip(seconds[together], seconds[index], strict=True))
    click.echo(f"{names[base]} / ours, float32 in both: {ours['ratio']:.2f}")
    click.echo(f"the same with all images together / ours: {batch:.2f}")
    if compiled:
        index = names.index(FASTEST)
        fastest = statistics.median(r / t for r, t in zip(seconds[together], seconds[index], strict=True))
        click.echo(f"the same / {FASTEST}: {fastest:.2f}")
    beside = None
    if preset is not None:
        longer = settings.replace(iterations=preset_iterations)
        beside = against_preset(preset, name, classifier, longer, images, latents, repeats, CLOCKS[clock])
        click.echo(
            f"the release's loop, image by image, at K = {n_latents}, N = {preset_iterations} / preset {preset}: "
            f"{beside['ratio']:.2f} ({beside['right'][0]} and {beside['right'][1]} of {n_images} images right)"
        )
    if report is not None:
        setting = {"backbone": name, "images": n_images, "repeats": repeats, "clock": clock}
        setting["threads"] = torch.get_num_threads()
        figures = setting | {
            "settings": settings.to_dict(),
            "ratio": ours["ratio"],
            "ratio_same_batch": batch,
            "start": start,
            "rows": rows,
            "against_preset": beside,
        }
        report.write_text(json.dumps(figures, indent=2) + "\n")
    if any(row["agrees"] is False for row in rows):
        click.echo(f"A float32 loop ended more than {AGREEMENT:.1%} away from the reference's objective.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
