"""``cmap-defense train``: a backbone from a data set."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from cmap_defense.backbones.unet import CompactUNetConfig
from cmap_defense.cli.figures import sample_sheet
from cmap_defense.cli.output import checked_device, json_option, out_option, print_json, progress
from cmap_defense.data.files import write_image
from cmap_defense.data.sources import DATASETS, load_dataset
from cmap_defense.errors import DataError
from cmap_defense.training.loop import TrainState
from cmap_defense.training.objectives import ECTSettings
from cmap_defense.training.run import train_backbone
from cmap_defense.training.settings import TrainSettings

__all__ = ["train"]

_LOOP, _ECT = TrainSettings(), ECTSettings()


class _Integers(click.ParamType):
    """Comma-separated positive integers."""

    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if value in ("", "none"):
            return ()
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a comma-separated list of integers.", param, ctx)


@click.command()
@click.option(
    "--data", required=True, help=f"A name ({', '.join(DATASETS)}) or an .npz file with images (uint8 [N, H, W, C])."
)
@click.option("--hold-out", type=click.IntRange(0), default=0, show_default=True, help="Last images to leave out.")
@click.option("--name", default="my-backbone", show_default=True, help="Name in the record.")
@click.option("--description", default="", help="What it is, in the record.")
@click.option("--licence", default="", help="Licence of the weights, in the record.")
@click.option(
    "--images",
    type=click.IntRange(1),
    default=_LOOP.images,
    show_default=True,
    help="Images to train on, with repetition.",
)
@click.option("--batch-size", type=click.IntRange(1), default=_LOOP.batch_size, show_default=True)
@click.option("--learning-rate", type=float, default=_LOOP.learning_rate, show_default=True)
@click.option(
    "--ema-half-life", type=click.IntRange(1), default=_LOOP.ema_half_life, show_default=True, help="In images."
)
@click.option("--flip/--no-flip", default=_LOOP.flip, show_default=True, help="Mirror each image with probability 1/2.")
@click.option(
    "--halvings", type=click.IntRange(0), default=_ECT.halvings, show_default=True, help="Of the noise levels' gap."
)
@click.option(
    "--channels", type=_Integers(), default="32,64", show_default=True, help="Width of each level, finest first."
)
@click.option(
    "--attention",
    type=_Integers(),
    default="1",
    show_default=True,
    help="Levels with attention, 0 being the finest, or none.",
)
@click.option("--blocks", type=click.IntRange(1), default=2, show_default=True, help="Residual blocks per level.")
@click.option("--patch", type=click.IntRange(1), default=2, show_default=True, help="Space-to-depth patch.")
@click.option("--precision", type=click.Choice(["bfloat16", "float32"]), default=_LOOP.precision, show_default=True)
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision of the file.",
)
@click.option(
    "--checkpoint-every", type=click.IntRange(1), default=_LOOP.checkpoint_every, show_default=True, help="In images."
)
@click.option("--compile", "compile_network", is_flag=True, help="Run the network through torch.compile.")
@click.option("--device", default="cpu", show_default=True, help="Where to train, such as cuda.")
@click.option("--seed", type=click.IntRange(0), default=_LOOP.seed, show_default=True)
@out_option()
@json_option
def train(
    data: str,
    hold_out: int,
    name: str,
    description: str,
    licence: str,
    halvings: int,
    channels: tuple[int, ...],
    attention: tuple[int, ...],
    blocks: int,
    patch: int,
    weights: str,
    compile_network: bool,
    device: str,
    out: Path,
    as_json: bool,
    **loop: object,
) -> None:
    """Train a backbone by consistency training (ECT) and write it to OUT/backbone.

    Killed or interrupted, the same command continues where the last checkpoint was, and ends with the same weights.
    OUT/samples.png shows 64 samples, always from the same noise.
    """
    where = str(checked_device(device))
    unknown = [level for level in attention if level not in range(len(channels))]
    if unknown:
        raise click.BadParameter(f"there is no level {unknown[0]} of {len(channels)}.", param_hint="--attention")
    images = load_dataset(data).images
    if len(images) == 0:
        raise DataError(f"{data} holds no images.")
    if hold_out >= len(images):
        raise DataError(f"--hold-out {hold_out} leaves nothing of the {len(images)} images.")
    images = images[: len(images) - hold_out]
    _, image_channels, height, width = images.shape
    network = CompactUNetConfig(
        image_shape=(image_channels, height, width),
        patch=patch,
        channels=channels,
        blocks=blocks,
        attention=tuple(level in attention for level in range(len(channels))),
    )
    settings = TrainSettings.from_dict(loop)
    bar = progress(settings.steps, "training")

    def on_step(state: TrainState) -> None:
        bar.update(state.step - bar.n)
        bar.set_postfix(loss=f"{state.loss:.3f}", refresh=False)

    def on_samples(samples: Tensor) -> None:
        write_image(sample_sheet(samples), out / "samples.png")

    with bar:
        train_backbone(
            images,
            out,
            network=network,
            objective=ECTSettings(halvings=halvings),
            settings=settings,
            described={
                "name": name,
                "description": description,
                "licence": licence,
                "paper": "arXiv 2406.14548 (training), arXiv 2303.01469 (consistency models)",
                "training": {"command": _command(), "data": data, "hold_out": hold_out, "compile": compile_network},
            },
            device=where,
            compile_network=compile_network,
            weights_dtype=getattr(torch, weights),
            on_step=on_step,
            on_samples=on_samples,
        )
    written = {"backbone": str(out / "backbone"), "samples": str(out / "samples.png"), "images": settings.images}
    if as_json:
        print_json(written)
    else:
        click.echo(f"Backbone: {written['backbone']}\nSamples: {written['samples']}")


def _command() -> str:
    """The command line of this training in full, without where it runs and writes."""
    context = click.get_current_context()
    words = ["cmap-defense train"]
    for option in context.command.params:
        value = context.params[option.name or ""]
        if option.name in ("out", "as_json", "device") or value is None or value == "":
            continue
        if value is False:
            words += option.secondary_opts[:1]
            continue
        words.append(option.opts[0])
        if value is not True:
            text = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            words.append(shlex.quote(text))
    return " ".join(words)
