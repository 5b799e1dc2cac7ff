"""A report as Markdown, from its JSON: tables with intervals, and beside each what it may not be read as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["HEADLINE", "accuracy", "headline_members", "markdown", "table"]

Facts = Mapping[str, Any]

HEADLINE = (
    "of the predictions are right under all attacks: the accuracy under the worst attack on each image, or the lowest "
    "re-purified accuracy of one attack where that is lower."
)
"""What the headline is, after its number."""


def markdown(facts: Facts) -> str:
    """The text of ``report.md`` from what :meth:`Report.to_dict` gives."""
    parts = [
        "# Robustness report",
        _headline(facts),
        _made_of(facts),
        "## Accuracy",
        _explained(facts),
        _accuracies(facts),
        _searched(facts),
        "## Checks of the attacks",
        _checks(facts),
        _sweeps(facts),
        _gradients(facts),
        "## Cost",
        _cost(facts),
        "## Settings of the attacks",
        _attacks(facts),
        COMPARING,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


COMPARING = """## What may be compared with this

- Figures at the same number of latents K and iterations N: a vote's robustness rises with its size.
- Not the figures of leaderboards such as RobustBench: they leave out defences that are random, optimise or vote, since
  their standard attack fails on those without a sign of it.
- Not the figures of a surrogate in which the purification's optimisation does not occur ("paper-" attacks): they are
  there for comparison with publications that measured so, and are no test of the defence."""


def _headline(facts: Facts) -> str:
    found = facts["headline"]
    if found is None:
        return "**No headline.** " + "\n".join(["", *(f"- {reason}" for reason in facts["refused"])])
    worst = ", ".join(f"{name} {count}" for name, count in found["chosen"].items() if count)
    spread = " One run." if found["spread"] is None else f" Standard deviation over the runs: {found['spread']:.3f}."
    return (
        f"**{accuracy(found['accuracy'])}** {HEADLINE}{spread}\n\n{headline_members(facts)}\n\n"
        f"The worst attack, number of images: {worst}. Counted in the usual way, as the share of images whose every "
        f"vote is right, it is {accuracy(found['lowest'])}. Of that, without any attack, luck would leave between "
        f"{found['clean']['value']:.3f}, the vote on clean images, and {found['lowest_by_luck']:.3f}, as many votes on "
        "them by unrelated noise."
    )


def headline_members(facts: Facts) -> str:
    """The two accuracies of which the headline is the lower one."""
    found, protocol = facts["headline"], facts["settings"]["protocol"]
    if found["single"] is None:
        lower = "no single attack leaves less"
    else:
        name = "the clean images have" if found["single"] == "control" else f"{found['single']} alone leaves"
        lower = f"{name} less, {accuracy(found['accuracy'])}, and that is the headline"
    return (
        f"With the worst attack chosen for each image by {protocol['answers']} predictions and counted on "
        f"{protocol['repurifications']} others it is {accuracy(found['by_image'])}; {lower}."
    )


def _made_of(facts: Facts) -> str:
    settings = facts["settings"]
    model, protocol, data = settings["models"]["defended"], settings["protocol"], settings["data"]
    runs = len(protocol["seeds"])
    lines = [f"{data['count']} images of {data['classes']} classes, {runs} run{'s' if runs > 1 else ''}."]
    if "settings" in model:
        loop, backbone = model["settings"], model["backbone"]
        lines.append(
            f"Backbone {backbone['name'] or backbone['class']}, K = {loop['n_latents']}, N = {loop['iterations']}, "
            f"learning rate {loop['learning_rate']:g}, w_ssim {loop['ssim_weight']:g}, "
            f"w_latent {loop['latent_weight']:g}; vote: {model['vote']}."
        )
    elif "purifier" in model:
        name, purifier = model["backbone"]["name"] or model["backbone"]["class"], purifier_text(model["purifier"])
        lines.append(f"Backbone {name}, {purifier}; vote: {model['vote']}.")
    return " ".join(lines) + " Accuracies have 95 % Wilson intervals on the images."


def purifier_text(purifier: Mapping[str, Any]) -> str:
    """A purifier as it would be written in Python."""
    settings = ", ".join(f"{name}={value!r}" for name, value in purifier.items() if name != "class")
    return f"{purifier['class']}({settings})"


def _explained(facts: Facts) -> str:
    protocol = facts["settings"]["protocol"]
    n, r = protocol["answers"], protocol["repurifications"]
    return (
        "Each final image is judged by fresh noise that no attack has seen, the same for all attacks. "
        f"*one-shot*: the first answer. *average*: over {n} answers. *any of {n}*: all of them right. "
        f"*vote of {n}*: the most frequent. *re-purified*: the average over {r} further answers, "
        "with the standard deviation of single ones."
    )


def _accuracies(facts: Facts) -> str:
    protocol = facts["settings"]["protocol"]
    n = protocol["answers"]
    several = len(protocol["seeds"]) > 1
    head = ["model", "attack", "one-shot", "average", f"any of {n}", f"vote of {n}", "re-purified", "one latent"]
    rows = []
    for row in facts["rows"]:
        cells = [_measured(row, name, several) for name in ("one_shot", "average", "any_of", "vote", "repurified")]
        cells[-1] += f" ± {row['answers_spread']:.3f}"
        latent = "" if row["one_latent"] is None else f"{row['one_latent']:.3f}"
        rows.append([row["subject"], row["attack"], *cells, latent])
    note = "\n\nIn round brackets: standard deviation over the runs." if several else ""
    return table(head, rows) + note


def _measured(row: Facts, name: str, several: bool) -> str:
    shown = accuracy(row[name])
    return f"{shown} ({row['spread'][name]:.3f})" if several else shown


def _searched(facts: Facts) -> str:
    rows = [
        [
            f"{row['subject']}/{row['attack']}",
            str(row["search_answers"]),
            accuracy(row["searched"]),
            "" if row["searched_by_luck"] is None else accuracy(row["searched_by_luck"]),
        ]
        for row in facts["rows"]
        if row["searched"] is not None
    ]
    if not rows:
        return ""
    text = (
        "Success while searching is no success: a random defence gives a wrong answer sooner or later. Accuracy if any "
        "wrong answer heard while searching counted, and for as many answers about the clean images:"
    )
    return text + "\n\n" + table(["attack", "answers", "while searching", "clean images, by luck"], rows)


def _checks(facts: Facts) -> str:
    words = {True: "yes", False: "**NO**", None: "not seen"}
    rows = [[check["name"], words[check["passed"]], check["found"]] for check in facts["checks"]]
    return table(["check", "holds", "found"], rows) if rows else "None were made."


def _sweeps(facts: Facts) -> str:
    parts = []
    for sweep in facts["sweeps"]:
        points = zip(sweep["values"], sweep["accuracies"], sweep["errors"], strict=True)
        rows = [[f"{value:g}", f"{share:.3f} ± {error:.3f}"] for value, share, error in points]
        parts.append(
            f"Accuracy over {sweep['name']}, with standard errors:\n\n" + table([sweep["name"], "accuracy"], rows)
        )
    return "\n\n".join(parts)


def _gradients(facts: Facts) -> str:
    if not facts["gradients"]:
        return ""
    rows = [
        [f"{row['samples']:.0f}", f"{row['cosine']:.3f} ± {row['error']:.3f}", f"{row['variance']:.3g}"]
        for row in facts["gradients"]
    ]
    text = "What averaging does to the gradient: the cosine of two independent averages, and their relative variance."
    return text + "\n\n" + table(["gradients averaged", "cosine", "variance / squared length"], rows)


def _cost(facts: Facts) -> str:
    count = facts["settings"]["data"]["count"]
    queries = {f"{row['subject']}/{row['attack']}": row["queries"] for row in facts["rows"]}
    rows = []
    for name, seconds in facts["seconds"].items():
        passes, asked = facts["passes"].get(name, 0), queries.get(name)
        rows.append([name, "" if asked is None else f"{asked:,}", f"{passes:,}", f"{seconds / 60:.1f}"])
    text = f"Queries per image; backbone passes and minutes of all {count} images and runs, on this machine."
    return text + "\n\n" + table(["task", "queries", "backbone passes", "minutes"], rows)


def _attacks(facts: Facts) -> str:
    rows = [
        [name, f"`{task['attack']}`"]
        for name, task in facts["settings"]["tasks"].items()
        if task["attack"] is not None and not name.startswith("checks/")
    ]
    return table(["attack", "settings"], rows) if rows else ""


def accuracy(value: Facts) -> str:
    """A share with its interval."""
    if value["value"] is None:
        return "no images"
    low, high = value["interval"]
    return f"{value['value']:.3f} [{low:.3f}, {high:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
