"""The Markdown of a report holds its figures, and says what they may not be read as."""

from __future__ import annotations

from typing import Any

import pytest

from cmap_defense.evaluation.report.markdown import COMPARING, HEADLINE, accuracy, markdown, table
from facts_example import TITLES, example_facts


def rows_of(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose heading begins so."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {head} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def test_a_headline_says_how_it_was_counted() -> None:
    facts = example_facts()
    text = markdown(facts)
    found = facts["headline"]
    assert f"**{accuracy(found['accuracy'])}** {HEADLINE}" in text
    assert f"on {facts['settings']['protocol']['repurifications']} others it is {accuracy(found['by_image'])};" in text
    assert "no single attack leaves less." in text
    assert f"{found['spread']:.3f}" in text
    assert accuracy(found["lowest"]) in text
    assert f"luck would leave between {found['clean']['value']:.3f}, the vote on clean images" in text
    assert f"and {found['lowest_by_luck']:.3f}, as many votes on them by unrelated noise" in text
    worst, *_, none = sorted(found["chosen"].items(), key=lambda item: -item[1])
    assert f"{worst[0]} {worst[1]}" in text
    assert none[1] == 0
    assert f"{none[0]} 0" not in text
    assert "No headline" not in text


@pytest.mark.parametrize(
    ("single", "said"), [("pgd", "pgd alone leaves less, "), ("control", "the clean images have less, ")]
)
def test_a_headline_of_one_attack_says_so(single: str, said: str) -> None:
    facts = example_facts()
    found = facts["headline"]
    found |= {"single": single, "by_image": found["clean"]}
    text = markdown(facts)
    assert f"others it is {accuracy(found['clean'])}; {said}{accuracy(found['accuracy'])}, and that is the" in text


def test_without_a_headline_the_reasons_and_remedies_come_first() -> None:
    facts = example_facts(failed=TITLES[-2:])
    assert all(reason.endswith(f"Do this about {7 + n}.") for n, reason in enumerate(facts["refused"]))
    text = markdown(facts)
    first, rest = text.split("## Accuracy")
    assert "**No headline.**" in first
    assert all(f"- {reason}" in first for reason in facts["refused"])
    assert len(facts["refused"]) == 2
    assert rest.count("| **NO** |") == 2


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_accuracy_stands_in_the_table(seeds: tuple[int, ...]) -> None:
    facts = example_facts(seeds=seeds)
    shown = rows_of(markdown(facts), "model")
    assert len(shown) == len(facts["rows"])
    for cells, row in zip(shown, facts["rows"], strict=True):
        assert cells[:2] == [row["subject"], row["attack"]]
        for cell, name in zip(cells[2:7], ("one_shot", "average", "any_of", "vote", "repurified"), strict=True):
            assert cell.startswith(accuracy(row[name]))
            assert (f"({row['spread'].get(name, 0):.3f})" in cell) == (len(seeds) > 1)
        assert cells[6].endswith(f"± {row['answers_spread']:.3f}")
        assert cells[7] == ("" if row["one_latent"] is None else f"{row['one_latent']:.3f}")


def test_searches_stand_beside_luck() -> None:
    facts = example_facts()
    shown = rows_of(markdown(facts), "attack")
    searched = [row for row in facts["rows"] if row["searched"] is not None]
    assert [cells[2:] for cells in shown] == [
        [accuracy(r["searched"]), accuracy(r["searched_by_luck"])] for r in searched
    ]


def test_checks_sweeps_gradients_and_costs() -> None:
    facts = example_facts(failed=TITLES[:1], unseen=TITLES[1:2])
    text = markdown(facts)
    assert [cells[:2] for cells in rows_of(text, "check")][:3] == [
        [TITLES[0], "**NO**"],
        [TITLES[1], "not seen"],
        [TITLES[2], "yes"],
    ]
    for sweep in facts["sweeps"]:
        shown = rows_of(text, sweep["name"])
        assert [cells[1] for cells in shown] == [
            f"{share:.3f} ± {error:.3f}" for share, error in zip(sweep["accuracies"], sweep["errors"], strict=True)
        ]
    assert len(rows_of(text, "gradients averaged")) == len(facts["gradients"])
    costs = rows_of(text, "task")
    assert {cells[0]: cells[2] for cells in costs} == {name: f"{passes:,}" for name, passes in facts["passes"].items()}
    assert COMPARING in text


@pytest.mark.parametrize(
    "missing",
    [
        {"checks": [], "sweeps": [], "gradients": []},
        {"curves": {}},
        {"rows": []},
        {"seconds": {}, "passes": {}},
        {"class_names": None},
    ],
)
def test_parts_may_be_missing(missing: dict[str, Any]) -> None:
    text = markdown(example_facts() | missing)
    assert text.startswith("# Robustness report\n")
    assert text.endswith(COMPARING + "\n")


def test_a_model_without_latents() -> None:
    facts = example_facts(baselines=())
    facts["settings"]["models"]["defended"] = {"class": "Plain", "weights": "", "precision": "float32"}
    for row in facts["rows"]:
        row["one_latent"] = None
    text = markdown(facts)
    assert "Backbone" not in text
    assert all(cells[7] == "" for cells in rows_of(text, "model"))


def test_a_bar_in_a_name_does_not_end_its_cell() -> None:
    assert table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_no_images_have_no_accuracy() -> None:
    assert accuracy({"value": None, "interval": [0.0, 1.0]}) == "no images"
