"""``cmap-defense train``, ``adapt``, ``quality`` and ``backbones``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from cmap_defense.adaptation.config import AdaptationConfig
from cmap_defense.cli.command import Command, Group, in_group
from cmap_defense.cli.options import (
    DATA,
    DATASETS,
    MODEL,
    OUTPUT,
    Choice,
    Numbers,
    Pair,
    PathType,
    backbone_option,
    classifier_options,
    data_options,
    device_option,
    json_option,
    model_options,
    options_of,
    out_option,
    purifier_choice,
    record_options,
    resize_option,
    seed_option,
    threads_option,
    writable_folder,
)
from cmap_defense.threat import ThreatModel
from cmap_defense.training.config import TrainingConfig

NETWORKS = ("compact", "ncsnpp", "imagenet64")
OBJECTIVES = ("edm", "ct", "ict", "ect", "cd")
PRESETS = ("small", "cifar10")

OBJECTIVE = in_group("Objective")
NETWORK = in_group("Network")

ADAPTATION = [field.name for field in dataclasses.fields(AdaptationConfig) if field.metadata.get("help")]
FIELDS = [field.name for field in dataclasses.fields(TrainingConfig) if field.metadata.get("help")]


@click.command(cls=Command)
@DATA(
    "-d",
    "--data",
    required=True,
    help=f"Data set: a name ({', '.join(DATASETS)}), an .npz file with images (uint8 [N, H, W, C]), or a folder of "
    "images.",
)
@DATA(
    "--hold-out",
    type=click.IntRange(0),
    default=0,
    help="Number of images to leave out: the last ones, or of a folder a draw over all classes.",
)
@DATA("--size", type=click.IntRange(1), help="Resize and crop the images of a folder to this many pixels.")
@DATA(
    "--image-channels",
    type=click.IntRange(1),
    show_default="those of --from, or 3",
    help="Channels in which the images of a folder are read: 3, or 1 for grey.",
)
@DATA("--class-conditional", is_flag=True, help="Condition the network on the labels of the data.")
@OBJECTIVE("--objective", type=Choice(OBJECTIVES), default="ect", help="Objective to minimise.")
@OBJECTIVE(
    "--objective-set",
    type=Pair(),
    multiple=True,
    help="Set one of the objective's settings to this value. May be repeated.",
)
@OBJECTIVE(
    "--halvings",
    type=click.IntRange(0),
    help="Number of times that the gap between noise levels is halved, for the objective ect.",
)
@OBJECTIVE("--teacher", help="Denoiser to distil, for the objective cd: a folder, a name or a Hub id.")
@NETWORK("--network", type=Choice(NETWORKS), default="compact", help="Network to train.")
@NETWORK(
    "--preset",
    type=Choice(PRESETS),
    show_default="small",
    help="Configuration of the compact network that the following options change.",
)
@NETWORK(
    "--channels",
    type=Numbers(int),
    show_default="the preset's",
    help="Width of each level of the compact network, finest first, with commas between them.",
)
@NETWORK(
    "--attention",
    type=Numbers(int),
    show_default="the preset's",
    help='Levels of the compact network with attention, 0 being the finest, or "none".',
)
@NETWORK(
    "--blocks",
    type=click.IntRange(1),
    show_default="the preset's",
    help="Number of residual blocks per level of the compact network.",
)
@NETWORK(
    "--patch",
    type=click.IntRange(1),
    show_default="the preset's",
    help="Side of the patches that the compact network turns into channels.",
)
@NETWORK(
    "--set",
    "network_set",
    type=Pair(),
    multiple=True,
    help="Set one of the network's settings to this value. May be repeated.",
)
@NETWORK("--from", "start_from", help="Backbone whose weights the training starts from: a folder, a name or a Hub id.")
@options_of(TrainingConfig, "Training", *(name for name in FIELDS if name != "weights"))
@threads_option
@record_options("my-backbone")
@options_of(TrainingConfig, "Training", "weights")
@out_option()
@json_option
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a backbone and write it to OUT/backbone: a consistency model, or a denoiser (--objective edm).

    Killed, interrupted or stopped by --minutes, the same command continues from the last checkpoint, and ends with the
    same weights. Under torchrun (torchrun -m cmap_defense train ...) all processes share each batch. OUT/samples.png
    shows 64 samples, always from the same noise; OUT/loss.png, where matplotlib is installed, the loss.

    With --minutes and without --images, the training is as long as fits into the minutes; OUT/plan.json keeps that
    length for the calls that continue it.
    """
    from cmap_defense.cli.train import run_train

    run_train(context, options)


ADVERSARIAL = in_group("Adversarial training")

UNUSED = ("device", "compile", "channels_last", "hold_images", "weights")
"""Fields of a training that are no options of an adaptation."""


@click.command(cls=Command, context_settings={"default_map": {"purifier": "one-step"}, "show_default": True})
@backbone_option
@classifier_options
@purifier_choice
@resize_option
@DATA(
    "-d",
    "--data",
    required=True,
    help=f"Labelled data set: a name ({', '.join(DATASETS)}), an .npz file, or a folder of class folders.",
)
@DATA(
    "--hold-out",
    type=click.IntRange(0),
    default=0,
    help="Number of images to choose the best weights by: the last ones, or of a folder a draw over all classes.",
)
@DATA("--size", type=click.IntRange(1), help="Resize and crop the images of a folder to this many pixels.")
@DATA("--image-channels", type=click.IntRange(1), help="Channels in which the images of a folder are read.")
@ADVERSARIAL("--adversarial", is_flag=True, help="Attack the training images through the exact gradient.")
@options_of(ThreatModel, "Adversarial training")
@options_of(AdaptationConfig, "Training", *(name for name in ADAPTATION if name not in UNUSED))
@threads_option
@device_option
@out_option()
@json_option
def adapt(**options: Any) -> None:
    """Fine-tune a copy of a classifier on purified training images; with --adversarial on attacked ones.

    OUT/classifier.safetensors is for --weights of the other commands. Killed, interrupted or stopped by --minutes, the
    same command continues from the last checkpoint, and ends with the same weights. Under torchrun
    (torchrun -m cmap_defense adapt ...) all processes share each batch.
    """
    from cmap_defense.cli.adapt import run_adapt

    run_adapt(options)


SAMPLES = in_group("Samples")


@click.command(cls=Command)
@model_options
@MODEL(
    "--other",
    multiple=True,
    metavar="NAME=PATH[@WEIGHTS]",
    help="Another classifier to measure with, made as the first one is. May be repeated.",
)
@data_options
@SAMPLES(
    "--samples",
    type=click.IntRange(2),
    default=5000,
    help="Number of generated images that are compared with real ones.",
)
@SAMPLES(
    "--features",
    metavar="MODULE",
    show_default="the last nn.Linear",
    help="Module of the classifier whose input is compared.",
)
@options_of(ThreatModel, "PGD (linf) on the bare classifier", "eps")
@seed_option("Seed of all noise.")
@OUTPUT("--record", is_flag=True, help="Write the figures into the backbone's record too.")
@out_option()
@json_option
@click.pass_context
def quality(context: click.Context, **options: Any) -> None:
    """Measure how good a backbone is, with what is on this machine.

    Its samples are compared with real images, by the Frechet distance in the classifier's features and, where its
    network is there, by FID. Clean images are purified and classified, and so are attacked ones; PGD with 20 steps
    attacks the bare classifier, which does not know the defence. The cost is printed first. Writes quality.json,
    quality.md, samples.png and reconstructions.png.
    """
    from cmap_defense.cli.quality import run_quality

    run_quality(context, options)


FETCHING = in_group("Fetching")
CHECKPOINT = in_group("Checkpoint")
ARCHITECTURE = in_group("Architecture")
REPOSITORY = in_group("Repository")


@click.group(cls=Group)
def backbones() -> None:
    """List, inspect, fetch, convert, verify and share backbones."""


@backbones.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the backbones that have a name. Nothing is fetched."""
    from cmap_defense.cli.backbones import list_backbones

    list_backbones(as_json=as_json)


@backbones.command()
@click.argument("backbone")
@json_option
def info(backbone: str, as_json: bool) -> None:
    """Show what is known of BACKBONE: a name (nothing is fetched), a folder or a Hub id."""
    from cmap_defense.cli.backbones import show_backbone

    show_backbone(backbone, as_json=as_json)


@backbones.command()
@click.argument("backbone")
@FETCHING("--force", is_flag=True, help="Fetch it again even where it is on this machine already.")
@json_option
def pull(backbone: str, force: bool, as_json: bool) -> None:
    """Fetch BACKBONE, a name or a Hub id, so that it loads without a network afterwards."""
    from cmap_defense.cli.backbones import pull_backbone

    pull_backbone(backbone, force=force, as_json=as_json)


@backbones.command()
@click.argument("checkpoint", type=PathType(exists=True, dir_okay=False))
@click.argument("out", type=PathType(file_okay=False), callback=writable_folder)
@CHECKPOINT("--from", "format_", type=Choice(["jcm", "openai"]), required=True, help="Format of the file CHECKPOINT.")
@CHECKPOINT(
    "--kind",
    type=Choice(["consistency", "denoiser"]),
    default="consistency",
    help="Kind of model that the checkpoint holds.",
)
@CHECKPOINT("--params", default="params_ema", help="Entry of a jcm checkpoint that holds the weights to convert.")
@ARCHITECTURE(
    "--config",
    type=Pair(),
    multiple=True,
    help="Setting of a jcm checkpoint's architecture that differs from CIFAR-10's, such as nf=64 or ch_mult=1,2. "
    "May be repeated.",
)
@ARCHITECTURE(
    "--image-size",
    type=click.IntRange(1),
    show_default="from the file's name",
    help="Height and width of the images, for an openai checkpoint.",
)
@ARCHITECTURE(
    "--head-channels",
    type=click.IntRange(1),
    default=64,
    help="Channels of one attention head, for an openai checkpoint.",
)
@record_options(None, "OUT's name")
@options_of(TrainingConfig, "Record and weights", "weights")
@json_option
def convert(**options: Any) -> None:
    """Convert CHECKPOINT into a backbone folder OUT, which load_backbone(OUT) loads.

    jcm: the JAX checkpoints of the CIFAR-10 consistency models (flax msgpack). openai: the .pt files of the ImageNet-64
    and LSUN-256 models, which become a pipeline of the diffusers library.
    """
    from cmap_defense.cli.backbones import convert_checkpoint

    convert_checkpoint(options)


@backbones.command()
@click.argument("backbone")
@json_option
def verify(backbone: str, as_json: bool) -> None:
    """Load BACKBONE, check it, note its commit and checksum: other files are refused under its name from then on."""
    from cmap_defense.cli.backbones import verify_and_show

    verify_and_show(backbone, as_json=as_json)


@backbones.command()
@click.argument("folder", type=PathType(exists=True, file_okay=False))
@click.argument("repo_id")
@REPOSITORY("--private", is_flag=True, help="Make the repository private where it does not exist yet.")
@REPOSITORY("--message", default="Add the backbone", help="Message of the commit.")
@json_option
def push(folder: Path, repo_id: str, private: bool, message: str, as_json: bool) -> None:
    """Upload FOLDER with a model card to the Hub's repository REPO_ID (organisation/name)."""
    from cmap_defense.cli.backbones import push_folder

    push_folder(folder, repo_id, private=private, message=message, as_json=as_json)
