"""A training in a process of its own, which :mod:`test_loop` kills; ``python killed.py FOLDER WHERE``.

WHERE is "never" (train to the end) or the place at which the process says "ready" and waits to be killed: "step" (after
step 17, between two checkpoints), "save" (half of the second checkpoint is written), "saved" (it is written whole, and
nothing is done after it), "logged" (the same for its line of the log).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.backbones import CompactUNet, CompactUNetConfig, ConsistencyBackbone
from cmap_defense.training import checkpoint, loop
from cmap_defense.training.ema import EMA
from cmap_defense.training.loop import TrainState, train
from cmap_defense.training.objectives import ECT
from cmap_defense.training.settings import TrainSettings

NETWORK = CompactUNetConfig(
    image_shape=(1, 8, 8), channels=(8, 8), blocks=1, attention=(False, False), head_channels=8, embedding=16
)
SETTINGS = TrainSettings(
    images=240,
    batch_size=8,
    learning_rate=2e-3,
    warmup_images=40,
    ema_half_life=50,
    precision="float32",
    checkpoint_every=80,
)
"""30 steps, checkpoints after 10, 20 and 30."""


def fresh_backbone(seed: int = 0) -> ConsistencyBackbone:
    """The tiny network with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConsistencyBackbone(CompactUNet(NETWORK), NETWORK.image_shape)


def training_images(count: int = 50) -> Tensor:
    """uint8 [count, 1, 8, 8]: a bright half, left or right, on a dark ground, with noise."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 40, (count, 1, 8, 8), generator=generator)
    images[::2, :, :, :4] += 200
    images[1::2, :, :, 4:] += 200
    return images.to(torch.uint8)


def run(folder: Path, **options: Any) -> tuple[ConsistencyBackbone, EMA]:
    """Train, or continue, in ``folder``."""
    backbone = fresh_backbone()
    described = {"network": NETWORK.to_dict()}
    return backbone, train(backbone, training_images(), ECT(), SETTINGS, folder, described=described, **options)


def wait_to_be_killed(*_: Any, **__: Any) -> None:
    """Say so, then wait."""
    print("ready", flush=True)
    sys.stdin.read()
    raise SystemExit("nobody killed this process")


def stop_half_way_through_saving() -> None:
    """Let the second checkpoint be written to the half."""
    save, saved = torch.save, []

    def half(state: Any, file: Any) -> None:
        saved.append(state["step"])
        save(state, file)
        if len(saved) == 2:
            file.truncate(file.tell() // 2)
            file.flush()
            wait_to_be_killed()

    checkpoint.torch.save = half


def stop_after_the_second_call(name: str) -> None:
    """Let the loop's function ``name`` return once, then finish its work once more and wait."""
    function, calls = getattr(loop, name), []

    def stopping(*arguments: Any) -> None:
        calls.append(arguments)
        function(*arguments)
        if len(calls) == 2:
            wait_to_be_killed()

    setattr(loop, name, stopping)


def main(folder: Path, where: str) -> None:
    torch.set_num_threads(1)

    def on_step(state: TrainState) -> None:
        if where == "step" and state.step == 17:
            wait_to_be_killed()

    if where == "save":
        stop_half_way_through_saving()
    if where == "saved":
        stop_after_the_second_call("save_checkpoint")
    if where == "logged":
        stop_after_the_second_call("_log")
    backbone, ema = run(folder, on_step=on_step)
    torch.save({"weights": backbone.state_dict(), "ema": ema.weights}, folder / "result.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
