"""The plot of a study: accuracy over what was varied, and where it belongs to the study, the course of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cmap_defense.plots.figure import COLOURS, MARKERS, MUTED, draw, plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Study = Mapping[str, Any]


def study_plot(study: Study) -> bytes:
    """An SVG of a study."""
    panels: dict[str, list[Callable[[Axes, Study], None]]] = {
        "trajectory": [_accuracy_along_attack, _moments_along_attack, _accuracy_after, _moments_after],
        "vote": [_votes],
        "latent-weight": [_accuracy_over_values, _accuracy_after, _moments_after],
    }
    chosen = panels.get(study["name"], [_accuracy_over_values])
    columns = 3 if len(chosen) == 3 else min(len(chosen), 2)  # at most three fit on a page
    rows = len(chosen) // columns

    def fill(figure: Figure) -> None:
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, chosen, strict=True):
            panel(plain_axes(axes), study)
            axes.legend(frameon=False, fontsize=8)
        figure.suptitle(study["title"], fontsize=11)
        figure.set_layout_engine("constrained")

    return draw((4.6 * columns, 3.6 * rows), fill, purpose="The plot of a study is drawn with matplotlib")


def _accuracy_over_values(axes: Axes, study: Study) -> None:
    """Re-evaluated accuracy over the values, one line per attack."""
    values = sorted({entry["value"] for entry in study["rows"]})
    attacks = list(dict.fromkeys(entry["attack"] for entry in study["rows"]))
    for number, attack in enumerate(attacks):
        entries = sorted((e for e in study["rows"] if e["attack"] == attack), key=lambda e: e["value"])
        shares = [entry["row"]["reevaluated"] for entry in entries]
        shift = (number - (len(attacks) - 1) / 2) * 0.08
        axes.errorbar(
            [values.index(entry["value"]) + shift for entry in entries],
            [share["value"] for share in shares],
            yerr=[[abs(share["interval"][end] - share["value"]) for share in shares] for end in (0, 1)],
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            capsize=3,
            label=_shown(attack),
        )
    axes.set_xticks(range(len(values)), [f"{value:.3g}" for value in values])
    _accuracy_axis(axes, study["axis"])


def _votes(axes: Axes, study: Study) -> None:
    """One latent, one prediction and the vote of several, attack by attack."""
    names = [entry["attack"] for entry in study["rows"]]
    kinds = {"one latent": "one_latent", "one prediction: K latents vote": "average", "vote of the predictions": "vote"}
    for number, (label, kind) in enumerate(kinds.items()):
        values = [entry["row"][kind] for entry in study["rows"]]
        shares = [value["value"] if isinstance(value, Mapping) else value for value in values]
        places = [place + (number - 1) * 0.15 for place in range(len(names))]
        axes.plot(places, shares, MARKERS[number], color=COLOURS[number], label=label)
    axes.set_xticks(range(len(names)), [_shown(name) for name in names])
    _accuracy_axis(axes, "")


def _accuracy_along_attack(axes: Axes, study: Study) -> None:
    for number, (name, values) in enumerate(_searches(study, "right").items()):
        axes.plot(values, color=COLOURS[number], label=name)
    _accuracy_axis(axes, "step of the attack")
    axes.set_title("share of attacked images classified right", fontsize=10)


def _moments_along_attack(axes: Axes, study: Study) -> None:
    names = {"latent_mean": "mean (prior: 0)", "latent_std": "standard deviation (prior: 1)"}
    for number, (name, label) in enumerate(names.items()):
        axes.plot(next(iter(_searches(study, name).values())), color=COLOURS[number], label=label)
        axes.axhline(float(number), color=MUTED, linestyle="--", linewidth=1)
    axes.set_xlabel("step of the attack")
    axes.set_title("latents along the attack", fontsize=10)


def _accuracy_after(axes: Axes, study: Study) -> None:
    """Accuracy of the vote along the purification."""
    for number, (name, curve) in enumerate(_curves(study).items()):
        marker, colour = MARKERS[number % len(MARKERS)], COLOURS[number % len(COLOURS)]
        axes.plot(curve["iterations"], curve["accuracy"], label=name, marker=marker, color=colour)
    _accuracy_axis(axes, "iteration of the purification")
    axes.set_title(f"vote along the purification{_of_attack(study)}", fontsize=10)


def _moments_after(axes: Axes, study: Study) -> None:
    """Standard deviations of the latents along the purification; the prior has 1."""
    for number, (name, curve) in enumerate(_curves(study).items()):
        axes.plot(curve["latent_std"], color=COLOURS[number % len(COLOURS)], label=name)
    axes.axhline(1.0, color=MUTED, linestyle="--", linewidth=1)
    axes.set_xlabel("iteration of the purification")
    axes.set_ylabel("standard deviation of the latents")
    axes.set_title(f"latents along the purification{_of_attack(study)}", fontsize=10)


def _searches(study: Study, name: str) -> dict[str, Sequence[float]]:
    """By attack, what it recorded under a name."""
    tasks = [task for searches in study["searches"].values() for task in searches.items()]
    return {task.split("/")[-1]: recorded[name] for task, recorded in tasks if name in recorded}


def _curves(study: Study) -> dict[str, Mapping[str, Any]]:
    """The course of the purification: by attack, or by variant under the last attack where there are several."""
    if len(study["curves"]) == 1:
        tasks = next(iter(study["curves"].values()))
        return {_shown(task.split("/")[-1]): curves for task, curves in tasks.items()}
    task = f"defended/{study['rows'][-1]['attack']}"
    return {f"{study['axis']} = {variant}": tasks[task] for variant, tasks in study["curves"].items() if task in tasks}


def _of_attack(study: Study) -> str:
    return "" if len(study["curves"]) == 1 else f", {study['rows'][-1]['attack']}"


def _shown(attack: str) -> str:
    return "clean images" if attack == "clean" else attack


def _accuracy_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy")
