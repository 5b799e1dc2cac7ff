"""``cmap-defense analyse``: how far attacked, generated and purified images lie from clean ones (Fig. 1)."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.models import EMBEDDED
from cmap_defense.cli.options import Size, data_of, data_options, model_of, model_options, subset_of
from cmap_defense.cli.output import json_option, out_option, print_json, print_table, progress, steps_of
from cmap_defense.errors import MissingExtraError
from cmap_defense.evaluation.images import EvaluationImages, data_for
from cmap_defense.evaluation.observation import (
    EPS,
    DeepKernelSettings,
    Observation,
    deep_kernel,
    observe,
    vp_sigmas,
)
from cmap_defense.evaluation.observation.plot import draw_observation
from cmap_defense.modules import device_of

__all__ = ["analyse"]

DEFAULTS = {"backbone": "fashion-mnist-ct", "classifier": EMBEDDED, "data": EMBEDDED, "count": 64}
"""What ships with the package."""

GROUP = 64
"""Images at a time."""

CALLED = {
    "adversarial": "adversarial images",
    "generated": "generated images",
    "noise": "noisy images (the attack's perturbations with random signs)",
}


@click.command(context_settings={"default_map": DEFAULTS, "show_default": True})
@model_options
@data_options
@click.option("--reference", type=click.IntRange(2), default=128, help="Clean images to measure from; the next ones.")
@click.option("--levels", type=click.IntRange(1, 1000), default=20, help="T, the first of 1000 noise levels.")
@click.option("--kernel", type=click.Choice(["gaussian", "deep"]), default="gaussian")
@click.option("--training", type=click.IntRange(2), default=64, help="Of --kernel deep: images after the references.")
@click.option("--eps", type=Size(), default="0.05", help="Of the linf attack, in [0, 1].")
@click.option("--steps", type=click.IntRange(1), default=20, help="PGD steps.")
@click.option("--purify/--no-purify", default=True, help="Purified images too, which take most of the time.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of the attack and of all noise.")
@out_option("cmap-observation")
@json_option
def analyse(
    reference: int,
    levels: int,
    kernel: str,
    training: int,
    eps: float,
    steps: int,
    purify: bool,
    seed: int,
    out: Path,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how far from clean images attacked, generated and purified ones lie (Fig. 1 of the paper).

    Far is the squared MMD between the expected perturbation scores (EPS) of one image and of clean reference images.
    Without options it looks at what ships with the package and needs no network. The attack is PGD on the bare
    classifier. Prints a table, and writes observation.json and observation.png.
    """
    start = time.perf_counter()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(options["threads"] or threads)
        model = model_of(options)
        count = options["count"]
        parts = _parts(options, model, [count, reference] + ([training] if kernel == "deep" else []))
        score = EPS(sigmas=vp_sigmas(levels), seed=seed)
        found = _observed(model, score, parts, eps=eps, steps=steps, purify=purify, seed=seed)
    finally:
        torch.set_num_threads(threads)
    files, lacking = _written(found, out)
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                **found.to_dict(),
                "settings": model.settings.to_dict(),
                "seconds": seconds,
                "files": [str(path) for path in files],
                "lacking": lacking,
            }
        )
        return
    _show(found, model, kernel, seconds, files)
    if lacking is not None:
        click.echo(f"No picture: {lacking}", err=True)


def _parts(options: dict[str, Any], model: PurifiedClassifier, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Images and labels to observe, of the references, and of the deep kernel's training: one after the other."""
    data = data_for(model, data_of(options))
    if len(data[0] if isinstance(data, tuple) else data) < sum(sizes):
        total = len(data[0] if isinstance(data, tuple) else data)
        raise click.UsageError(
            f"There are {total} images, but {' + '.join(map(str, sizes))} are wanted: give smaller numbers with -n, "
            "--reference" + (" and --training." if len(sizes) > 2 else ".")
        )
    found = EvaluationImages.of(data, subset_of(options | {"count": sum(sizes)}))
    device = device_of(model)
    images, labels = found.images.to(device), found.labels.to(device)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def _observed(
    model: PurifiedClassifier,
    score: EPS,
    parts: list[tuple[Tensor, Tensor]],
    *,
    eps: float,
    steps: int,
    purify: bool,
    seed: int,
) -> Observation:
    (images, labels), (reference, _), *rest = parts
    bar = progress(2 * math.ceil(len(images) / GROUP) * model.settings.iterations * purify, "analyse")

    step = steps_of(bar)
    with bar:
        kernel = None
        for training, classes in rest:
            step("training the kernel")
            trained = DeepKernelSettings(seed=seed)
            kernel = deep_kernel(model, training, classes, eps=score, settings=trained, max_parallel=GROUP)
        return observe(
            model,
            images,
            labels,
            reference=reference,
            attack=PGD(ThreatModel(norm="linf", eps=eps), steps=steps, seed=seed),
            eps=score,
            kernel=kernel,
            purify=purify,
            seed=seed,
            max_parallel=GROUP,
            on_step=step,
        )


def _written(found: Observation, out: Path) -> tuple[list[Path], str | None]:
    """The files, and what is missing for the picture, if anything is."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    files = [_write(text.encode(), out / "observation.json")]
    try:
        picture = draw_observation(found)
    except MissingExtraError as error:
        return files, str(error)
    return [*files, _write(picture, out / "observation.png")], None


def _write(content: bytes, path: Path) -> Path:
    """A file that appears under its name only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _show(found: Observation, model: PurifiedClassifier, kernel: str, seconds: float, files: list[Path]) -> None:
    settings = model.settings
    count = found.summary["clean"].count
    click.echo(
        f"{count} images of each kind, {found.references} references, T = {len(found.eps.sigmas)} noise levels, "
        f"{kernel} kernel."
    )
    click.echo(f"The largest change by the attack is {found.shift:.3g}; it was made on the bare classifier.")
    if "purified_clean" in found.summary:
        click.echo(f"CMAP with K = {settings.n_latents} latents, N = {settings.iterations} iterations.")
    click.echo("[95 % intervals]\n")
    rows = [["kind", "median", "quartiles", "AUROC against clean", "accuracy"]]
    for name, summary in found.summary.items():
        low, high = summary.quartiles
        rows.append(
            [
                name.replace("_", " "),
                f"{summary.median:.3f}",
                f"{low:.3f} to {high:.3f}",
                "" if summary.auroc is None else str(summary.auroc),
                "" if summary.accuracy is None else str(summary.accuracy),
            ]
        )
    print_table(rows)
    click.echo(
        "\nDistance: squared MMD from the references. Accuracy: of the bare classifier; of the defended one where"
    )
    click.echo("images are purified.\n")
    click.echo("The paper finds adversarial images far from clean ones, and generated ones with them. Here:")
    for name, called in CALLED.items():
        click.echo(f"- {called} can{'' if found.apart(name) else 'not'} be told from clean ones")
    click.echo(f"- adversarial images are told from noisy ones with AUROC {found.told('adversarial', 'noise')}")
    click.echo(f"\n{seconds:.0f} s. {', '.join(map(str, files))}")
