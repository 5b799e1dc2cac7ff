"""The embedded model under each attack of the suite: accuracy, queries, backbone passes, time.

    python benchmarks/attacks.py --out audit                 run, or go on with, the audit
    python benchmarks/attacks.py --out audit --table         the table of what is there, as Markdown

One line of JSON per attack in ``audit/results.jsonl``; attacks that have one are not run again, and other settings in
the same folder are refused. Accuracy is that of J re-evaluations of the final images: their mean, the worst of J, and
their vote. "clean" is the clean images, re-evaluated five times as often. The worst case over all attacks is a minimum
over many votes, which would fall without any attack too; how far is printed beside it.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from cmap_defense import PurifiedClassifier, load_backbone
from cmap_defense.attacks import (
    PGD,
    SPSA,
    Attack,
    AutoAttack,
    ConsistencyDisruption,
    LatentAttack,
    Overpowered,
    Square,
    ThreatModel,
    full_suite,
    paper_suite,
)
from cmap_defense.embedded import load_classifier, load_test_images
from cmap_defense.evaluation import wilson_interval

CLEAN = 5
"""How many times as often the clean images are re-evaluated."""

SETTINGS = ("images", "latents", "iterations", "learning_rate", "eps", "reevaluations", "seed")


def attacks_of(options: argparse.Namespace) -> dict[str, Attack]:
    """The audit: the full suite and the paper's, at sizes that two cores manage in three hours."""
    threat, seed = ThreatModel(eps=options.eps), {"seed": options.seed}
    suite = full_suite(threat, steps=12, eot=2, **seed)
    paper = paper_suite(threat, steps=100, eot=20, disruption_steps=200, **seed)
    del paper["paper-autoattack"]  # thousands of evaluations of a surrogate that the two above attack already
    sized = {
        "latent": LatentAttack(threat, steps=150, learning_rate=0.1, **seed),
        "overpowered": Overpowered(threat, steps=100, latents=2, learning_rate=0.1, **seed),
        "unrolled": dataclasses.replace(suite["unrolled"], steps=6),
        "fixed-seed": dataclasses.replace(suite["fixed-seed"], steps=24),
        "target-steer": dataclasses.replace(
            suite["target-steer"], target=LatentAttack(threat, steps=150, learning_rate=0.1, **seed)
        ),
        "autoattack": AutoAttack(threat, eot=2, steps=6, rounds=2, confirmations=1, **seed),
        "square": Square(threat, queries=30, samples=2, **seed),
        "spsa": SPSA(threat, steps=5, pairs=6, step_size=threat.eps / 2, schedule="cosine", momentum=0.75, **seed),
        "disruption-beta-100": ConsistencyDisruption(threat, steps=200, beta=100.0, **seed),
    }
    clean = {"clean": PGD(ThreatModel(eps=0.0), steps=1, random_start=False, **seed)}
    return clean | suite | paper | sized


def wrapped(options: argparse.Namespace) -> tuple[PurifiedClassifier, list[int]]:
    """The embedded model behind the defence, and a count of the latents that pass through its network."""
    backbone, passes = load_backbone("fashion-mnist-ct"), [0]
    network = backbone.network.forward

    def counting(x: Tensor, *rest: Tensor) -> Tensor:
        passes[0] += len(x)
        return network(x, *rest)

    backbone.network.forward = counting  # pyright: ignore[reportAttributeAccessIssue]
    shipped = PurifiedClassifier(load_classifier(), backbone, preset="paper").settings
    settings = shipped.replace(
        n_latents=options.latents, iterations=options.iterations, learning_rate=options.learning_rate
    )
    return PurifiedClassifier(load_classifier(), backbone, settings=settings), passes


def run(options: argparse.Namespace, done: set[str], results: Path) -> None:
    """The attacks that have no line yet."""
    torch.set_num_threads(options.threads)
    model, passes = wrapped(options)
    images, labels = (part[: options.images] for part in load_test_images())
    chosen = attacks_of(options)
    for name in options.only or chosen:
        if name in done:
            continue
        begun, passes[0] = time.perf_counter(), 0
        times = CLEAN if name == "clean" else 1
        result = chosen[name](model, images, labels, reevaluations=times * options.reevaluations)
        row = {
            "attack": name,
            "settings": repr(chosen[name]),
            "queries": result.queries,
            "passes_per_image": passes[0] / len(images),
            "seconds": time.perf_counter() - begun,
            "predictions": result.predictions.tolist(),
            "labels": labels.tolist(),
            "largest_distance": result.distance.max().item(),
        }
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(summary(row), flush=True)


def summary(row: dict, transfer: dict | None = None) -> str:
    """A row of the table; transfer: the row to compare with."""
    predictions, labels = torch.tensor(row["predictions"]), torch.tensor(row["labels"])
    right = predictions == labels
    cells = [f"{right.float().mean():.3f}", "" if transfer is None else compared(row, transfer)]
    cells += [interval(right.all(dim=0)), interval(vote_right(predictions, labels))]
    cells += [str(row["queries"]), f"{row['passes_per_image']:,.0f}", f"{row['seconds'] / 60:.1f} min"]
    return " | ".join(["| " + row["attack"], *cells]) + " |"


def compared(row: dict, other: dict) -> str:
    """The difference of two means of J, and its standard error over the images."""
    shares = [(torch.tensor(r["predictions"]) == torch.tensor(r["labels"])).double().mean(dim=0) for r in (row, other)]
    gap = shares[0] - shares[1]
    return f"{gap.mean():+.3f} ± {gap.std() / len(gap) ** 0.5:.3f}"


def vote_right(predictions: Tensor, labels: Tensor) -> Tensor:
    """Whether the most frequent of the predictions [..., J, B] is right, [..., B]."""
    return predictions.mode(dim=-2).values == labels


def interval(held: Tensor) -> str:
    """A share of images with its 95 % interval."""
    low, high = wilson_interval(int(held.sum()), len(held))
    return f"{held.float().mean():.3f} [{low:.2f}, {high:.2f}]"


def worst_by_chance(predictions: Tensor, labels: Tensor, reevaluations: int, attacks: int) -> float:
    """The worst of as many votes on clean images with unrelated noise: each is on ``reevaluations`` draws from the
    predictions for clean images."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(predictions), (200, attacks, reevaluations, predictions.shape[1]), generator=generator)
    drawn = predictions.gather(0, draws.flatten(0, 2)).view(draws.shape)
    return vote_right(drawn, labels).all(dim=1).float().mean().item()


def worst_attack(predictions: Tensor, labels: Tensor) -> Tensor:
    """[B], the share of right predictions under the worst attack on each image, of predictions [M, J, B].

    The attack is chosen by J - 1 of them and counted on the other, each in its turn, so that there is no selection
    effect. Or the share under one attack on all images, where that is less.
    """
    right = (predictions == labels).double()
    order = right.mean(dim=(1, 2)).argsort(stable=True)  # of equal ones, the strongest over all images
    right = right[order]
    others = right.sum(dim=1, keepdim=True) - right
    by_image = right.gather(0, others.argmin(dim=0)[None])[0].mean(dim=0)
    return min(by_image, right[0].mean(dim=0), key=lambda share: round(share.sum().item(), 9))


def table(rows: list[dict]) -> str:
    """All rows, the strongest first; the worst case of each image over the attacks with fresh noise, and by chance."""
    labels = torch.tensor(rows[0]["labels"])
    predictions = {row["attack"]: torch.tensor(row["predictions"]) for row in rows}
    attacks = [row for row in rows if row["attack"] != "clean"]
    attacks.sort(key=lambda row: (predictions[row["attack"]] == labels).float().mean().item())
    clean = [row for row in rows if row["attack"] == "clean"]
    head = "| attack | mean of J | to transfer | worst of J | vote of J | queries | backbone passes per image | time |"
    transfer = next((row for row in rows if row["attack"] == "transfer"), None)
    lines = [head, "| --- " * 8 + "|", *(summary(row, transfer) for row in [*clean, *attacks])]
    fresh = [predictions[row["attack"]] for row in attacks if "noise='known'" not in row["settings"]]
    if fresh:
        share = worst_attack(torch.stack(fresh), labels)
        low, high = wilson_interval(share.sum().item(), len(share))
        lines += [
            "",
            f"Predictions right under the worst attack on each image: {share.mean():.3f} [{low:.2f}, {high:.2f}]",
        ]
        held = torch.stack([vote_right(part, labels) for part in fresh]).all(dim=0)
        lines += [f"Vote, worst of {len(fresh)} attacks for each image: {interval(held)}"]
    if fresh and clean:
        by_chance = worst_by_chance(predictions["clean"], labels, len(fresh[0]), len(fresh))
        lines += [f"The same for clean images, voted on as often with unrelated noise: {by_chance:.3f}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--latents", type=int, default=4, help="K")
    parser.add_argument("--iterations", type=int, default=20, help="N")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--eps", type=float, default=0.05, help="linf")
    parser.add_argument("--reevaluations", type=int, default=5, help="J")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="some of the attacks")
    parser.add_argument("--table", action="store_true", help="print what is there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in SETTINGS}
    record, results = options.out / "settings.json", options.out / "results.jsonl"
    if record.exists() and json.loads(record.read_text()) != settings:
        sys.exit(
            f"{options.out} holds results for {record.read_text()}, but these settings are {json.dumps(settings)}."
        )
    record.write_text(json.dumps(settings))
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if not options.table:
        run(options, {row["attack"] for row in rows}, results)
        rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    print(table(rows) if rows else "nothing yet")


if __name__ == "__main__":
    main()
