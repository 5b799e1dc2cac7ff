"""Mistakes on the command line: a message with a remedy, a status, and no files."""

import shlex
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from cmap_defense.cli.command import _with_options
from cmap_defense.embedded import load_test_images

from .conftest import Run

MODEL = "-b fashion-mnist-ct -c embedded -d embedded"
PURIFY = "-b fashion-mnist-ct -o out"

MISTAKES = [
    ("dmeo", 2, "Did you mean 'demo'?"),
    ("demo --images 0 -o out", 2, "--images"),
    ("purify boot.png -b fashion-mnist-ct", 2, "Missing option '-o' / '--out'"),
    ("quality -b fashion-mnist-ct -c embedded -d embedded", 2, "Missing option '-o' / '--out'"),
    (f"evaluate {MODEL}", 2, "Missing option '-o' / '--out'"),
    (f"compare {MODEL} -p one-step -p diffpure", 2, "Missing option '-o' / '--out'"),
    (f"study beta {MODEL}", 2, "Missing option '-o' / '--out'"),
    ("train -d fashion-mnist", 2, "Missing option '-o' / '--out'"),
    ("demo --eps 8 -o out", 2, "--eps is in units of images in [0, 1], so that it must be at most 1"),
    ("demo --eps -0.1 -o out", 2, "--eps"),
    ("demo -o boot.png/below", 2, "cannot be written to: name another folder"),
    ("demo --n-latent 3 -o out", 2, "Did you mean '--n-latents'"),
    ("purify boot.png -b fashion-mnist -o out", 1, "fashion-mnist-ct"),
    (f"purify large.jpg {PURIFY}", 1, "Give --resize bilinear"),
    (
        "purify missing.png -b fashion-mnist-edm --purifier cmap -o out",
        1,
        "There is no file or folder missing.png: give image files",
    ),
    (f"purify boot.png boot.png {PURIFY}", 1, "two images would be written to out/boot.png. Purify them into"),
    ("purify boot.png -b fashion-mnist-ct -o .", 1, "overwritten by its purified version. Give another folder"),
    (f"purify boot.png {PURIFY} --device cuda:99", 2, "cuda:99"),
    (f"purify {PURIFY}", 2, "IMAGES"),
    (f"purify empty {PURIFY}", 1, "empty has no image files in it: name another folder"),
    (f"purify boot.png {PURIFY} --class-label 3", 2, "fashion-mnist-ct is not class-conditional: leave the option"),
    (f"purify boot.png {PURIFY} --purifier one-stpe", 2, "Did you mean 'one-step'"),
    (f"purify boot.png {PURIFY} --purifier one-step --iterations 3", 2, "OneStep has no setting 'iterations'"),
    (f"purify boot.png {PURIFY} --purifier one-step --purifier-set levle=1", 2, "Did you mean 'level'"),
    (f"purify boot.png {PURIFY} --n-latents 2 --purifier-set n_latents=3", 2, "n_latents is given twice"),
    ("purify boot.png -b fashion-mnist-edm -o out --purifier-preset paper", 1, "such as OneStep (--purifier one-step)"),
    ("purify boot.png -b fashion-mnist-edm -o out --purifier cmap", 1, "such as OneStep (--purifier one-step)."),
    (
        f"purify boot.png {PURIFY} --iterations 3",
        2,
        "one-step is what goes with the backbone: --purifier",
    ),
    (f"purify boot.png {PURIFY} --purifier-preset paper --n-latents 2", 2, "leave other options of it out"),
    (f"purify boot.png {PURIFY} --purifier-preset fast --purifier cmap", 2, "leave other options of it out"),
    (f"purify boot.png {PURIFY} --purifier-set preset=cifar10-linf", 2, "--purifier takes another, such as cmap."),
    (f"purify boot.png {PURIFY} --purifier-set level=200", 2, "choose a lower level."),
    ("purify boot.png -b cifar10-cd -o out --purifier-set bogus=1", 2, "CMAPSettings has no setting 'bogus'"),
    (
        f"purify boot.png {PURIFY} --purifier chain --purifier-set 'purifiers=identity, cmap levle=1'",
        2,
        "Purifier 2 of the chain, 'cmap levle=1': CMAPSettings has no setting 'levle'. Did you mean 'level'?",
    ),
    (
        f"purify boot.png {PURIFY} --purifier chain --purifier-set purifiers=identity --n-latents 2",
        2,
        "Settings of its purifiers follow their names: purifiers=(diffpure t=60, cmap).",
    ),
    (
        f"purify boot.png {PURIFY} --purifier chain --purifier-set purifiers=cmap,diffpure",
        1,
        "take a pair: backbone=(consistency, denoiser), on the command line --backbone twice.",
    ),
    ("demo --purifier diffpure -o out", 2, "there is no 'diffpure'"),
    (f"purify boot.png {PURIFY} --purifier-preset quick", 2, "there is no 'quick'"),
    (f"evaluate {MODEL} -o out --size 64", 2, "--size: the embedded images have one size: leave the option out."),
    (f"study beta {MODEL} -o out --steps 3", 2, "--steps: the study beta has attacks of its own"),
    (f"study surrogate {MODEL} -o out --only pgd", 2, "--only: the study surrogate has attacks of its own"),
    ("detect -o out --training 9", 2, "--training: only --kernel deep is trained: leave the option out."),
    ("detect -b fashion-mnist-edm -o out", 1, "and a consistency model is needed"),
    (
        "study vote -b fashion-mnist-edm -c embedded -d embedded -o out",
        1,
        "With this one, give CMAP a noise level: --purifier-set level=1.",
    ),
    (f"evaluate {MODEL} -o out -d embeded", 1, "There is no data set 'embeded'. Did you mean 'embedded'?"),
    (f"evaluate {MODEL} -o out --purifier gdmp --purifier-set eps=8", 2, "at most 1, but is 8; did you mean 8/255?"),
    (
        f"evaluate {MODEL} -o out --purifier diffpure --purifier-set step=1",
        2,
        "DiffPure.step must be below 1, but is 1.",
    ),
    (f"evaluate {MODEL} -o out --mean 0.5,0.5 --std 0.2", 1, "--mean must be 1 number"),
    (f"evaluate {MODEL} -o out --norm l2", 2, "has no default in l2: give one, such as 0.5"),
    ("detect -b fashion-mnist-edm --purifier-set level=1 -o out", 1, "CMAP needs a consistency model"),
    (
        "quality -b fashion-mnist-edm -c embedded -d embedded --purifier-set level=1 -o out",
        1,
        "CMAP needs a consistency model",
    ),
    (f"quality {MODEL} -b fashion-mnist-edm -o out", 2, "--backbone: the figures are those of one backbone: give it"),
    (f"evaluate {MODEL} -o out -c embeded", 2, "Did you mean 'embedded'?"),
    (f"evaluate {MODEL} -o out -c nowhere", 2, "--classifier: 'nowhere' is no import path such as my_models:resnet"),
    (f"evaluate {MODEL} -o out -c no_such_module:x", 2, "cannot be imported"),
    (f"evaluate {MODEL} -o out -c torch:no_such_thing", 2, "has no attribute 'no_such_thing'. Name a model"),
    (f"evaluate {MODEL} -o out -c math:pi", 2, "math:pi gives float, which is no model"),
    (f"evaluate {MODEL} -o out -c math:sqrt", 2, "Name a model, or a function without arguments"),
    (f"evaluate {MODEL} -o out -c time:time", 2, "gives float, which is no model"),
    (f"evaluate {MODEL} -o out --only bpda", 2, "Did you mean 'bpda-eot'"),
    (
        f"evaluate {MODEL} -o out --only exact-eot",
        2,
        "not in the set 'standard': give --attacks exact or --attacks full",
    ),
    (f"evaluate {MODEL} -o out --only exact-eoot", 2, "Did you mean 'exact-eot'"),
    (f"evaluate {MODEL} -o out --attacks standart", 2, "Did you mean 'standard'?"),
    (f"evaluate {MODEL} -o out --eps none", 2, "none is not a number: write for instance 0.05 or 8/255"),
    (f"evaluate {MODEL} -o out --eps 8", 2, "did you mean 8/255?"),
    (f"evaluate {MODEL} -o out --eps 8 --attacks none", 2, "did you mean 8/255?"),
    (f"evaluate {MODEL} -o out --only pgd --attacks none", 2, "makes no attack: leave one of them out"),
    (f"evaluate {MODEL} -o out --steps 100 --attacks none", 2, "makes no attack: leave one of them out"),
    (f"evaluate {MODEL} -o out --eps 0", 2, "give 8/255, or --attacks none"),
    (f"evaluate {MODEL} -o out --split train", 2, "all of the test set: leave the option out"),
    (f"evaluate {MODEL} -o out --mean 0.5", 2, "--mean and --std go together: give both"),
    (f"evaluate {MODEL} -o out --mean a,b --std 1", 2, "a,b is not a list of numbers"),
    (f"evaluate {MODEL} -o out --baseline nothing", 2, "NAME=PATH"),
    (f"evaluate {MODEL} -o out --weights notes.txt", 2, "is refused"),
    (f"evaluate {MODEL} -o out --gradient-samples 3", 2, "--gradient-samples must be even, but is 3"),
    (f"evaluate {MODEL} -o out --seeds 1,1", 2, "--seeds must differ"),
    (f"evaluate {MODEL} -o out -n 257", 1, "Take 256 at most: --count 256"),
    ("report .", 1, "report.json"),
    (f"study laten {MODEL} -o out", 2, "Did you mean 'latents'"),
    (f"study vote {MODEL} -o out --eps 8", 2, "did you mean 8/255?"),
    ("detect -n 200 -o out", 2, "There are 256 images, but 200 + 128 are wanted: give smaller numbers with -n, --ref"),
    ("detect -n 100 --kernel deep -o out", 2, "100 + 128 + 64"),
    ("detect --eps 0 -o out", 2, "give 8/255."),
    ("detect --eps 8 -o out", 2, "did you mean 8/255?"),
    ("detect --levels 1001 -o out", 2, "--levels"),
    ("detect --kernel gausian -o out", 2, "Did you mean 'gaussian'"),
    ("detect -b fashion-mnist -o out", 1, "fashion-mnist-ct"),
    ("detect -d nothing-there -o out", 1, "nothing-there"),
    (f"quality {MODEL} -o out --record", 2, "must be a folder with a backbone.json, but is fashion-mnist-ct"),
    (f"quality {MODEL} -o out --other x", 2, "'x' is not NAME=PATH"),
    (f"quality {MODEL} -o out --other embedded=embedded", 2, "two models are called 'embedded'"),
    (f"quality {MODEL} -o out --other a=embedded --other a=embedded", 2, "two models are called 'a'"),
    (f"quality {MODEL} -o out --other a=embedded@nowhere.safetensors", 2, "there is no file nowhere.safetensors"),
    (f"quality {MODEL} -o out --other a=nowhere:net", 2, "nowhere:net cannot be imported"),
    (f"quality {MODEL} -o out --features haed", 1, "Did you mean 'head'"),
    (f"quality {MODEL} -o out --eps 0", 2, "--eps"),
    (f"quality {MODEL} -o out --samples 1", 2, "--samples"),
    ("backbones info no-such-backbone", 1, "fashion-mnist-ct"),
    ("train --data cifar -o out", 1, "cifar10"),
    ("train --data none.npz -o out --attention 7", 2, "--attention: there is no level 7 of 2"),
    ("train --data none.npz -o out --device cuda:99", 2, "cuda:99"),
    ("train --data data.npz -o out --objective cd", 2, "--teacher names the denoiser"),
    ("train --data data.npz -o out --teacher somewhere", 2, "--teacher"),
    ("train --data data.npz -o out --objective cd --teacher fashion-mnist-ct", 2, "a denoiser is needed"),
    ("train --data data.npz -o out --objective ict --halvings 3", 2, "--halvings"),
    ("train --data data.npz -o out --halvings 3 --objective-set halvings=3", 2, "--halvings"),
    ("train --data data.npz -o out --objective-set huber", 2, "KEY=VALUE"),
    ("train --data data.npz -o out --objective-set huber=big", 2, "huber must be a number, but is 'big'"),
    ("train --data data.npz -o out --objective-set hubber=1", 2, "Did you mean 'huber'"),
    ("train --data data.npz -o out --objective dpm", 2, "dpm"),
    ("train --data data.npz -o out --network unet", 2, "unet"),
    ("train --data data.npz -o out --set dropout=0.1 --set dropout=0.2", 2, "dropout is set twice"),
    ("train --data data.npz -o out --set num_classes=3", 1, "num_classes of the network compact is that of the data"),
    ("train --data data.npz -o out --set channel=[8]", 1, "Did you mean 'channels'"),
    ("train --data data.npz -o out --network ncsnpp --channels 8,8", 2, "--channels belongs to the compact network"),
    ("train --data data.npz -o out --network ncsnpp --preset cifar10", 2, "--preset belongs"),
    ("train --data data.npz -o out --channels 8,8 --attention 2", 2, "no level 2 of 2"),
    ("train --data data.npz -o out --preset cifar10 --attention 3", 2, "no level 3 of 3"),
    ("train --data data.npz -o out --minutes 0", 2, "--minutes"),
    ("train --data data.npz -o out --ema-half-life 5,5", 2, "that differ from each other"),
    ("train --data data.npz -o out --size 16", 1, "only images of a folder are resized"),
    ("train --data data.npz -o out --hold-out 40", 1, "leaves nothing of the 40 images: give a smaller number"),
    ("train --data data.npz -o out --from fashion-mnist-ct", 1, "another network"),
    ("train --data data.npz -o out --class-conditional", 1, "no labels of several classes"),
]


@pytest.mark.parametrize(("line", "status", "message"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_mistakes_get_a_message_a_status_and_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, line: str, status: int, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    image = Image.fromarray((load_test_images()[0][0, 0] * 255).byte().numpy())
    image.save("boot.png")
    image.convert("RGB").resize((40, 50)).save("large.jpg")
    Path("empty").mkdir()
    Path("notes.txt").write_text("no weights")
    np.savez("data.npz", images=np.zeros((40, 8, 12, 3), dtype=np.uint8))
    before = sorted(Path().rglob("*"))
    assert message in run(*shlex.split(line), status=status)
    assert sorted(Path().rglob("*")) == before


def test_options_of_python_are_shown_as_those_of_the_command() -> None:
    options = [click.Option(["--resize"]), click.Option(["--eps"]), click.Option(["-n", "--count", "count"])]
    for python, shown in (
        ('give PurifiedClassifier(..., resize="bilinear") to', "give --resize bilinear to"),
        ("ThreatModel.eps must", "--eps must"),
        ("Subset(count=5)", "--count 5"),
        ("Other(..., level=0.5)", "Other(..., level=0.5)"),
    ):
        assert _with_options(python, options) == shown
