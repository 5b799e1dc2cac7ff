"""A third-party CIFAR-10 classifier behind a published backbone, on real images, from end to end.

    python examples/wrap_cifar10.py --data cifar10_test_512.npz --classifier cifar10_resnet20.safetensors --depth 20 \\
        --backbone cifar10-cd --count 8

With ``--random-backbone`` no weights are needed: a checkpoint in the layout of the official files, of a small network
or one of the published size ("full"), with random weights, is written, converted and used. Its accuracy says nothing;
that it runs says that everything fits, and what it costs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import msgpack
import numpy as np
import torch
from cifar_resnet import MEAN, STD, load_cifar_resnet

from cmap_defense import PurifiedClassifier
from cmap_defense.backbones import NCSNpp, NCSNppConfig, convert_jcm, load_backbone, write_backbone
from cmap_defense.backbones.convert.jcm import jcm_slots
from cmap_defense.evaluation import wilson_interval

CONFIGS = {"small": NCSNppConfig(nf=16, num_res_blocks=1), "full": NCSNppConfig()}


def write_random_checkpoint(path: Path, config: NCSNppConfig, seed: int) -> None:
    """A flax msgpack checkpoint such as the official ones, its weights drawn at random."""
    rng = np.random.RandomState(seed)
    tree: dict = {}
    for name, (tensor, axes) in jcm_slots(NCSNpp(config)):
        shape = [tensor.shape[axes.index(axis)] for axis in range(len(axes))]
        array = rng.standard_normal(shape).astype(np.float32)
        if name.endswith(("kernel", "weight", "W")) and len(shape) > 1:
            array /= np.sqrt(np.prod(shape[:-1]))
        elif name.startswith("Gaussian"):
            array *= config.fourier_scale
        else:
            array = 0.1 * array + name.endswith("scale")
        *parents, leaf = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        packed = msgpack.packb((array.shape, "float32", array.astype("<f4").tobytes()))
        place[leaf] = msgpack.ExtType(1, packed)
    path.write_bytes(msgpack.packb({"step": 0, "params_ema": tree, "opt_state": {}}))


def random_backbone(folder: Path, config: NCSNppConfig, seed: int) -> Path:
    """A converted backbone with random weights."""
    checkpoint = folder / "checkpoint_0"
    write_random_checkpoint(checkpoint, config, seed)
    write_backbone(convert_jcm(checkpoint, config), folder / "backbone", name="random")
    return folder / "backbone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=".npz with images uint8 [N, 32, 32, 3] and labels")
    parser.add_argument("--classifier", type=Path, required=True, help="safetensors of a CIFAR ResNet")
    parser.add_argument("--depth", type=int, default=20)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--backbone", help="a name, a folder or a Hub id")
    which.add_argument("--random-backbone", choices=CONFIGS)
    parser.add_argument("--count", type=int, default=8, help="images")
    parser.add_argument("--latents", type=int, help="K instead of the backbone's")
    parser.add_argument("--iterations", type=int, help="N instead of the backbone's")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with np.load(options.data) as file:
        images = torch.from_numpy(file["images"][: options.count]).permute(0, 3, 1, 2).float() / 255
        labels = torch.from_numpy(file["labels"][: options.count].astype(np.int64))
    classifier = load_cifar_resnet(options.classifier, options.depth)
    with tempfile.TemporaryDirectory() as folder:
        source = options.backbone
        if options.random_backbone:
            source = random_backbone(Path(folder), CONFIGS[options.random_backbone], options.seed)
        backbone = load_backbone(source)
    changes = {"n_latents": options.latents, "iterations": options.iterations}
    model = PurifiedClassifier(classifier, backbone, preset="paper", normalize=(MEAN, STD), seed=options.seed)
    settings = model.settings.replace(**{name: value for name, value in changes.items() if value is not None})
    model = PurifiedClassifier(classifier, backbone, settings=settings, normalize=(MEAN, STD), seed=options.seed)

    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    with torch.no_grad():
        undefended = int((classifier((images - mean) / std).argmax(1) == labels).sum())
        begun = time.perf_counter()
        result = model.purify(images)
        seconds = time.perf_counter() - begun
    assert result.labels is not None
    assert result.history is not None
    purified = int((result.labels == labels).sum())
    print(
        json.dumps(
            {
                "backbone": backbone.record.name if backbone.record else None,
                "images": len(images),
                "settings": settings.to_dict(),
                "undefended": [undefended / len(images), *wilson_interval(undefended, len(images))],
                "purified": [purified / len(images), *wilson_interval(purified, len(images))],
                "objective_first": result.history.total[0].mean().item(),
                "objective_last": result.history.total[-1].mean().item(),
                "seconds_per_image": seconds / len(images),
                "seconds_per_latent_step": seconds / len(images) / settings.n_latents / settings.iterations,
            }
        )
    )


if __name__ == "__main__":
    main()
