"""Trainings that take a moment, and one in a process of its own, which :mod:`test_loop` kills; ``python killed.py
FOLDER WHERE WHAT``.

WHERE is the place at which the process says "ready" and waits to be killed: "part" (half of a part of the second
checkpoint is written), "saved" (it is written whole, and nothing is done after it), "logged" (the same for its line of
the log).

WHAT is "plain" (ECT, one average, an unconditional network) or "rich" (CT, whose target is a running average, two
averages of the weights, classes, dropout, checkpoints in many parts).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones import CompactUNet, CompactUNetConfig, ConsistencyBackbone
from cmap_defense.training import checkpoint, log, loop
from cmap_defense.training.loop import Trained, train
from cmap_defense.training.objectives import CT, ECT, Objective
from cmap_defense.training.settings import Execution, TrainSettings

NETWORK = CompactUNetConfig(
    image_shape=(1, 8, 8), channels=(8, 8), blocks=1, attention=(False, False), head_channels=8, embedding=16
)
SETTINGS = TrainSettings(
    images=240,
    batch_size=8,
    learning_rate=2e-3,
    warmup_images=40,
    ema_half_lives=(50,),
    precision="float32",
    checkpoint_every=80,
)
"""30 steps, checkpoints after 10, 20 and 30."""

PART = 20_000
"""Bytes of a part of a rich training's checkpoints, so that some tensors take several."""

RICH = SETTINGS.replace(ema_half_lives=(50, 20))


def fresh_backbone(config: CompactUNetConfig = NETWORK, seed: int = 0) -> ConsistencyBackbone:
    """The tiny network with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConsistencyBackbone(CompactUNet(config), config.image_shape, num_classes=config.num_classes)


def training_images(count: int = 50) -> Tensor:
    """uint8 [count, 1, 8, 8]: a bright half, left or right, on a dark ground, with noise."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 40, (count, 1, 8, 8), generator=generator)
    images[::2, :, :, :4] += 200
    images[1::2, :, :, 4:] += 200
    return images.to(torch.uint8)


def training_labels(count: int = 50) -> Tensor:
    """int64 [count]: which half is bright."""
    return torch.arange(count) % 2


def run(folder: Path, what: str = "plain", **options: Any) -> tuple[ConsistencyBackbone, Trained]:
    """Train, or continue, in ``folder``."""
    config, settings, objective = NETWORK, SETTINGS, ECT()
    made: Objective = objective
    if what == "rich":
        config, settings, made = NETWORK.replace(num_classes=2, dropout=0.1), RICH, CT()
        options = {"labels": training_labels(), "execution": Execution(part_mb=1)} | options
    backbone = fresh_backbone(config)
    described = {"network": config.to_dict()}
    return backbone, train(backbone, training_images(), made, settings, folder, described=described, **options)


def result(backbone: ConsistencyBackbone, trained: Trained) -> dict[str, dict[str, Tensor]]:
    """All weights and averages."""
    averages = {f"ema-{average.half_life}": average.weights for average in trained.averages}
    return {"weights": backbone.state_dict()} | averages


def wait_to_be_killed(*_: Any, **__: Any) -> None:
    """Say so, then wait."""
    print("ready", flush=True)
    sys.stdin.read()
    raise SystemExit("nobody killed this process")


def stop_half_way_through_a_part() -> None:
    """Let the last part of the second checkpoint be written to the half."""
    write = checkpoint.write_safetensors

    def half(tensors: dict[str, Tensor], path: Path) -> None:
        write(tensors, path)
        if path.parent.name == "checkpoint-00000020.partial" and any("adam/step" in name for name in tensors):
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            wait_to_be_killed()

    checkpoint.write_safetensors = half


def stop_after_the_second_call(owner: Any, name: str) -> None:
    """Let a function return once, then finish its work once more and wait."""
    function, calls = getattr(owner, name), []

    def stopping(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        found = function(*arguments, **options)
        if len(calls) == 2:
            wait_to_be_killed()
        return found

    setattr(owner, name, stopping)


def main(folder: Path, where: str, what: str) -> None:
    torch.set_num_threads(1)
    checkpoint.MEGABYTE = PART
    if where == "part":
        stop_half_way_through_a_part()
    if where == "saved":
        stop_after_the_second_call(loop, "save_checkpoint")
    if where == "logged":
        stop_after_the_second_call(log.LossLog, "write")
    run(folder, what)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
