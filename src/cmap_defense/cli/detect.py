"""``cmap-defense detect``: how far attacked, generated and purified images lie from clean ones (Fig. 1)."""

from __future__ import annotations

import time
from typing import Any

import click
from torch import Tensor

from cmap_defense.attacks import PGD, Attack
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.cli.build import Printed, cmap_model_of, data_of, refuse, subset_of, threat_of
from cmap_defense.cli.output import listed
from cmap_defense.common.files import write_findings
from cmap_defense.common.modules import device_of
from cmap_defense.common.tables import table_lines
from cmap_defense.data.selection import SelectedImages, labelled_data
from cmap_defense.detection import EPS, DeepKernelSettings, Detection, deep_kernel, detect, vp_sigmas

GROUP = 64
"""Images at a time."""

KINDS = {
    "adversarial": "adversarial images",
    "generated": "generated images",
    "noise": "noisy images (the attack's perturbations with random signs)",
}


def run_detect(options: dict[str, Any]) -> Printed:
    """Carry out the command."""
    start, out = time.perf_counter(), options["out"]
    attack = PGD(threat_of(options), steps=options["steps"], seed=options["seed"])
    model = cmap_model_of(options)
    found = _measured(model, _parts(options, model), attack, options)
    files, lacking = write_findings(out, "detection", found.to_dict(), None, found.plot, "detection.svg")
    more = {"settings": model.settings.to_dict(), "seconds": time.perf_counter() - start}
    values = {**found.to_dict(), **more, "files": [str(path) for path in files], "lacking": lacking}
    names = listed(files, None if options["as_json"] else lacking, "detection.svg")
    return values, [*_lines(found, model, options["kernel"]), f"\n{more['seconds']:.0f} s. {names}"]


def _parts(options: dict[str, Any], model: PurifiedClassifier) -> list[tuple[Tensor, Tensor]]:
    """Images and labels to measure, of the references, and of the deep kernel's training: one after the other."""
    counts = {"-n": options["count"], "--reference": options["reference"]}
    if options["kernel"] == "deep":
        counts["--training"] = options["training"]
    else:
        refuse("training", "only --kernel deep is trained: leave the option out.")
    data = labelled_data(data_of(options), model.image_shape[0])
    sizes, total = list(counts.values()), len(data)
    if total < sum(sizes):
        raise click.UsageError(
            f"There are {total} images, but {' + '.join(map(str, sizes))} are wanted: give smaller numbers with "
            f"{', '.join(counts)}."
        )
    found = SelectedImages.of(data, subset_of(options | {"count": sum(sizes)}, data))
    device = device_of(model)
    images, labels = found.images.to(device), found.labels.to(device)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def _measured(
    model: PurifiedClassifier, parts: list[tuple[Tensor, Tensor]], attack: Attack, options: dict[str, Any]
) -> Detection:
    (images, labels), (reference, _), *rest = parts
    purify, seed = options["purify"], options["seed"]
    score = EPS(sigmas=vp_sigmas(options["levels"]), seed=seed)
    shared: dict[str, Any] = {"eps": score, "max_parallel": GROUP, "progress": True}
    kernel = None
    for training, classes in rest:
        kernel = deep_kernel(model, training, classes, settings=DeepKernelSettings(seed=seed), **shared)
    return detect(
        model, images, labels, reference=reference, attack=attack, kernel=kernel, purify=purify, seed=seed, **shared
    )


def _lines(found: Detection, model: PurifiedClassifier, kernel: str) -> list[str]:
    settings, count = model.settings, found.summary["clean"].count
    lines = [
        f"{count} images of each kind, {found.references} references, T = {len(found.eps.sigmas)} noise levels, "
        f"{kernel} kernel.",
        f"The largest change by the attack is {found.largest_change:.3g}; it was made on the undefended classifier.",
    ]
    if "purified_clean" in found.summary:
        lines.append(f"CMAP with {settings.summary}.")
    return [
        *lines,
        "[95 % intervals]\n",
        *table_lines(found.table()),
        "\nDistance: squared MMD from the references.",
        "Accuracy: of the undefended classifier; of the defended one where images are purified.\n",
        "The paper finds adversarial images far from clean ones, and generated ones with them. Here:",
        *(
            f"- {images} {'lie' if found.differs(kind) else 'do not lie'} further than clean ones"
            for kind, images in KINDS.items()
        ),
        f"- adversarial images are distinguished from noisy ones with AUROC {found.auroc('adversarial', 'noise')}",
    ]
