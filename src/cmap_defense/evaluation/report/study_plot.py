"""The plot of a study: accuracy over what was varied, and where it belongs to the study, the course of it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from cmap_defense.errors import MissingExtraError

__all__ = ["study_plot"]

Facts = Mapping[str, Any]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart."""

MARKERS = "osD^vPX"


def study_plot(facts: Facts) -> str:
    """An SVG from what :meth:`StudyResult.to_dict` gives.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"The plot needs matplotlib, which cannot be imported ({error}): pip install 'cmap-defense[report]'."
        ) from error
    with matplotlib.rc_context({"svg.hashsalt": "cmap-defense", "svg.fonttype": "none", "font.size": 10}):
        panels = _panels(facts)
        figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw(axes, facts)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(facts["title"], fontsize=11)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()


def _panels(facts: Facts) -> list[Any]:
    """What is drawn, from left to right."""
    if facts["name"] == "trajectory":
        return [_along_attack, _moments_along_attack, _after, _moments_after]
    if facts["name"] == "vote":
        return [_votes]
    return [_over, _after, _moments_after] if facts["name"] == "latent-weight" else [_over]


def _over(axes: Any, facts: Facts) -> None:
    """Accuracy of an answer over the values, one line per attack."""
    attacks = list(dict.fromkeys(entry["attack"] for entry in facts["rows"]))
    values = sorted({entry["value"] for entry in facts["rows"]})
    places = {value: place for place, value in enumerate(values)}
    for number, attack in enumerate(attacks):
        entries = sorted((e for e in facts["rows"] if e["attack"] == attack), key=lambda e: e["value"])
        shares = [entry["row"]["repurified"] for entry in entries]
        middle = [share["value"] for share in shares]
        low = [share["value"] - share["interval"][0] for share in shares]
        high = [share["interval"][1] - share["value"] for share in shares]
        shift = (number - (len(attacks) - 1) / 2) * 0.08
        axes.errorbar(
            [places[entry["value"]] + shift for entry in entries],
            middle,
            yerr=[low, high],
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            label="clean images" if attack == "control" else attack,
        )
    axes.set_xticks(range(len(values)), [f"{value:.3g}" for value in values])
    _accuracy_axis(axes, facts["axis"])


def _votes(axes: Any, facts: Facts) -> None:
    """One latent, one answer and the vote of several, attack by attack."""
    names = [entry["attack"] for entry in facts["rows"]]
    kinds = {"one latent": "one_latent", "one answer: K latents vote": "average", "vote of the answers": "vote"}
    for number, (label, kind) in enumerate(kinds.items()):
        values = [entry["row"][kind] for entry in facts["rows"]]
        shares = [value["value"] if isinstance(value, Mapping) else value for value in values]
        places = [place + (number - 1) * 0.15 for place in range(len(names))]
        axes.plot(places, shares, MARKERS[number], color=COLOURS[number], label=label)
    axes.set_xticks(range(len(names)), ["clean images" if name == "control" else name for name in names])
    _accuracy_axis(axes, "")


def _along_attack(axes: Any, facts: Facts) -> None:
    for number, (name, values) in enumerate(_searches(facts, "right").items()):
        axes.plot(values, color=COLOURS[number], label=name)
    _accuracy_axis(axes, "step of the attack")
    axes.set_title("share of attacked images classified right", fontsize=10)


def _moments_along_attack(axes: Any, facts: Facts) -> None:
    means, deviations = _searches(facts, "latent_mean"), _searches(facts, "latent_std")
    _moments(axes, next(iter(means.values())), next(iter(deviations.values())))
    axes.set_xlabel("step of the attack")
    axes.set_title("latents along the attack", fontsize=10)


def _after(axes: Any, facts: Facts) -> None:
    """Accuracy of the vote along the purification."""
    for number, (name, curves) in enumerate(_curves(facts).items()):
        axes.plot(
            curves["iterations"],
            curves["accuracy"],
            MARKERS[number % len(MARKERS)] + "-",
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    _accuracy_axis(axes, "iteration of the purification")
    axes.set_title(f"vote along the purification{_of_attack(facts)}", fontsize=10)


def _moments_after(axes: Any, facts: Facts) -> None:
    """Latent deviations along the purification; the prior has 1."""
    for number, (name, curves) in enumerate(_curves(facts).items()):
        axes.plot(curves["latent_std"], color=COLOURS[number % len(COLOURS)], label=name)
    axes.axhline(1.0, color="#777777", linestyle="--", linewidth=1)
    axes.set_xlabel("iteration of the purification")
    axes.set_ylabel("standard deviation of the latents")
    axes.set_title(f"latents along the purification{_of_attack(facts)}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _moments(axes: Any, mean: Sequence[float], deviation: Sequence[float]) -> None:
    axes.plot(mean, color=COLOURS[0], label="mean (prior: 0)")
    axes.plot(deviation, color=COLOURS[1], label="standard deviation (prior: 1)")
    for level in (0.0, 1.0):
        axes.axhline(level, color="#777777", linestyle="--", linewidth=1)
    axes.legend(frameon=False, fontsize=8)


def _searches(facts: Facts, name: str) -> dict[str, Sequence[float]]:
    """By attack, what it noted under a name."""
    found = {}
    for searches in facts["searches"].values():
        for task, noted in searches.items():
            if name in noted:
                found[task.split("/")[-1]] = noted[name]
    return found


def _curves(facts: Facts) -> dict[str, Facts]:
    """The course of the purification: by attack, or by variant under :func:`_shown_attack` where there are several."""
    if len(facts["curves"]) == 1:
        tasks = next(iter(facts["curves"].values()))
        return {task.split("/")[-1].replace("control", "clean images"): curves for task, curves in tasks.items()}
    task = f"defended/{_shown_attack(facts)}"
    return {f"{facts['axis']} = {variant}": tasks[task] for variant, tasks in facts["curves"].items() if task in tasks}


def _shown_attack(facts: Facts) -> str:
    """The last of the attacks, whose purifications are drawn where there are several variants."""
    return facts["rows"][-1]["attack"]


def _of_attack(facts: Facts) -> str:
    return "" if len(facts["curves"]) == 1 else f", {_shown_attack(facts)}"


def _accuracy_axis(axes: Any, label: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False, fontsize=8)
