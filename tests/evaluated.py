"""Evaluations that take a moment, the lines of some that never were, and evaluations in two processes.

The two ranks evaluate in folders in one folder, and write what happened to each of them to ``rank-<r>.json`` there.
"""

import contextlib
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attack_toys import QUICK, WEIGHT, labelled, linear, wrapped
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import PGD, SeededModel, ThreatModel, Transfer
from cmap_defense.common.rng import draw_latents
from cmap_defense.errors import CmapError
from cmap_defense.evaluation import Evaluation, Protocol, evaluate
from cmap_defense.evaluation.summary import Runs

THREAT = ThreatModel(eps=0.1)
SMALL = QUICK.replace(iterations=2)
PROTOCOL = Protocol(
    predictions=2, reevaluations=2, seeds=(0, 7), group=2, sanity_images=1, gradient_samples=2, search_on_clean=True
)
BRIEF = Protocol(predictions=2, reevaluations=1, group=2, sanity_images=0)
CHECKED = BRIEF.replace(seeds=(7,), sanity_images=1, gradient_samples=2)
IMAGES = 3


def defended(**options: Any) -> PurifiedClassifier:
    """A small defended classifier in eval mode; options as for PurifiedClassifier."""
    return wrapped(**({"settings": SMALL, "max_parallel": 64} | options)).eval()


def shaken(images: Tensor) -> Tensor:
    """A random model that draws from torch's global generator."""
    return linear(images + 0.3 * torch.randn_like(images))


def attacks() -> dict[str, Any]:
    """One that evaluates the defence, and one that does not."""
    return {"transfer": Transfer(PGD(THREAT, steps=1)), "bpda-eot": PGD(THREAT, steps=2, eot=2)}


def options(**changes: Any) -> dict[str, Any]:
    """The arguments of a small evaluation but for model and folder, some of them changed."""
    given: dict[str, Any] = {"attacks": attacks(), "protocol": PROTOCOL, "threads": 1}
    return given | {"data": labelled(IMAGES), "baseline_attacks": {"pgd": PGD(THREAT, steps=2)}} | changes


def evaluation(out: Path, model: Any = None, **changes: Any) -> Evaluation:
    """A small evaluation that is not begun yet."""
    return Evaluation(defended() if model is None else model, out=out, **options(**changes))


def results(folder: Path) -> dict[str, bytes]:
    """The contents of the files that do not depend on how an evaluation was carried out, by their names."""
    kept = [folder / "settings.json", folder / "results.jsonl", *(folder / "units").rglob("*")]
    whole = [path for path in kept if path.is_file() and not path.name.endswith(".partial")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in whole}


class Interrupted(Exception):
    """Somebody ended an evaluation."""


def interrupt(after: int) -> Callable[..., None]:
    """A progress function that ends an evaluation when so many work units are done."""

    def progress(number: int, _: int) -> None:
        if number == after:
            raise Interrupted

    return progress


class Shaky(SeededModel):
    """A linear classifier of slightly noisy images, with a noise that is given: what attacks should break, step by
    step."""

    def __init__(self, size: float = 0.05, seed: int | None = None) -> None:
        self.size, self.seed = size, seed
        self.predicted: list[Tensor] = []

    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        if seeds is None:
            seeds = torch.full((len(images),), 0 if self.seed is None else self.seed)
        noise = draw_latents(seeds, 1, images.shape[1:])[:, 0].to(images)
        logits = (images + self.size * noise - 0.5).flatten(1) @ WEIGHT.to(images)
        self.predicted.append(logits.detach().argmax(dim=1))
        return logits


def lines_of(
    predictions: Tensor, again: Tensor, truth: Tensor, *, attack: str = "pgd", model: str = "defended", **more: Any
) -> list[dict[str, Any]]:
    """Lines of S runs of B images.

    Args:
        predictions: [S, B, N], classes.
        again: [S, B, R], classes of the re-evaluations.
        truth: [B].
        attack: name of the attack.
        model: name of the model.
        more: what else a line has, a value for all or a function of run and image.
    """
    return [
        {
            "model": model,
            "attack": attack,
            "seed": 10 * run,
            "image": 100 + image,
            "label": int(truth[image]),
            "predictions": predictions[run, image].tolist(),
            "reevaluated": again[run, image].tolist(),
            "one_latent": None,
        }
        | {name: value(run, image) if callable(value) else value for name, value in more.items()}
        for run in range(len(predictions))
        for image in range(len(truth))
    ]


def runs_of(right: Tensor, again: Tensor, truth: Tensor | None = None, **more: Any) -> Runs:
    """Runs of which is known what is right: [S, B, N] and [S, B, R] bool; class 1 is the truth and 0 is wrong, or the
    truth is one of three classes."""
    truth = torch.ones(right.shape[1], dtype=torch.int64) if truth is None else truth
    wrong = (truth + 2) % 3
    labels = [torch.where(part, truth[:, None], wrong[:, None]) for part in (right, again)]
    return Runs.of(lines_of(*labels, truth, **more))


def what_happened(do: Callable[[], Any]) -> dict[str, Any]:
    """What came of it, or the error's kind and message."""
    happened: dict[str, Any] = {}
    try:
        happened["value"] = do()
    except (CmapError, RuntimeError) as error:
        happened |= {"error": type(error).__name__, "message": str(error)}
    return happened


@contextlib.contextmanager
def group(folder: Path, rank: int) -> Iterator[None]:
    """A process group of two that the package did not make."""
    dist.init_process_group("gloo", init_method=f"file://{folder}-meeting", rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def together(folder: Path) -> None:
    """All that two ranks do, in one job since a job takes seconds to start."""
    rank = int(os.environ["RANK"])
    own: list[list[Any]] = []

    class Noting(Evaluation):
        def _do(self, unit: Any, team: Any) -> None:
            own.append([unit.task, unit.seed, unit.group])
            super()._do(unit, team)

    def report() -> dict[str, Any]:
        found = evaluate(defended(), **options(protocol=BRIEF)).to_dict()
        return {name: found[name] for name in ("rows", "checks", "headline", "refused", "curves", "missing")}

    other = BRIEF.replace(predictions=BRIEF.predictions + rank)
    happened: dict[str, Any] = {}

    def try_to(name: str, do: Callable[[], Any]) -> None:
        happened[name] = what_happened(do)
        (folder / f"rank-{rank}.json").write_text(json.dumps(happened))

    try_to("whole", lambda: Noting(defended(), out=folder / "whole", **options(protocol=CHECKED)).run())
    happened["own"] = own
    with group(folder, rank):
        try_to("begun", lambda: evaluation(folder / "begun", protocol=BRIEF).run())
        try_to("changed", lambda: evaluation(folder / "changed", protocol=BRIEF).run())
        try_to("locked", lambda: evaluation(folder / "locked", protocol=BRIEF).run())
        try_to("nowhere", report)
        happened["group kept"] = dist.is_initialized()
    with group(folder / "again", rank):
        try_to("at odds", lambda: evaluation(folder / "at-odds", protocol=other).run())
    for name in ("second", "third"):
        try_to(name, lambda name=name: evaluation(folder / name, protocol=BRIEF).run())
        if "error" in happened[name]:
            raise SystemExit("the other rank may wait for this one")
        gc.collect()
        time.sleep(1.5 * rank)  # they need not arrive at once
