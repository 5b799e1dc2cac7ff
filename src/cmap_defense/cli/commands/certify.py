"""``cmap-defense certify``."""

from __future__ import annotations

from typing import Any

import click

from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.cli.command import Command, in_group
from cmap_defense.cli.options import (
    MODEL,
    RUNNING,
    Numbers,
    classifier_options,
    data_options,
    device_option,
    json_option,
    options_of,
    out_option,
    threads_option,
)

CERTIFICATES = in_group("Certificates")


@click.command(cls=Command)
@MODEL(
    "-b",
    "--backbone",
    "backbones",
    multiple=True,
    help="Consistency model or denoiser before the classifier: a name, a folder or a Hub id. May be repeated.",
)
@MODEL("--undefended", is_flag=True, help="Certify the classifier without a denoiser too.")
@classifier_options
@data_options
@CERTIFICATES(
    "--sigma",
    type=Numbers(float),
    default="0.25,0.5,1.0",
    help="Standard deviations of the noise, for images in [0, 1], with commas between them.",
)
@options_of(CertificationSettings, "Certificates", short={"n": "--samples"})
@threads_option
@device_option
@RUNNING("--dry-run", is_flag=True, help="Print what the certificates would cost, and stop.")
@out_option()
@json_option
def certify(**options: Any) -> None:
    """Certify accuracy by denoised smoothing: an l2 radius for each image.

    Each image is denoised in one step and classified many times, each time with fresh noise. Results go to OUT: the
    counts, a table per denoiser and sigma (idx, label, predict, radius, correct, time; tab separated), certified.json
    and certified.svg. Killed at any moment, the same command continues; with a greater -n it adds images. Under
    torchrun all processes share the images.
    """
    from cmap_defense.cli.certify import run_certify

    run_certify(options)
