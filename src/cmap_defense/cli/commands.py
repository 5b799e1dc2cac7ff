"""The commands, each with its options and the function that carries it out; without torch, as help must be quick."""

from __future__ import annotations

import dataclasses

import click

from cmap_defense.adaptation.config import AdaptationConfig
from cmap_defense.certification.settings import CertificationSettings
from cmap_defense.cli import options as of
from cmap_defense.cli.command import Group, command, in_group
from cmap_defense.cli.options import DATA, MODEL, OUTPUT, PURIFICATION, Choice, Numbers, Pair, PathType, options_of
from cmap_defense.threat import ThreatModel
from cmap_defense.training.config import TrainingConfig

ADVERSARIAL, ARCHITECTURE, CHECKPOINT = map(in_group, ("Adversarial training", "Architecture", "Checkpoint"))
CERTIFICATES, DISTANCE, NETWORK = map(in_group, ("Certificates", "Distance", "Network"))
FETCHING, OBJECTIVE, REPOSITORY, SAMPLES = map(in_group, ("Fetching", "Objective", "Repository", "Samples"))

EMBEDDED = {"backbone": ["fashion-mnist-ct"], "classifier": of.EMBEDDED, "data": of.EMBEDDED, "count": 64}
"""What ships with the package."""

NOT_ADAPTED = ("device", "compile", "channels_last", "hold_images", "weights")
"""Fields of a training that are no options of an adaptation."""

ADAPTATION, TRAINING = (
    [field.name for field in dataclasses.fields(config) if field.metadata.get("help") and field.name not in without]
    for config, without in ((AdaptationConfig, NOT_ADAPTED), (TrainingConfig, ("weights",)))
)

demo = command(
    "demo:run_demo",
    """Attack a small classifier, purify, and compare; under half a minute on two cores, with no network.

    Prints undefended and purified accuracy on clean images, on images that were attacked without knowledge of the
    defence, and on images that were attacked through it; and writes a sheet of images. With --purifier cmap it leaves
    the last attack out, takes minutes, and draws, where matplotlib is installed, the latents' mean and standard
    deviation over the iterations, with and without the latent constraint.
    """,
    DATA("--images", "Number of test images to purify.", type=click.IntRange(1, 256), default=64),
    of.pgd_options(0.05),
    of.purifier_option("cmap", "one-step", unset=of.DEFAULT_PURIFIER),
    of.purifier_set("level=0.4"),
    of.short_settings("the purifier's"),
    of.seed_option("Seed of the attack and of the purification's noise."),
    of.threads,
    of.out_option("cmap-demo"),
    OUTPUT("--open", "show", "Open the pictures when they are written.", is_flag=True),
)

purify = command(
    "purify:run_purify",
    """Purify the image files IMAGES... and write PNG files of the same names into a folder.

    Of a folder all images are taken, those in folders below it too, and written into folders of the same names.

    There is no classifier here, so nothing is voted on: of the K purified versions of an image, the one that
    matches it best (eq. 10) is written.
    """,
    click.argument("images", nargs=-1, required=True, type=PathType()),
    of.backbone,
    MODEL(
        "--class-label",
        "Class of the images, as the backbone numbers it. A class-conditional backbone needs it.",
        least=0,
    ),
    of.purifier,
    of.resize,
    of.seed_option("Seed of the noise, the same for every image."),
    of.threads,
    of.device,
    OUTPUT("--all", "write_all", "Write all K versions, not only the one that matches best.", is_flag=True),
    of.out_option(),
)

evaluate = command(
    "evaluate:run_evaluate",
    """Attack a defended classifier, re-evaluate it, check the attacks, report.

    Results go to OUT: one line per image, attack and seed, the adversarial images, report.json, report.md and
    report.html. Killed at any moment, the same command continues; with other options it is refused. Under torchrun
    (torchrun -m cmap_defense evaluate ...) all processes share the work.
    """,
    of.model,
    MODEL(
        "--baseline",
        "Another model for the table, made as the classifier is; it takes images in [0, 1]. May be repeated.",
        multiple=True,
        metavar="NAME=PATH[@WEIGHTS]",
    ),
    of.data,
    DATA(
        "--preset",
        "Take the paper's 500 random images, 3 runs and attacks where no other option says otherwise.",
        type=Choice(["paper"]),
    ),
    of.attacks,
    of.protocol,
    of.checks,
    of.dry_run,
    of.certified,
    of.out_option(),
)

report = command(
    "evaluate:run_report",
    """Write the report of an evaluation's FOLDER anew, from its report.json.""",
    click.argument("folder", type=PathType(exists=True, file_okay=False)),
    of.certified,
    name="report",
)

study = command(
    "evaluate:run_study",
    """Vary one thing, keep the rest: the studies of the paper.

    vote: with and without the vote of the latents (Tab. XI). ssim-weight (VII). latent-weight (VIII, Fig. 3). latents:
    K (IX). beta: of the disruption attack (X). surrogate: its noise level (V). eps: higher intensities (VI).
    trajectory: along the disruption attack and the purification after it (Fig. 4 and 5).

    Every variant is an evaluation in a folder of its own below OUT; study.json, study.md and study.svg compare them.
    Killed at any moment, the same command continues.
    """,
    click.argument("name", type=Choice(of.STUDIES)),
    of.cmap_model,
    of.data,
    of.attacks,
    of.protocol,
    of.out_option(),
    name="study",
)

compare = command(
    "evaluate:run_compare",
    """Compare purifiers: one classifier, the same images, the same attacks.

    Every purifier is an evaluation in a folder of its own below OUT; comparison.json, comparison.md and comparison.svg
    put them side by side. Killed at any moment, the same command continues. Compare at equal n_latents: a vote gets
    more robust as it grows.
    """,
    of.backbone,
    of.classifier,
    PURIFICATION(
        "-p",
        "--purifier",
        "purifiers",
        'Purifier to compare, in quotes with its settings: "diffpure t=75 n_latents=4", or "chain purifiers=(diffpure '
        't=60, cmap level=0.5)". May be repeated.',
        multiple=True,
        required=True,
        metavar='"NAME KEY=VALUE ..."',
    ),
    of.wrapper,
    of.data,
    of.attacks,
    of.protocol,
    of.dry_run,
    of.out_option(),
    name="compare",
    attacks="exact",
)

certify = command(
    "certify:run_certify",
    """Certify accuracy by denoised smoothing: an l2 radius for each image.

    Each image is denoised in one step and classified many times, each time with fresh noise. Results go to OUT: the
    counts, a table per denoiser and sigma (idx, label, predict, radius, correct, time; tab separated), certified.json
    and certified.svg. Killed at any moment, the same command continues; with a greater -n it adds images. Under
    torchrun all processes share the images.
    """,
    MODEL(
        "-b",
        "--backbone",
        "backbones",
        "Consistency model or denoiser before the classifier: a name, a folder or a Hub id. May be repeated.",
        multiple=True,
    ),
    MODEL("--undefended", "Certify the classifier without a denoiser too.", is_flag=True),
    of.classifier,
    of.data,
    CERTIFICATES(
        "--sigma",
        "Standard deviations of the noise, for images in [0, 1], with commas between them.",
        type=Numbers(float),
        default="0.25,0.5,1.0",
    ),
    options_of(CertificationSettings, "Certificates", short={"n": "--samples"}),
    of.threads,
    of.device,
    of.dry_run,
    of.out_option(),
)

detect = command(
    "detect:run_detect",
    """Measure how far from clean images attacked, generated and purified ones lie (Fig. 1 of the paper).

    The distance is the squared MMD between the expected perturbation scores (EPS) of one image and of clean reference
    images. Without options the command uses what ships with the package and needs no network. Prints a table, and
    writes detection.json and detection.svg.
    """,
    of.cmap_model,
    of.data,
    DISTANCE(
        "--reference",
        "Number of clean images to measure from, those that follow the measured ones.",
        least=2,
        default=128,
    ),
    DISTANCE("--levels", "Number of noise levels (T): the first of 1000.", type=click.IntRange(1, 1000), default=20),
    DISTANCE(
        "--kernel",
        "Kernel of the squared MMD: a Gaussian one, or a trained one.",
        type=Choice(["gaussian", "deep"]),
        default="gaussian",
    ),
    DISTANCE(
        "--training",
        "Number of images that --kernel deep is trained on, those that follow the references.",
        least=2,
        default=64,
    ),
    DISTANCE("--purify/--no-purify", "Measure purified images too, which takes most of the time.", default=True),
    of.pgd_options(0.05),
    of.seed_option("Seed of the attack and of all noise."),
    of.out_option("cmap-detection"),
    **EMBEDDED,
)

quality = command(
    "quality:run_quality",
    """Measure how good a backbone is, with what is on this machine.

    Its samples are compared with real images, by the Frechet distance in the classifier's features and, where its
    network is there, by FID. Clean images are purified and classified, and so are attacked ones; PGD with 20 steps
    attacks the undefended classifier, which does not know the defence. The cost is printed first. Writes quality.json,
    quality.md, samples.png and reconstructions.png.
    """,
    of.cmap_model,
    MODEL(
        "--other",
        "Another classifier to measure with, made as the first one is. May be repeated.",
        multiple=True,
        metavar="NAME=PATH[@WEIGHTS]",
    ),
    of.data,
    SAMPLES("--samples", "Number of generated images that are compared with real ones.", least=2, default=5000),
    SAMPLES(
        "--features",
        "Module of the classifier whose input is compared.",
        metavar="MODULE",
        unset="the last nn.Linear",
    ),
    of.pgd_options(),
    of.seed_option("Seed of all noise."),
    OUTPUT("--record", "Write the figures into the backbone's record too.", is_flag=True),
    of.out_option(),
)

train = command(
    "train:run_train",
    """Train a backbone and write it to OUT/backbone: a consistency model, or a denoiser (--objective edm).

    Killed, interrupted or stopped by --minutes, the same command continues from the last checkpoint, and ends with the
    same weights. Under torchrun (torchrun -m cmap_defense train ...) all processes share each batch. OUT/samples.png
    shows 64 samples, always from the same noise; OUT/loss.png, where matplotlib is installed, the loss.

    With --minutes and without --images, the training is as long as fits into the minutes; OUT/plan.json keeps that
    length for the calls that continue it.
    """,
    of.data_option(
        f"Data set: a name ({', '.join(of.DATASETS)}), an .npz file with images (uint8 [N, H, W, C]), or a folder of "
        "images."
    ),
    DATA(
        "--hold-out",
        "Number of images to leave out: the last ones, or of a folder a draw over all classes.",
        least=0,
        default=0,
    ),
    of.size,
    DATA(
        "--image-channels",
        "Channels in which the images of a folder are read: 3, or 1 for grey.",
        least=1,
        unset="those of --from, or 3",
    ),
    DATA("--class-conditional", "Condition the network on the labels of the data.", is_flag=True),
    OBJECTIVE("--objective", "Objective to minimise.", type=Choice(of.OBJECTIVES), default="ect"),
    OBJECTIVE(
        "--objective-set",
        "Set one of the objective's settings to this value. May be repeated.",
        type=Pair(),
        multiple=True,
    ),
    OBJECTIVE(
        "--halvings", "Number of times that the gap between noise levels is halved, for the objective ect.", least=0
    ),
    OBJECTIVE("--teacher", "Denoiser to distil, for the objective cd: a folder, a name or a Hub id."),
    NETWORK("--network", "Network to train.", type=Choice(of.NETWORKS), default="compact"),
    NETWORK(
        "--preset",
        "Configuration of the compact network that the following options change.",
        type=Choice(of.NETWORK_PRESETS),
        unset="small",
    ),
    NETWORK(
        "--channels",
        "Width of each level of the compact network, finest first, with commas between them.",
        type=Numbers(int),
        unset="the preset's",
    ),
    NETWORK(
        "--attention",
        'Levels of the compact network with attention, 0 being the finest, or "none".',
        type=Numbers(int),
        unset="the preset's",
    ),
    NETWORK("--blocks", "Number of residual blocks per level of the compact network.", least=1, unset="the preset's"),
    NETWORK(
        "--patch",
        "Side of the patches that the compact network turns into channels.",
        least=1,
        unset="the preset's",
    ),
    NETWORK(
        "--set",
        "network_set",
        "Set one of the network's settings to this value. May be repeated.",
        type=Pair(),
        multiple=True,
    ),
    NETWORK("--from", "start_from", "Backbone whose weights the training starts from: a folder, a name or a Hub id."),
    options_of(TrainingConfig, "Training", *TRAINING),
    of.threads,
    of.record_options("my-backbone"),
    options_of(TrainingConfig, "Training", "weights"),
    of.out_option(),
)

adapt = command(
    "adapt:run_adapt",
    """Fine-tune a copy of a classifier on purified training images; with --adversarial on attacked ones.

    It is trained on one purified version of each image, unless --purifier-set n_latents=K says otherwise; the
    purifiers of a chain keep their own numbers.

    OUT/classifier.safetensors is for --weights of the other commands. Killed, interrupted or stopped by --minutes, the
    same command continues from the last checkpoint, and ends with the same weights. Under torchrun
    (torchrun -m cmap_defense adapt ...) all processes share each batch.
    """,
    of.backbone,
    of.classifier,
    of.purifier_option(default="one-step"),
    of.purifier_set(of.CHAINED.replace("t=75", "level=0.8")),
    of.resize,
    of.data_option(
        f"Labelled data set: a name ({', '.join(of.DATASETS)}), an .npz file, or a folder of class folders."
    ),
    DATA(
        "--hold-out",
        "Number of images to choose the best weights by: the last ones, or of a folder a draw over all classes.",
        least=0,
        default=0,
    ),
    of.size,
    DATA(
        "--image-channels",
        "Channels in which the images of a folder are read: 3, or 1 for grey.",
        least=1,
        unset="those of the backbone",
    ),
    ADVERSARIAL("--adversarial", "Attack the training images through the exact gradient.", is_flag=True),
    options_of(ThreatModel, "Adversarial training"),
    options_of(AdaptationConfig, "Training", *ADAPTATION),
    of.threads,
    of.device,
    of.out_option(),
)

BACKBONE = click.argument("backbone")

backbones = Group(
    "backbones",
    help="List, inspect, fetch, convert, verify and share backbones.",
    commands=[
        command("backbones:list_backbones", "List the backbones that have a name. Nothing is fetched.", name="list"),
        command(
            "backbones:show_backbone",
            "Show what is known of BACKBONE: a name (nothing is fetched), a folder or a Hub id.",
            BACKBONE,
            name="info",
        ),
        command(
            "backbones:pull_backbone",
            "Fetch BACKBONE, a name or a Hub id, so that it loads without a network afterwards.",
            BACKBONE,
            FETCHING("--force", "Fetch it again even where it is on this machine already.", is_flag=True),
            name="pull",
        ),
        command(
            "backbones:convert_checkpoint",
            """Convert CHECKPOINT into a backbone folder OUT, which load_backbone(OUT) loads.

            jcm: the JAX checkpoints of the CIFAR-10 consistency models (flax msgpack). openai: the .pt files of the
            ImageNet-64 and LSUN-256 models, which become a pipeline of the diffusers library.
            """,
            click.argument("checkpoint", type=PathType(exists=True, dir_okay=False)),
            click.argument("out", type=PathType(file_okay=False), callback=of.writable_folder),
            CHECKPOINT(
                "--from", "format_", "Format of the file CHECKPOINT.", type=Choice(["jcm", "openai"]), required=True
            ),
            CHECKPOINT(
                "--kind",
                "Kind of model that the checkpoint holds.",
                type=Choice(["consistency", "denoiser"]),
                default="consistency",
            ),
            CHECKPOINT(
                "--params", "Entry of a jcm checkpoint that holds the weights to convert.", default="params_ema"
            ),
            ARCHITECTURE(
                "--config",
                "Setting of a jcm checkpoint's architecture that differs from CIFAR-10's, such as nf=64 or "
                "ch_mult=1,2. May be repeated.",
                type=Pair(),
                multiple=True,
            ),
            ARCHITECTURE(
                "--image-size",
                "Height and width of the images, for an openai checkpoint.",
                least=1,
                unset="from the file's name",
            ),
            ARCHITECTURE(
                "--head-channels", "Channels of one attention head, for an openai checkpoint.", least=1, default=64
            ),
            of.record_options(None, "OUT's name"),
            options_of(TrainingConfig, "Record and weights", "weights"),
            name="convert",
        ),
        command(
            "backbones:verify_and_show",
            "Load BACKBONE, check it, note its commit and checksum: other files are refused under its name from then "
            "on.",
            BACKBONE,
            name="verify",
        ),
        command(
            "backbones:push_folder",
            "Upload FOLDER with a model card to the Hub's repository REPO_ID (organisation/name).",
            click.argument("folder", type=PathType(exists=True, file_okay=False)),
            click.argument("repo_id"),
            REPOSITORY("--private", "Make the repository private where it does not exist yet.", is_flag=True),
            REPOSITORY("--message", "Message of the commit.", default="Add the backbone"),
            name="push",
        ),
    ],
)

ALL = (demo, purify, evaluate, report, study, compare, certify, detect, quality, train, adapt, backbones)
