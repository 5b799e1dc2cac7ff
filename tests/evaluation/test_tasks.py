"""The work on one group: what its lines hold, against the same computed directly."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attack_toys import QUICK, THREATS, Noisy, labelled, linear, suite, wrapped
from cmap_defense.attacks import PGD, SPSA, Attack, LatentAttack, Margin, ShortCMAP, ThreatModel, Transfer, VoteMargin
from cmap_defense.common.passes import counting_passes
from cmap_defense.common.rng import derived_seeds
from cmap_defense.errors import SettingsError
from cmap_defense.evaluation import Protocol
from cmap_defense.evaluation.predictions import predict
from cmap_defense.evaluation.protocol import prediction_seeds, run_indices
from cmap_defense.evaluation.tasks import (
    Batch,
    GradientTask,
    PredictionTask,
    Task,
    check_attack,
    check_variants,
    make_tasks,
)
from cmap_defense.gradients import StraightThrough, Surrogate
from evaluated import Shaky, shaken
from toys import uniform

LINF = THREATS["linf"]
POSITIONS = torch.tensor([31, 4, 12])
RUN = 3
PREDICTIONS, AGAIN = 3, 2


def batch(images: Tensor | None = None, labels: Tensor | None = None) -> Batch:
    """Three images somewhere in a data set, in some run."""
    if images is None or labels is None:
        images, labels = labelled(3)
    positions = POSITIONS[: len(images)]
    return Batch(images, labels, positions, run_indices(positions, RUN))


def attack_task(model: Any, attack: Attack, **options: Any) -> PredictionTask:
    given = {"predictions": PREDICTIONS, "reevaluations": AGAIN, "row": "something", "model_name": "someone"}
    return PredictionTask(model=model, attack=attack, **(given | options))


def clean_task(model: Any, search: int = 0) -> PredictionTask:
    counts = {"predictions": PREDICTIONS, "reevaluations": AGAIN}
    return PredictionTask(model_name="someone", model=model, search=search, **counts)


def gradient_task(model: Any, attack: PGD, samples: int = 4, **options: Any) -> GradientTask:
    return GradientTask(**({"model_name": "someone", "model": model, "attack": attack, "samples": samples} | options))


Output = tuple[list[dict[str, Any]], dict[str, Tensor]]


def attacked(model: Any, attack: Attack, given: Batch | None = None) -> Output:
    return attack_task(model, attack).run(given or batch())


def column(output: Output, name: str) -> list[Any]:
    return [line[name] for line in output[0]]


HOW = {
    "PGD": PGD(LINF, steps=2, eot=2),
    "PGD, two attempts": PGD(LINF, steps=2, keep="best", seed=5),
    "PGD, two restarts": PGD(LINF, steps=1, restarts=2),
    "PGD, known noise": PGD(LINF, steps=2, noise="known"),
    "SPSA": SPSA(LINF, steps=2, pairs=2),
    "Transfer": Transfer(PGD(LINF, steps=2)),
    "LatentAttack": LatentAttack(LINF, steps=3, latents=2),
}


@pytest.mark.parametrize("name", HOW)
def test_an_attacks_lines_and_tensors(name: str) -> None:
    """The attack with the group's noise indices, then predictions 0 to N + R - 1 about its images."""
    model, how, given = wrapped(), HOW[name], batch()
    output = attacked(model, how)
    result = how(model, given.images, given.labels, indices=given.indices)
    found = torch.stack(
        [
            model(result.images, seeds=prediction_seeds(given.indices, n)).argmax(dim=1)
            for n in range(PREDICTIONS + AGAIN)
        ]
    )
    assert column(output, "image") == POSITIONS.tolist()
    assert column(output, "label") == given.labels.tolist()
    assert column(output, "predictions") == found[:PREDICTIONS].T.tolist()
    assert column(output, "reevaluated") == found[PREDICTIONS:].T.tolist()
    assert column(output, "queries") == [result.queries] * 3
    assert column(output, "distance") == result.distance.tolist()
    norms = result.history.get("gradient_norm")
    assert column(output, "zero_gradient") == [None if norms is None else False] * 3

    further = predict(model, result.images, given.labels, given.indices, range(PREDICTIONS + AGAIN))
    assert further.one_latent is not None
    assert column(output, "one_latent") == pytest.approx(further.one_latent.mean(dim=0).tolist())
    assert further.vote_right is not None
    assert column(output, "vote_right") == further.vote_right.T.tolist()

    loop = {f"loop.{field}" for field in ("l1", "ssim", "latent", "total", "latent_mean", "latent_std")}
    history = {f"history.{field}" for field in result.history}
    assert set(output[1]) == {"images", "purified"} | loop | history
    assert torch.equal(output[1]["images"], result.images)
    for field, values in result.history.items():
        assert torch.equal(output[1][f"history.{field}"], values)
        assert output[1][f"history.{field}"].shape[1] == 3
    assert output[1]["loop.total"].shape == (QUICK.iterations, 3)
    for line in output[0]:
        assert json.loads(json.dumps(line, allow_nan=False)) == line


def test_a_gradient_of_zero_is_in_the_line_and_warns_nobody() -> None:
    """Of dark images; warnings are errors here."""

    def blind(images: Tensor) -> Tensor:
        dark = images.flatten(1).mean(dim=1, keepdim=True) < 0.5
        logits = linear(images)
        return torch.where(dark, logits.detach(), logits)

    images = torch.cat([0.2 * uniform(1, 3, 8, 6, seed=0), 1 - 0.2 * uniform(2, 3, 8, 6, seed=1)])
    output = attacked(blind, PGD(LINF, steps=2), batch(images, torch.tensor([0, 1, 2])))
    assert column(output, "zero_gradient") == [True, False, False]


SEARCHES = {
    **HOW,
    "PGD, all of it": PGD(LINF, steps=3, eot=2, restarts=2, keep="best", loss=VoteMargin()),
    "SPSA, all of it": SPSA(LINF, steps=2, pairs=3, restarts=2, keep="best"),
    "SPSA, other noise": SPSA(LINF, steps=2, pairs=2, common_noise=False),
    "PGD, far": PGD(ThreatModel(eps=0.8), steps=2),
    "PGD, near": PGD(ThreatModel(eps=1e-6), steps=2),
}


@pytest.mark.parametrize("name", [name for name in SEARCHES if name.startswith(("PGD", "SPSA", "APGD"))])
def test_the_predictions_of_a_search_are_counted(name: str) -> None:
    """All evaluations of the model but for the choice between the attempts, where there are some, and one judgement;
    and whether one of those predictions was wrong, the choice's included. By known noise it is one prediction again and
    again."""
    model, how, given = Shaky(0.3), SEARCHES[name], batch()
    result = how(model, given.images, given.labels, indices=given.indices)
    attempts = result.candidates.shape[1]
    found = torch.stack(model.predicted[:-1])
    chosen = attempts if attempts > 1 else 0
    assert len(model.predicted) == result.queries == len(found) + 1
    unrelated = 1 if how.noise == "known" else len(found) - chosen
    assert how.predictions_per_image() == unrelated

    output = attacked(Shaky(0.3), how)
    assert column(output, "search_predictions") == [unrelated + chosen] * 3
    assert column(output, "search_succeeded") == (found != given.labels).any(dim=0).tolist()


def test_a_search_that_evaluates_something_else_has_no_predictions() -> None:
    names = {
        name: how.predictions_per_image()
        for name, how in suite(LINF).items()
        if not name.startswith(("PGD", "SPSA", "APGD"))
    }
    assert set(names.values()) == {0}
    one = attacked(wrapped(), HOW["Transfer"])
    assert column(one, "search_succeeded") == column(one, "search_predictions") == [None] * 3
    attempts = attacked(wrapped(), HOW["LatentAttack"])
    assert column(attempts, "search_predictions") == [2] * 3
    result = HOW["LatentAttack"](wrapped(), batch().images, batch().labels, indices=batch().indices)
    assert column(attempts, "search_succeeded") == result.any_candidate_success.tolist()


@pytest.mark.parametrize("model", [wrapped(), Noisy(), linear], ids=["purified", "seeded", "function"])
def test_clean_images_are_those_of_an_attack_of_no_size(model: Any) -> None:
    clean = clean_task(model).run(batch())
    nothing = attacked(model, PGD(ThreatModel(eps=0.0), steps=1, step_size=0.0))
    for name in ("image", "label", "predictions", "reevaluated", "one_latent", "vote_right"):
        assert column(clean, name) == column(nothing, name)
    assert column(clean, "search") == [[]] * 3
    assert torch.equal(clean[1]["images"], nothing[1]["images"])
    assert torch.equal(clean[1]["images"], batch().images)
    assert clean[1].keys() == {name for name in nothing[1] if not name.startswith("history.")}


def test_clean_images_have_as_many_predictions_as_a_search() -> None:
    given, model = batch(), wrapped()
    output = clean_task(model, 4).run(given)
    numbers = range(PREDICTIONS + AGAIN, PREDICTIONS + AGAIN + 4)
    found = torch.stack([model(given.images, seeds=prediction_seeds(given.indices, n)).argmax(dim=1) for n in numbers])
    assert column(output, "search") == found.T.tolist()
    assert (found != found[0]).any()


def test_the_lines_do_not_depend_on_the_batch() -> None:
    """An image in a group of its own, with the model in chunks."""
    model, whole = wrapped(max_parallel=3), batch()
    tasks = [attack_task(model, PGD(LINF, steps=2, eot=2)), clean_task(model, 2), gradient_task(model, PGD(LINF), 4)]
    for task in tasks:
        output = task.run(whole)
        for row in range(3):
            alone = Batch(*(part[row : row + 1] for part in (whole.images, whole.labels, POSITIONS, whole.indices)))
            (line,) = task.run(alone)[0]
            for name, value in output[0][row].items():
                close = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
                if name in ("cosines", "variances"):
                    close = pytest.approx(value, rel=1e-3, abs=1e-5)
                assert line[name] == close, name


def drawn_gradients(model: Any, how: PGD, given: Batch, samples: int) -> np.ndarray:
    """[samples, B, elements]: of the loss at the random start, each with the next noise of the attack's seed."""
    from cmap_defense.attacks.goal import Goal
    from cmap_defense.attacks.steps import random_point

    base = derived_seeds(given.indices, how.seed)
    found = []
    for number in range(1, samples + 1):
        point = random_point(how.threat, given.indices, given.images).requires_grad_()
        logits = model(point, seeds=derived_seeds(base, number))
        (gradient,) = torch.autograd.grad(how.loss(logits[None], Goal(given.labels)).sum(), point)
        found.append(gradient.flatten(1))
    return torch.stack(found).double().numpy()


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (Noisy(3.0), PGD(LINF, seed=2)),
        (Noisy(3.0), PGD(THREATS["l2"], loss=Margin())),
        (wrapped(gradient=Surrogate()), PGD(LINF, eot=3)),
    ],
    ids=["linf", "l2", "purified"],
)
def test_cosines_and_variances(model: Any, how: PGD) -> None:
    samples, given = 9, batch()
    output = gradient_task(model, how, samples).run(given)
    assert output[1] == {}
    gradients = drawn_gradients(model, how, given, samples)
    for row, line in enumerate(output[0]):
        assert (line["image"], line["label"]) == (POSITIONS[row], given.labels[row])
        assert line["samples"] == [1, 2, 4]
        own = gradients[:, row]
        for n, cosine, variance in zip(line["samples"], line["cosines"], line["variances"], strict=True):
            one, other = own[:n].mean(axis=0), own[n : 2 * n].mean(axis=0)
            assert cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-4)
            means = np.stack([own[start : start + n].mean(axis=0) for start in range(0, samples - n + 1, n)])
            expected = means.var(axis=0, ddof=1).sum() / (own.mean(axis=0) ** 2).sum()
            assert variance == pytest.approx(expected, rel=1e-4)
        assert max(line["cosines"]) < 0.9999


def test_gradients_of_a_balanced_attack_have_one_length_before_they_are_averaged() -> None:
    model, how, given = wrapped(gradient=Surrogate()), PGD(LINF, balanced=True), batch()
    raw = drawn_gradients(model, PGD(LINF), given, 4)
    units = raw / np.linalg.norm(raw, axis=2, keepdims=True)
    for row, line in enumerate(gradient_task(model, how, 4).run(given)[0]):
        one, other = units[:2, row].mean(axis=0), units[2:, row].mean(axis=0)
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert line["cosines"][1] == pytest.approx(cosine, rel=1e-4)
        one, other = raw[:2, row].mean(axis=0), raw[2:, row].mean(axis=0)
        assert abs(line["cosines"][1] - one @ other / np.linalg.norm(one) / np.linalg.norm(other)) > 1e-4


def test_the_gradient_mode_of_the_attack_is_the_one_measured() -> None:
    given = batch()
    alone = gradient_task(wrapped(gradient=Surrogate()), PGD(LINF), 4).run(given)
    own = gradient_task(wrapped(), PGD(LINF, gradient=Surrogate()), 4).run(given)
    assert own[0] == alone[0]
    assert gradient_task(wrapped(), PGD(LINF), 4).run(given)[0] != alone[0]


TASKS = {
    "attack": lambda: attack_task(shaken, PGD(LINF, steps=2)),
    "clean": lambda: clean_task(shaken, 2),
    "gradients": lambda: gradient_task(shaken, PGD(LINF), 4),
}


@pytest.mark.parametrize("name", TASKS)
def test_torchs_generators_are_left_alone_and_have_no_say(name: str) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(TASKS[name]().run(batch())[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_names_and_descriptions() -> None:
    tasks: list[Task] = [
        attack_task(linear, PGD(LINF), limit=4, once=True),
        clean_task(linear, 2),
        gradient_task(linear, PGD(LINF), model_name="checks", limit=4),
    ]
    assert [task.name for task in tasks] == ["someone/something", "someone/clean", "checks/gradients"]
    attack = PGD(LINF).to_dict()
    assert attack["threat"] == {"class": "ThreatModel", "norm": "linf", "eps": 0.1}
    assert [task.describe() for task in tasks] == [
        {"attack": attack, "images": 4, "once": True},
        {"attack": None, "search": 2, "images": None, "once": False},
        {"attack": attack, "samples": 4, "images": 4, "once": True},
    ]


def test_passes_of_a_task_are_those_that_it_makes() -> None:
    """Where gradients do not go back through the purification."""
    model, given = wrapped(gradient=StraightThrough(), max_parallel=1000), batch()
    for task in (clean_task(model, 2), attack_task(model, PGD(LINF, steps=2, eot=2)), attack_task(model, HOW["SPSA"])):
        with counting_passes() as passes:
            task.run(given)
        assert passes.total == 3 * (task.passes_per_image() or 0)
    assert gradient_task(model, PGD(LINF)).passes_per_image() == 4 * model.purifier.passes
    assert clean_task(linear).passes_per_image() == 0
    assert attack_task(model, ShortCMAP(LINF)).passes_per_image() is None


SHAPE = (3, 8, 6)
L2 = ThreatModel(norm="l2", eps=0.5)
TRANSFER, STEPS = Transfer(PGD(LINF)), PGD(LINF, steps=8, step_size=0.01, eot=3)
PROTOCOL = Protocol(predictions=5, reevaluations=7, seeds=(0, 1), sanity_images=4, gradient_samples=6)


def made(protocol: Protocol = PROTOCOL, other: dict[str, Attack] | None = None, **attacks: Attack) -> list[Task]:
    named = {name.replace("_", "-"): attack for name, attack in attacks.items()}
    models = {"defended": linear} | ({} if other is None else {"other": linear})
    return make_tasks(models, {"defended": named, "other": other or {}}, protocol, SHAPE)


def test_all_tasks_and_their_order() -> None:
    tasks = made(transfer=TRANSFER, pgd=STEPS, other={"pgd": PGD(LINF, steps=3)})
    checks = ["steps-2", "steps-4", "eps-0.25x", "eps-0.5x", "eps-2x", "eps-4x", "eps-any", "gradients"]
    assert [task.name for task in tasks] == [
        "defended/clean", "defended/transfer", "defended/pgd", "other/clean", "other/pgd",
        *(f"checks/{name}" for name in checks),
    ]  # fmt: skip
    by_name: dict[str, Any] = {task.name: task for task in tasks}
    for task in tasks:
        assert (task.limit, task.once) == ((4, True) if task.model_name == "checks" else (None, False))
        if isinstance(task, PredictionTask):
            assert (task.predictions, task.reevaluations) == (5, 1 if task.model_name == "checks" else 7)
    assert [by_name[f"{name}/clean"].search for name in ("defended", "other")] == [8 * 3, 3]
    assert (by_name["checks/gradients"].attack, by_name["checks/gradients"].samples) == (STEPS, 6)
    assert by_name["checks/steps-2"].attack == PGD(LINF, steps=2, step_size=0.01, eot=3)
    assert by_name["checks/eps-2x"].attack == PGD(ThreatModel(eps=0.2), steps=8, eot=3)
    assert by_name["checks/eps-any"].attack.threat.eps == 1.0
    assert by_name["defended/pgd"].attack == STEPS


def test_tasks_that_may_be_left_out() -> None:
    names = [task.name for task in made(PROTOCOL.replace(sanity_images=0), pgd=STEPS)]
    assert names == ["defended/clean", "defended/pgd"]
    clean = made(PROTOCOL.replace(search_on_clean=False), pgd=STEPS)[0]
    assert isinstance(clean, PredictionTask)
    assert clean.search == 0
    assert [task.name for task in made()] == ["defended/clean"]


@pytest.mark.parametrize(
    ("attacks", "name"),
    [
        ({"first": PGD(LINF, steps=3), "bpda-eot": STEPS}, "bpda-eot"),
        ({"transfer": TRANSFER, "first": STEPS, "second": PGD(LINF, steps=3)}, "first"),
        ({"known": PGD(LINF, noise="known"), "second": STEPS}, "second"),
        ({"bpda-eot": SPSA(LINF), "second": STEPS}, "second"),
        ({"bpda-eot": PGD(LINF, noise="known"), "second": STEPS}, "second"),
    ],
)
def test_the_checks_are_made_with_a_pgd_on_the_model_itself(attacks: dict[str, Any], name: str) -> None:
    assert check_attack(linear, attacks) == (name, STEPS)
    assert "checks/attack" not in [task.name for task in made(**attacks)]


def test_without_one_the_checks_have_an_attack_of_their_own() -> None:
    name, attack = check_attack(linear, {"transfer": Transfer(PGD(L2))})
    assert name is None
    assert (attack.threat, attack.gradient, attack.noise) == (L2, None, "fresh")
    own, short = wrapped(), {"short": ShortCMAP(LINF)}
    name, attack = check_attack(own, short)
    assert (name, attack.gradient) == (None, StraightThrough())
    tasks: dict[str, Any] = {
        task.name: task for task in make_tasks({"defended": own}, {"defended": short}, PROTOCOL, SHAPE)
    }
    assert tasks["checks/attack"].attack == attack
    assert "checks/steps-5" in tasks


@pytest.mark.parametrize(("steps", "fewer"), [(1, []), (2, [1]), (3, [1]), (4, [1, 2]), (20, [5, 10])])
def test_fewer_steps(steps: int, fewer: list[int]) -> None:
    found = check_variants(PGD(LINF, steps=steps), SHAPE)
    assert [attack.steps for name, attack in found.items() if name.startswith("steps-")] == fewer


@pytest.mark.parametrize(
    ("threat", "sizes"),
    [
        (LINF, {"eps-0.25x": 0.025, "eps-0.5x": 0.05, "eps-2x": 0.2, "eps-4x": 0.4, "eps-any": 1.0}),
        (ThreatModel(eps=0.3), {"eps-0.25x": 0.075, "eps-0.5x": 0.15, "eps-2x": 0.6, "eps-any": 1.0}),
        (ThreatModel(eps=0.25), {"eps-0.25x": 0.0625, "eps-0.5x": 0.125, "eps-2x": 0.5, "eps-any": 1.0}),
        (L2, {"eps-0.25x": 0.125, "eps-0.5x": 0.25, "eps-2x": 1.0, "eps-4x": 2.0, "eps-any": 12.0}),
    ],
)
def test_other_sizes(threat: ThreatModel, sizes: dict[str, float]) -> None:
    variants = check_variants(PGD(threat), SHAPE)
    found = {name: attack.threat.eps for name, attack in variants.items() if name.startswith("eps-")}
    assert found == pytest.approx(sizes)
    assert list(found) == list(sizes)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/", "/a", "a/../b", "a\\b", "end.", "a:b", "a*", "a?"])
def test_names_that_are_no_words_are_refused(name: str) -> None:
    for model, row in (("defended", name), (name, "pgd")):
        with pytest.raises(SettingsError, match="is no name for a file"):
            make_tasks({model: linear}, {model: {row: STEPS}}, PROTOCOL, SHAPE)


@pytest.mark.parametrize(
    ("model", "attacks", "said"),
    [
        ("other", {"clean": STEPS}, "'other/clean' names two tasks"),
        ("checks", {"steps-2": STEPS}, "'checks/steps-2' names two tasks"),
        ("other", {"pgd": STEPS, "PGD": STEPS}, "names two tasks"),
    ],
)
def test_names_that_clash_are_refused(model: str, attacks: dict[str, Attack], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        make_tasks({"defended": linear, model: linear}, {"defended": {"pgd": STEPS}, model: attacks}, PROTOCOL, SHAPE)
