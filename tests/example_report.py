"""A report of the size of a real one, and a folder with its images: made up, and quick to make."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmap_defense.attacks import PGD, ThreatModel, full_suite
from cmap_defense.common.statistics import Accuracy
from cmap_defense.evaluation.checks import Check, Sweep
from cmap_defense.evaluation.predictions import vote_iterations
from cmap_defense.evaluation.report import Report
from cmap_defense.evaluation.results import ResultsFolder, Timing, WorkUnit
from cmap_defense.evaluation.summary import MEASURES, Row, WorstCase

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIZE = ThreatModel(eps=8 / 255)
WEAKEST = ("transfer", "square", "spsa", "paper-pgd", "transfer-short", "overpowered")
TITLES = (
    "the defence draws independent noise for each prediction",
    "a gradient attack goes through the defence itself",
    "a gradient attack starts at random with a step of eps / 4 at least",
    "no image's gradient is zero throughout an attack",
    "attacks that evaluate the defence are no weaker than transfer",
    "more steps do not help the defence",
    "a larger eps does not help the defence",
    "with every image allowed, accuracy is 0",
    "averaged gradients have a direction",
)


def example_report(
    *,
    attacks: Sequence[str] | None = None,
    baselines: Sequence[str] = ("undefended", "adversarially-trained"),
    images: int = 512,
    seeds: Sequence[int] = (0, 1, 2),
    iterations: int = 200,
    failed: Sequence[str] = (),
    unchecked: Sequence[str] = (),
    class_names: Sequence[str] | None = CIFAR,
    threat: ThreatModel = SIZE,
) -> Report:
    """The report of an evaluation on CIFAR-10, with 20 attacks or these, from the weakest on; none has a headline where
    a check failed or could not be made."""
    suite = {**full_suite(threat), "paper-pgd": PGD(threat, steps=200, sign_steps=True)}
    names = [*WEAKEST, *(name for name in suite if name not in WEAKEST)] if attacks is None else list(attacks)
    shares = {name: 0.74 - 0.36 * place / max(1, len(names) - 1) for place, name in enumerate(names)}
    shares |= {"clean": 0.823}
    rows = [_row("defended", name, shares[name], images, len(seeds), latents=True) for name in ("clean", *names)]
    for place, name in enumerate(baselines):
        rows.append(_row(name, "clean", 0.945 - 0.07 * place, images, len(seeds)))
        rows.append(_row(name, "pgd", 0.66 * place, images, len(seeds)))
    states = {title: False if title in failed else None if title in unchecked else True for title in TITLES}
    checks = [
        Check(title, state, f"what was found {'there' if state else 'is this'}", f"Do this about {number}.")
        for number, (title, state) in enumerate(states.items())
    ]
    refused = [check.reason for check in checks if check.passed is not True] if names else ["there was no attack"]
    worst = Accuracy(0.347 * images, images)
    headline = WorstCase(
        worst,
        0.0068 if len(seeds) > 1 else None,
        worst,
        None,
        {name: round(images * len(seeds) * 2.0 ** (place - len(names))) for place, name in enumerate(names)},
        Accuracy(0.211 * images, images),
        Accuracy(0.8203 * images, images),
        0.6584,
    )
    described = {name: suite.get(name, PGD(threat)).to_dict() for name in names}
    tasks = _tasks(described, baselines, threat)
    timings = {
        name: Timing(images * len(seeds), 913.4 * (1 + place % 7), 40_960_000 * (name.split("/")[0] not in baselines))
        for place, name in enumerate(tasks)
    }
    return Report(
        headline=None if refused else headline,
        refused=refused,
        rows=rows,
        checks=checks if names else [],
        sweeps=_sweeps(threat) if names else [],
        gradients=_gradients() if names else [],
        curves={f"defended/{name}": _curves(share, iterations) for name, share in shares.items()},
        searches={},
        timings=timings,
        missing=0,
        settings=_settings(tasks, images, seeds, iterations, baselines),
        class_names=class_names,
    )


def example_folder(path: Path, report: Report, *, channels: int = 3, size: int = 32, count: int = 8) -> ResultsFolder:
    """A folder that holds the first images of such an evaluation, ``count`` of them in groups of its size."""
    folder, protocol = ResultsFolder(path), report.settings["protocol"]
    clean = _pictures(count, channels, size)
    for place, attack in enumerate(row.attack for row in report.rows if row.model == "defended"):
        generator = torch.Generator().manual_seed(place)
        noise = (torch.rand(clean.shape, generator=generator) - 0.5).sign() * (8 / 255 if place else 0.0)
        images = (clean + noise).clamp(0, 1)
        purified = (torch.nn.functional.avg_pool2d(images, 3, 1, 1) * 255).round().to(torch.uint8)
        for group, rows in enumerate(torch.arange(count).split(protocol["group"])):
            unit = WorkUnit(f"defended/{attack}", protocol["seeds"][0], group)
            lines = [_line(attack, int(row), place, protocol["predictions"]) for row in rows]
            folder.write(unit, lines, {"images": images[rows], "purified": purified[rows]})
    return folder


def _line(attack: str, row: int, place: int, predictions: int) -> dict[str, Any]:
    label = (3 * row + 1) % 10
    predicted = label if place == 0 or (row + place) % 3 == 0 else (label + 5) % 10
    named = {"model": "defended", "attack": attack, "seed": 0, "image": row, "label": label}
    return {**named, "predictions": [predicted] * predictions}


def _pictures(count: int, channels: int, size: int) -> Tensor:
    """[count, channels, size, size] in [0, 1]: a disc before a sloping ground, another in each."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    found = []
    for row in range(count):
        disc = ((x - 0.1 * row + 0.3).square() + y.square() < 0.2 + 0.05 * row).float()
        planes = [0.5 + 0.3 * torch.sin(x * (row + 1) + plane) + 0.1 * y for plane in range(channels)]
        found.append(torch.stack([plane * (1 - disc) + 0.4 * disc for plane in planes]))
    return torch.stack(found).clamp(0, 1)


def _row(model: str, attack: str, share: float, images: int, runs: int, *, latents: bool = False) -> Row:
    shares = {
        "one_shot": share - 0.004,
        "average": share + 0.002,
        "worst_of": 0.5 * share,
        "vote": min(1.0, share + 0.045),
    }
    counted = {name: Accuracy(max(0.0, value) * images, images) for name, value in shares.items()}
    searched = attack != "clean" and share <= 0.7
    return Row(
        model=model,
        attack=attack,
        images=images,
        runs=runs,
        reevaluated=Accuracy(share * images, images),
        spread={name: 0.0031 + 0.001 * place for place, name in enumerate(MEASURES)} if runs > 1 else {},
        prediction_spread=0.0087,
        one_latent=0.92 * share if latents else None,
        search=Accuracy(0.3 * share * images, images) if searched else None,
        search_on_clean=Accuracy(0.45 * images, images) if searched else None,
        search_predictions=84 if searched else None,
        queries=None if attack == "clean" else 1234,
        distance=None if attack == "clean" else 0.0313726,
        **counted,
    )


def _curves(share: float, iterations: int) -> dict[str, list[float]]:
    way = [1 - math.exp(-6 * n / iterations) for n in range(iterations)]
    noted = vote_iterations(iterations)
    return {
        "iterations": [float(n) for n in noted],
        "accuracy": [0.1 + (share - 0.1) * (1 - math.exp(-5 * n / iterations)) for n in noted],
        "l1": [1650.0 - (1000 + 300 * share) * w for w in way],
        "ssim": [120.0 + 2300 * share * w for w in way],
        "latent": [3072.0 * math.exp(-7 * w) + 20 for w in way],
        "total": [11000.0 - 13000 * w for w in way],
        "latent_mean": [0.012 * w * (1 - 1.3 * share) for w in way],
        "latent_std": [1 - 0.11 * w * share for w in way],
    }


def _sweeps(threat: ThreatModel) -> list[Sweep]:
    sizes = [0.0, *(factor * threat.eps for factor in (0.25, 0.5, 1, 2, 4)), 1.0]
    return [
        Sweep("steps", [0.0, 5.0, 10.0, 20.0], [0.83, 0.49, 0.42, 0.39], [0.06, 0.08, 0.08, 0.075]),
        Sweep("eps", sizes, [0.83, 0.71, 0.58, 0.39, 0.12, 0.01, 0.0], [0.06, 0.07, 0.08, 0.075, 0.04, 0.01, 0.0]),
    ]


def _gradients() -> list[dict[str, float]]:
    counts = (1, 2, 4, 8, 16, 32)
    return [{"samples": n, "cosine": n / (n + 11), "error": 0.05 / math.sqrt(n), "variance": 11.3 / n} for n in counts]


def _tasks(described: Mapping[str, Any], baselines: Sequence[str], threat: ThreatModel) -> dict[str, dict[str, Any]]:
    common = {"images": None, "once": False}
    tasks: dict[str, dict[str, Any]] = {"defended/clean": {"attack": None, "search": 84, **common}}
    tasks |= {f"defended/{name}": {"attack": attack, **common} for name, attack in described.items()}
    for name in baselines:
        tasks[f"{name}/clean"] = {"attack": None, "search": 102, **common}
        tasks[f"{name}/pgd"] = {"attack": PGD(threat, steps=50).to_dict(), **common}
    if described:
        repeated = described.get("bpda-eot", PGD(threat, steps=20, eot=4).to_dict())
        once = {"images": 16, "once": True}
        for name in ("steps-5", "steps-10", "eps-0.25x", "eps-0.5x", "eps-2x", "eps-4x", "eps-any"):
            tasks[f"checks/{name}"] = {"attack": repeated, **once}
        tasks["checks/gradients"] = {"attack": repeated, "samples": 64, **once}
    return tasks


def _settings(
    tasks: Mapping[str, Any], images: int, seeds: Sequence[int], iterations: int, baselines: Sequence[str]
) -> dict[str, Any]:
    def module(name: str) -> dict[str, str]:
        return {"class": name, "weights": "5e" * 32, "precision": "torch.float32"}

    loop = {"n_latents": 10, "iterations": iterations, "learning_rate": 0.1, "ssim_weight": 2.0, "latent_weight": 3.2}
    defended = {
        "class": "cmap_defense.classifier.wrapper.PurifiedClassifier",
        "settings": loop,
        "vote": "label",
        "seed": None,
        "classifier": module("robustbench.wide_resnet.WideResNet28x10"),
        "backbone": {"name": "cifar10-cd", **module("cmap_defense.backbones.karras.ConsistencyBackbone")},
    }
    protocol = {"predictions": 10, "reevaluations": 20, "seeds": list(seeds), "group": 4, "search_on_clean": True}
    software = {"torch": "2.9.0", "numpy": "2.3.0", "python": "3.12.4", "machine": "x86_64", "device": "NVIDIA H200"}
    subset = {"count": images, "order": "random", "seed": 0}
    return {
        "format": 1,
        "models": {"defended": defended} | {name: module("models.WideResNet") for name in baselines},
        "data": {"count": images, "classes": 10, "checksum": "ab" * 32, "subset": subset},
        "protocol": protocol | {"sanity_images": 16, "gradient_samples": 64},
        "tasks": dict(tasks),
        "computation": {"threads": 8, **software},
    }
