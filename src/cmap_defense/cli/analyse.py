"""``cmap-defense analyse``: how far attacked, generated and purified images lie from clean ones (Fig. 1)."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.options import data_of, model_of, subset_of
from cmap_defense.cli.output import print_json, print_table, using_threads
from cmap_defense.cli.progress import Progress
from cmap_defense.data.selection import SelectedImages, labelled_data
from cmap_defense.detection import EPS, DeepKernelSettings, Detection, deep_kernel, detect, vp_sigmas
from cmap_defense.errors import MissingExtraError
from cmap_defense.modules import device_of

__all__ = ["run_analyse"]

GROUP = 64
"""Images at a time."""

CALLED = {
    "adversarial": "adversarial images",
    "generated": "generated images",
    "noise": "noisy images (the attack's perturbations with random signs)",
}


def run_analyse(
    *,
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
    """Carry out the command; the arguments are its options."""
    start = time.perf_counter()
    with using_threads(options["threads"]):
        model = model_of(options)
        count = options["count"]
        parts = _parts(options, model, [count, reference] + ([training] if kernel == "deep" else []))
        score = EPS(sigmas=vp_sigmas(levels), seed=seed)
        found = _measured(model, score, parts, eps=eps, steps=steps, purify=purify, seed=seed)
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
    data = labelled_data(data_of(options), model.image_shape[0])
    if len(data[0] if isinstance(data, tuple) else data) < sum(sizes):
        total = len(data[0] if isinstance(data, tuple) else data)
        raise click.UsageError(
            f"There are {total} images, but {' + '.join(map(str, sizes))} are wanted: give smaller numbers with -n, "
            "--reference" + (" and --training." if len(sizes) > 2 else ".")
        )
    found = SelectedImages.of(data, subset_of(options | {"count": sum(sizes)}, data))
    device = device_of(model)
    images, labels = found.images.to(device), found.labels.to(device)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def _measured(
    model: PurifiedClassifier,
    score: EPS,
    parts: list[tuple[Tensor, Tensor]],
    *,
    eps: float,
    steps: int,
    purify: bool,
    seed: int,
) -> Detection:
    (images, labels), (reference, _), *rest = parts
    total = 2 * math.ceil(len(images) / GROUP) * model.settings.iterations * purify
    with Progress(total, "analyse") as progress:
        kernel = None
        for training, classes in rest:
            progress.step("training the kernel")
            trained = DeepKernelSettings(seed=seed)
            kernel = deep_kernel(model, training, classes, eps=score, settings=trained, max_parallel=GROUP)
        return detect(
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
            on_step=progress.step,
        )


def _written(found: Detection, out: Path) -> tuple[list[Path], str | None]:
    """The files, and what is missing for the picture, if anything is."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"
    files = [_write(text.encode(), out / "detection.json")]
    try:
        picture = found.plot()
    except MissingExtraError as error:
        return files, str(error)
    return [*files, _write(picture, out / "detection.png")], None


def _write(content: bytes, path: Path) -> Path:
    """A file that appears under its name only when it is whole."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _show(found: Detection, model: PurifiedClassifier, kernel: str, seconds: float, files: list[Path]) -> None:
    settings = model.settings
    count = found.summary["clean"].count
    click.echo(
        f"{count} images of each kind, {found.references} references, T = {len(found.eps.sigmas)} noise levels, "
        f"{kernel} kernel."
    )
    click.echo(f"The largest change by the attack is {found.largest_change:.3g}; it was made on the bare classifier.")
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
        click.echo(f"- {called} can{'' if found.differs(name) else 'not'} be distinguished from clean ones")
    click.echo(
        f"- adversarial images are distinguished from noisy ones with AUROC {found.auroc('adversarial', 'noise')}"
    )
    click.echo(f"\n{seconds:.0f} s. {', '.join(map(str, files))}")
