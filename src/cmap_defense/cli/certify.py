"""``cmap-defense certify``."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cmap_defense.backbones.load import load_backbone
from cmap_defense.certification import CertificationResult, Cost, SmoothedClassifier, certify, expected_cost
from cmap_defense.certification.results import RADII
from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.certification.summary import MEANING, PUBLISHED, summary_of, table
from cmap_defense.cli import build
from cmap_defense.cli.output import duration, listed, plural
from cmap_defense.common.files import write_findings, write_text
from cmap_defense.common.progress import Progress
from cmap_defense.common.ranks import ranks
from cmap_defense.common.tables import table_lines
from cmap_defense.data.selection import SelectedImages, labelled_data
from cmap_defense.plots.comparison import certified_plot

UNDEFENDED = "undefended"
"""Name of the folder of what has no denoiser."""


def run_certify(options: dict[str, Any]) -> build.Printed:
    """Carry out the command."""
    settings, out = build.settings_of(CertificationSettings, options), options["out"]
    with ranks() as team:
        models = _models(options)
        shapes: list[Any] = [getattr(model.backbone, "image_shape", (None,)) for _, model in models.values()]
        data = labelled_data(build.data_of(options), shapes[0][0])
        chosen, device = SelectedImages.of(data, build.subset_of(options, data)), build.device_of(options)
        images = chosen.images.to(device)
        for _, model in models.values():
            model.check(images, chosen.positions)
            chosen.check_classes(model.count_classes(images, 1), "classifier")
        given = {**settings.to_dict(), "indices": chosen.positions}
        costs = team.by_first(
            lambda: [expected_cost(model, images, out=out / name, **given) for name, (_, model) in models.items()]
        )
        first, as_json = team.rank == 0, options["as_json"]
        copies, passes = sum(cost.copies for cost in costs), sum(cost.passes for cost in costs)
        seconds = sum(cost.seconds for cost in costs) / team.world
        if first and not as_json:
            click.echo(
                f"{plural(len(costs), 'smoothed classifier')}, {len(chosen)} images, {settings.n0:,} + "
                f"{settings.n:,} noisy copies of each.\n{copies:,} copies and {passes:,} network passes to do, about "
                f"{duration(seconds)} here."
                if copies
                else "All certificates are there."
            )
        if options["dry_run"]:
            return (dataclasses.asdict(Cost(copies, passes, seconds)), []) if first and as_json else None
        results: dict[str, tuple[str | None, CertificationResult]] = {}
        total, before = copies // team.world, 0
        with Progress(total, "certifying", shown=first) as shown:
            for (name, (denoiser, model)), cost in zip(models.items(), costs, strict=True):

                def progress(done: int, _: int, before: int = before, name: str = name) -> None:
                    shown.at(before + done, total, what=name)

                results[name] = denoiser, certify(model, images, out=out / name, progress=progress, **given)
                before += cost.copies // team.world
        printed = _written(results, chosen, options) if first else None
        team.wait()
    return printed


def _models(options: dict[str, Any]) -> dict[str, tuple[str | None, SmoothedClassifier]]:
    """The name of the denoiser and the smoothed classifier, for each of them and each sigma."""
    given = options["backbones"]
    longest = max((len(_parts(path)) for path in given), default=1)
    by_parts = (_by_last_parts(given, parts) for parts in range(1, longest + 1))
    named = {} if not given else next((names for names in by_parts if len(names) == len(given)), None)
    if UNDEFENDED in (named or ()):
        raise click.BadParameter(
            f"a folder called {UNDEFENDED!r} is taken for none: rename it.", param_hint="--backbone"
        )
    if named is None:
        raise click.BadParameter("the same backbone is given twice: give it once.", param_hint="--backbone")
    if not named and not options["undefended"]:
        raise click.UsageError("There is nothing to certify: give --backbone NAME, --undefended, or both.")
    if not options["sigma"]:
        raise click.BadParameter("give one number at least, such as 0.25.", param_hint="--sigma")
    normalize, classifier, device = build.normalize_of(options), build.classifier_of(options), build.device_of(options)
    backbones: dict[str | None, Any] = {name: load_backbone(source).to(device) for name, source in named.items()}
    if options["undefended"]:
        backbones[None] = None
    with build.usage_errors():
        return {
            f"{UNDEFENDED if name is None else name}-{sigma:g}": (
                name,
                SmoothedClassifier(classifier, backbone, sigma, normalize=normalize),
            )
            for name, backbone in backbones.items()
            for sigma in dict.fromkeys(options["sigma"])
        }


def _by_last_parts(paths: Sequence[str], parts: int) -> dict[str, str]:
    """Names or folders by so many of their last parts, in one word."""
    return {"-".join(_parts(path)[-parts:]): path for path in paths}


def _parts(path: str) -> list[str]:
    """Of a name, or of a folder's whole path."""
    whole = Path(os.path.abspath(path)) if Path(path).is_dir() else Path(path)
    return [part for part in whole.parts if part != whole.anchor]


def _written(
    results: Mapping[str, tuple[str | None, CertificationResult]], chosen: SelectedImages, options: dict[str, Any]
) -> build.Printed:
    """The files and what is printed."""
    out, labels = options["out"], chosen.labels
    published = PUBLISHED.get(options["data"], {})
    summary = {
        "data": {"name": options["data"], "count": len(chosen), "checksum": chosen.checksum()},
        "certificates": summary_of(results, labels),
        "published": published,
    }
    for name, (_, result) in results.items():
        write_text(out / f"{name}.tsv", result.to_tsv(labels))
    curves = {
        (denoiser or "no denoiser", result.sigma): result.radius[result.prediction == labels].tolist()
        for denoiser, result in results.values()
    }
    points = {name: dict(zip(RADII[1:], [v / 100 for v in values], strict=True)) for name, values in published.items()}
    about = f"{len(chosen)} images of {options['data']}"
    drawn = functools.partial(certified_plot, curves, len(chosen), about, points)
    files, lacking = write_findings(out, "certified", summary, None, drawn, "certified.svg")
    files += [out / f"{name}.tsv" for name in results]
    values = {**summary, "files": [str(file) for file in files], "lacking": lacking}
    if options["as_json"]:
        return values, []
    head = f"\nCertified accuracy in % at l2 radius r, with 95 % intervals; {len(chosen)} images:\n"
    names = listed(files[:-1], lacking, "certified.svg")
    return values, [head, *table_lines(table(summary)), f"\n{MEANING}\n\n{names} and {files[-1]}"]
