"""An evaluation: done in work units, killed and continued to the same bytes, refused where something differs."""

import copy
import dataclasses
import gc
import json
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from attack_toys import CLASSES, Linear, labelled, linear
from cmap_defense import PurifiedClassifier
from cmap_defense.attacks import APGD, PGD, SPSA, ShortCMAP, Transfer
from cmap_defense.cmap.optimise import LatentState
from cmap_defense.errors import (
    CmapError,
    EvaluationError,
    InputTypeError,
    InputValueError,
    MissingExtraError,
    SettingsError,
)
from cmap_defense.evaluation import Evaluation, Subset
from cmap_defense.evaluation.evaluation import Expected, fixed_chunk
from cmap_defense.gradients import StraightThrough
from cmap_defense.purifiers import LikelihoodMaximisation
from denoisers import GaussianDenoiser
from evaluated import (
    BRIEF,
    IMAGES,
    PROTOCOL,
    SMALL,
    THREAT,
    Interrupted,
    Shaky,
    attacks,
    defended,
    evaluation,
    interrupt,
    options,
    results,
    shaken,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation that ran from beginning to end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    evaluation(folder).run()
    return folder


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a shorter one."""
    folder = tmp_path_factory.mktemp("brief")
    evaluation(folder, protocol=BRIEF).run()
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_there_is_a_line_for_each_image_under_each_attack_in_each_run(undisturbed: Path) -> None:
    """In the order of tasks, runs and images; what belongs to the checks on some images in the first run."""
    found = [(line["model"], line["attack"], line["seed"], line["image"]) for line in lines(undisturbed)]
    tasks = [("defended", name) for name in ("clean", *attacks())]
    tasks += [("undefended", name) for name in ("clean", "pgd")]
    names = ("steps-1", *(f"eps-{size}" for size in ("0.25x", "0.5x", "2x", "4x", "any")), "gradients")
    assert found == [(*task, seed, image) for task in tasks for seed in (0, 7) for image in range(IMAGES)] + [
        ("checks", name, 0, image) for name in names for image in range(PROTOCOL.sanity_images)
    ]
    _, labels = labelled(IMAGES)
    assert all(line["label"] == labels[line["image"]] for line in lines(undisturbed))


def test_the_adversarial_images_are_kept(undisturbed: Path) -> None:
    """Valid ones within the threat model of each attack, in the order of the lines."""
    images, _ = labelled(IMAGES)
    found = evaluation(undisturbed)
    for task in found.tasks.values():
        units = [unit for unit in found.units() if unit.task == task.name and unit.seed == 0]
        if task.name == "checks/gradients":
            continue
        kept = torch.cat([found.folder.tensors(unit)["images"] for unit in units])
        clean = images[: len(kept)]
        assert kept.min() >= 0
        assert kept.max() <= 1
        eps = 0.0 if task.row == "clean" else task.attack.threat.eps
        assert (kept - clean).abs().max() <= eps + 1e-6
        distances = [line["distance"] for unit in units for line in found.folder.lines(unit) if "distance" in line]
        assert (
            torch.tensor(distances).tolist() == (kept - clean).abs().flatten(1).amax(dim=1).tolist()[: len(distances)]
        )


def test_a_classifier_that_rules_classes_out_is_evaluated(tmp_path: Path) -> None:
    def masked(images: Tensor) -> Tensor:
        return linear(images).index_fill(1, torch.tensor([CLASSES - 1]), -torch.inf)

    images, labels = labelled(IMAGES)
    found = evaluation(
        tmp_path, masked, data=(images, labels % (CLASSES - 1)), attacks={"pgd": PGD(THREAT, steps=1)}, protocol=BRIEF
    )
    found.run()
    assert len(lines(tmp_path)) == 2 * IMAGES


def test_the_settings_say_what_decides_about_the_results(undisturbed: Path) -> None:
    found = json.loads((undisturbed / "settings.json").read_text())
    assert found["protocol"] == PROTOCOL.to_dict()
    assert found["protocol"]["group"] == 2
    assert found["computation"]["threads"] == 1
    assert found["models"]["defended"]["max_parallel"] == 64
    assert found["models"]["defended"]["settings"] == SMALL.to_dict()
    assert found["data"]["count"] == IMAGES
    assert found["data"]["subset"] == Subset().to_dict()
    assert list(found["models"]) == ["defended", "undefended"]
    assert list(found["tasks"]) == list(evaluation(undisturbed).tasks)


def test_an_interrupted_evaluation_goes_on_where_it_was(brief: Path, tmp_path: Path) -> None:
    first = evaluation(tmp_path, protocol=BRIEF)
    units = first.units()
    with pytest.raises(Interrupted):
        first.run(interrupt(5))
    assert not (tmp_path / "results.jsonl").exists()
    assert evaluation(tmp_path, protocol=BRIEF).missing() == units[5:]
    seen: list[tuple[int, int]] = []
    evaluation(tmp_path, protocol=BRIEF).run(lambda done, total: seen.append((done, total)))
    left = len(units) - 5
    assert seen == [(done, left) for done in range(left + 1)]
    assert results(tmp_path) == results(brief)


PLACES = [(name, half) for name in ("settings.json", ".safetensors", ".jsonl", "results.jsonl") for half in (1, 0)]
"""Where it is killed: while a file has a passing name and half of its content, or right after it got its name."""


def test_killed_in_any_place_it_ends_with_the_same_bytes(
    brief: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    for place, half in PLACES:

        def die(self: Path, target: Path, place: str = place, half: int = half) -> Path:
            if not target.name.endswith(place):
                return replace(self, target)
            if half:
                os.truncate(self, self.stat().st_size // 2)
            else:
                replace(self, target)
            raise Interrupted

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", die)
            patch.setattr(Path, "unlink", lambda *arguments, **options: None)  # a killed process clears nothing away
            with pytest.raises(Interrupted):
                evaluation(tmp_path, protocol=BRIEF).run()
    evaluation(tmp_path, protocol=BRIEF).run()
    assert results(tmp_path) == results(brief)
    assert not list(tmp_path.rglob("*.partial"))
    rows = [json.loads(line) for path in (tmp_path / "timings").iterdir() for line in path.read_text().splitlines()]
    units = [(row["task"], row["seed"], row["group"]) for row in rows]
    assert len(set(units)) == len(units), "a finished work unit was done again"


@pytest.mark.parametrize("model", [Shaky(0.3), shaken], ids=["seeded", "random"])
def test_no_results_depend_on_torchs_generators(model: Any, tmp_path: Path) -> None:
    """Nor does an evaluation change them."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        given = {"bpda-eot": PGD(THREAT, steps=2)}
        evaluation(tmp_path / str(seed), model, attacks=given, protocol=BRIEF.replace(sanity_images=1)).run()
        assert torch.equal(torch.get_rng_state(), before)
    assert results(tmp_path / "1") == results(tmp_path / "2")


def scaled() -> PurifiedClassifier:
    model = defended()
    with torch.no_grad():
        model.backbone.bias[0] += 1e-6
    return model


def moved_images() -> tuple[Tensor, Tensor]:
    images, labels = labelled(IMAGES)
    images[2, 2, 7, 5] = (images[2, 2, 7, 5] - 1 / 255).abs()
    return images, labels


def other_label() -> tuple[Tensor, Tensor]:
    images, labels = labelled(IMAGES)
    labels[2] = (labels[2] + 1) % CLASSES
    return images, labels


def shot(**changes: Any) -> dict[str, Any]:
    """The attacks, one of them with other options."""
    return attacks() | {"bpda-eot": PGD(THREAT, **({"steps": 2, "eot": 2} | changes))}


CHANGES: dict[str, tuple[Any, ...]] = {
    "steps of an attack": ({"attacks": shot(steps=3)}, "steps: 2 before, 3 now"),
    "seed of an attack": ({"attacks": shot(seed=1)}, "seed: 0 before, 1 now"),
    "an attack with a longer search": ({"attacks": shot() | {"spsa": SPSA(THREAT)}}, "search: "),
    "an attack less": ({"attacks": {"bpda-eot": shot()["bpda-eot"]}}, "defended/transfer: given before, not given now"),
    "an attack on a baseline": ({"baseline_attacks": {"pgd": PGD(THREAT, steps=3)}}, "steps: 2 before, 3 now"),
    "a baseline": ({"baselines": {"trained": Linear(2.0)}}, "trained: not given before, attack_toys.Linear now"),
    "grouping": ({"protocol": PROTOCOL.replace(group=1)}, "group: 2 before, 1 now"),
    "predictions": ({"protocol": PROTOCOL.replace(predictions=4)}, "predictions: 2 before, 4 now"),
    "runs": ({"protocol": PROTOCOL.replace(seeds=(0, 8))}, "seeds: [0, 7] before, [0, 8] now"),
    "threads": ({"threads": 2}, "threads: 1 before, 2 now"),
    "chunks": ({"model": defended(max_parallel=7)}, "max_parallel: 64 before, 7 now"),
    "the loop": ({"model": defended(settings=SMALL.replace(iterations=3))}, "iterations: 2 before, 3 now"),
    "weights": ({"model": scaled()}, "backbone.weights: "),
    "the classifier's weights": (
        {"model": defended(classifier=Linear(1.5))},
        "classifier.weights: ",
        "undefended.weights: ",
    ),
    "a pixel": ({"data": moved_images()}, "data.checksum: "),
    "a label": ({"data": other_label()}, "data.checksum: "),
    "the number of images": (
        {"subset": Subset(count=2)},
        "data.count: 3 before, 2 now",
        "subset.count: None before, 2 now",
    ),
    "the subset": ({"subset": Subset(order="random")}, "data.checksum: ", "subset.order: first before, random now"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_refused_and_named(name: str, undisturbed: Path) -> None:
    """And what is there stays as it is."""
    changed, *said = CHANGES[name]
    before = results(undisturbed)
    with pytest.raises(EvaluationError, match="holds results of another evaluation") as caught:
        evaluation(undisturbed, **changed).run(lambda *given_to: pytest.fail(f"{given_to}"))
    found = [line[2:] for line in str(caught.value).splitlines() if line.startswith("  ")]
    for part in said:
        assert any(line.startswith(part) if part.endswith(" ") else line == part for line in found), found
    assert results(undisturbed) == before


def test_an_attack_can_be_added(brief: Path, tmp_path: Path) -> None:
    """What is done stays, and in the end the folder is that of an evaluation with all attacks."""
    folder, more = tmp_path / "added", attacks() | {"one-step": PGD(THREAT, steps=1)}
    shutil.copytree(brief, folder)
    before = {path: path.stat().st_mtime_ns for path in (folder / "units").rglob("*.jsonl")}
    evaluation(folder, attacks=more, protocol=BRIEF).run()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    evaluation(tmp_path / "whole", attacks=more, protocol=BRIEF).run()
    assert results(folder) == results(tmp_path / "whole") != results(brief)


@pytest.mark.parametrize("name", ["cmap", "likelihood"])
def test_a_default_device_changes_no_results(name: str, tmp_path: Path) -> None:
    purifier = LikelihoodMaximisation(iterations=2, n_latents=2)
    likelihood = PurifiedClassifier(Linear(), GaussianDenoiser(), purifier=purifier, max_parallel=64)
    given = defended() if name == "cmap" else likelihood.eval()
    evaluation(tmp_path / "plain", given, protocol=BRIEF).run()
    moved = evaluation(tmp_path / "moved", given, protocol=BRIEF)
    with torch.device("meta"):
        moved.run()
        assert moved.worst_case() is not None
        moved.report()
    assert (tmp_path / "moved/results.jsonl").read_bytes() == (tmp_path / "plain/results.jsonl").read_bytes()


def test_a_library_that_is_not_there_is_missed_before_the_first_work_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apgd = APGD(THREAT, steps=1)
    three = {"pgd": PGD(THREAT, steps=1), "apgd": apgd, "moved": Transfer(apgd, source=linear)}
    wanted = evaluation(tmp_path / "a", attacks=three, protocol=BRIEF)
    with monkeypatch.context() as hidden:
        hidden.setitem(sys.modules, "pyautoattack", None)
        with pytest.raises(MissingExtraError, match=r"'apgd' cannot be run.*cmap-defense\[attacks\].*--only"):
            wanted.run()
        assert not (tmp_path / "a").exists()
        alone = evaluation(tmp_path / "b", attacks={"moved": three["moved"]}, protocol=BRIEF)
        with pytest.raises(MissingExtraError, match="'moved'"):
            alone.check_installed()
    wanted.run()
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    wanted.run()  # all is done
    assert wanted.report().row("apgd").attack == "apgd"


def test_threads_are_those_that_the_folder_was_begun_with(tmp_path: Path) -> None:
    threads = []

    def stop(*_: object) -> None:
        threads.append(torch.get_num_threads())
        raise Interrupted

    for given in (2, None, 2):
        with pytest.raises(Interrupted):
            evaluation(tmp_path, threads=given).run(stop)
        assert torch.get_num_threads() == 1
    assert threads == [2, 2, 2]
    with pytest.raises(EvaluationError, match=r"threads: 2 before, 1 now"):
        evaluation(tmp_path, threads=1).run(stop)
    assert evaluation(tmp_path / "new", threads=None).threads == torch.get_num_threads()


def attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of all modules, but for the number of calls that the toy keeps."""
    return {
        name: {key: value for key, value in vars(part).items() if key != "calls"}
        for name, part in model.named_modules()
    }


class Moody(Linear):
    """Wrong, and another each time, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3, affine=False))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.inner(images))


def test_a_model_in_training_mode_is_evaluated_in_eval_mode_and_left_as_it_was(tmp_path: Path) -> None:
    model = defended(classifier=Moody()).train()
    model.classifier.inner[1].eval()
    modes = [part.training for part in model.modules()]
    assert True in modes
    weights = copy.deepcopy(model.state_dict())
    before = attributes(model)
    seen = []

    def watch(state: LatentState) -> None:
        seen.append([part.training for part in model.modules()])

    attacked = {"attacks": {"bpda-eot": attacks()["bpda-eot"]}, "protocol": BRIEF}
    given = evaluation(tmp_path / "training", model, **attacked)
    given.expected()
    with model.register_step_hook(watch):
        given.run()
    assert seen
    assert not any(True in modes for modes in seen)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert attributes(model) == before
    assert len(model._step_hooks) == 0
    again = evaluation(tmp_path / "eval", model.eval(), **attacked)
    with model.register_step_hook(watch):  # which is part of the settings
        again.run()
    assert results(tmp_path / "training") == results(tmp_path / "eval")


@dataclasses.dataclass(frozen=True)
class Failing(PGD):
    def begin(self, *_: Any) -> Any:
        raise ArithmeticError


class Network(nn.Module):
    """A linear classifier without a defence."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Linear()

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)


@pytest.mark.parametrize("model", [Network(), linear, Shaky(0.3)], ids=["network", "function", "seeded"])
def test_a_model_without_latents(model: Any, tmp_path: Path) -> None:
    found = evaluation(tmp_path, model, attacks={"pgd": PGD(THREAT, steps=2)}, protocol=BRIEF)
    found.run()
    assert list(found.tasks) == ["defended/clean", "defended/pgd"]
    assert found.expected().passes == {}
    for line in lines(tmp_path):
        assert line["one_latent"] is None
        assert line["vote_right"] is None
    assert found.device == torch.device("cpu")


def test_the_undefended_classifier_and_baselines_stand_beside_the_defence(tmp_path: Path) -> None:
    """Under attacks of their own; a wrapped baseline is attacked through its own defence."""
    other = defended(seed=3, inputs="normalized", normalize=(0.5, 0.5))
    found = evaluation(tmp_path, protocol=BRIEF, attacks={}, baselines={"trained": Linear(2.0), "other": other})
    found.run()
    names = ["defended/clean", *(f"{name}/{part}" for name in ("undefended", "trained", "other") for part in
                                   ("clean", "pgd"))]  # fmt: skip
    assert list(found.tasks) == names
    by_name: dict[str, list[dict[str, Any]]] = {}
    for line in lines(tmp_path):
        by_name.setdefault(f"{line['model']}/{line['attack']}", []).append(line)
    images, labels = labelled(IMAGES)
    assert all(line["predictions"] == [line["label"]] * 2 for line in by_name["undefended/clean"])
    assert any(line["predictions"] != [line["label"]] * 2 for line in by_name["undefended/pgd"])
    with torch.no_grad():
        predicted = other.variant(inputs="unit")(images).argmax(dim=1)
    assert [line["predictions"] for line in by_name["other/clean"]] == [[label] * 2 for label in predicted.tolist()]
    assert by_name["other/pgd"][0]["one_latent"] is not None
    assert labels.tolist() == [line["label"] for line in by_name["trained/pgd"]]


WRONG: dict[str, tuple[dict[str, Any], type[CmapError], str]] = {
    "a label too many": (
        {"data": (labelled(2)[0], torch.tensor([0, 4]))},
        InputValueError,
        "must be from 0 to 3, the classes of the model 'defended', but that of image 1 is 4",
    ),
    "a label below 0": (
        {"data": (labelled(2)[0], torch.tensor([0, -1]))},
        InputValueError,
        "integers from 0, but that of image 1 is -1",
    ),
    "batches": ({"data": DataLoader(TensorDataset(*labelled(2)))}, InputTypeError, r"loader\.dataset"),
    "images of another size": ({"data": labelled(2, size=(9, 6))}, InputValueError, "8 x 6 images, but"),
    "a suite of another name": ({"attacks": "standart"}, SettingsError, "'standart'.*'standard'"),
    "attacks without names": (
        {"attacks": [attacks()["bpda-eot"]]},
        SettingsError,
        "attacks must be the name of a set, or a dictionary",
    ),
    "a class for an attack": ({"attacks": {"pgd": PGD}}, SettingsError, r"attacks\['pgd'\] must be an attack"),
    "an attack of a taken name": ({"attacks": {"clean": attacks()["bpda-eot"]}}, SettingsError, '"clean" is'),
    "a set without an attack for the model": (
        {"model": linear, "attacks": "standard"},
        SettingsError,
        r"'standard' has none for this function: .*parts or the gradient modes of a PurifiedClassifier.*\"pgd\": PGD",
    ),
    "an attack that needs a purifier": (
        {"model": linear, "attacks": {"pgd": PGD(THREAT), "bpda": PGD(THREAT, gradient=StraightThrough())}},
        SettingsError,
        "cannot be run on function: bpda needs the parts or the gradient modes",
    ),
    "a size twice": ({"threat": THREAT}, SettingsError, "attacks of your own have theirs"),
    "a baseline of a taken name": ({"baselines": {"defended": linear}}, SettingsError, "is the name of something"),
    "another": ({"baselines": {"checks": linear}}, SettingsError, "is the name of something else"),
    "no model": ({"model": 3}, SettingsError, "A model takes images and returns logits, but this is 3"),
    "a class for a model": ({"model": Linear}, SettingsError, "A model takes images"),
    "a class for a baseline": ({"baselines": {"other": Linear}}, SettingsError, "A model takes images"),
    "no threads": ({"threads": 0}, SettingsError, "threads must be at least 1"),
    "a number for a name": (
        {"attacks": {1: PGD(THREAT)}},
        SettingsError,
        "Names of attacks must be texts",
    ),
    "a list of baselines": ({"baselines": [Linear()]}, SettingsError, "baselines must be a dictionary"),
    "a list of their attacks": ({"baseline_attacks": [PGD(THREAT)]}, SettingsError, "baseline_attacks must be a dict"),
    "no attack among these": ({"baseline_attacks": {"x": 3}}, SettingsError, r"baseline_attacks\['x'\] must be an att"),
    "no data": ({"data": None}, InputTypeError, "NoneType has none"),
    "data as a dictionary": ({"data": {"images": 1}}, InputTypeError, r"give a pair, \(images, labels\)"),
    "a number for a subset": ({"subset": 2}, SettingsError, r"such as Subset\(count=512\), but is 2"),
    "a dictionary for a protocol": ({"protocol": {"predictions": 2}}, SettingsError, "such as Protocol"),
    "too few names": ({"class_names": ["a"]}, SettingsError, "for each of the 4 classes"),
    "a number for names": ({"class_names": 4}, SettingsError, "class_names must be a list"),
    "numbers as names": ({"class_names": [0, 1, 2, 3]}, SettingsError, "class_names must be a list"),
    "names without an order": ({"class_names": set("abcd")}, SettingsError, "class_names must be a list"),
    "one text as names": ({"class_names": "abcd"}, SettingsError, "class_names must be a list"),
}


@pytest.mark.parametrize("name", ["results.jsonl", "report.html"])
def test_no_file_of_something_else_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("kept")
    for work in (evaluation(tmp_path).run, evaluation(tmp_path).check_folder):
        with pytest.raises(EvaluationError, match=f"holds {name} of"):
            work()
    assert (tmp_path / name).read_text() == "kept"


def test_a_model_that_works_in_place_changes_no_other_results(tmp_path: Path) -> None:
    class InPlace(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mul_(0.5))

    class Scaled(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * 0.5)

    found = []
    for number, other in enumerate((InPlace(), Scaled())):
        made = evaluation(tmp_path / str(number), baselines={"other": other}, protocol=BRIEF)
        checksum = made.images.checksum()
        made.run()
        assert made.images.checksum() == checksum == (made.folder.settings() or {})["data"]["checksum"]
        found.append(lines(tmp_path / str(number)))
    assert found[0] == found[1]


def test_a_folder_may_begin_at_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert evaluation(Path("~/runs")).folder.path == tmp_path / "runs"


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    changed, kind, said = WRONG[name]
    with pytest.raises(kind, match=said):
        evaluation(tmp_path / "folder", **changed).run()
    assert not (tmp_path / "folder").exists()


def test_the_expected_cost_is_declared_at_first_and_measured_then(tmp_path: Path) -> None:
    given = options(protocol=BRIEF.replace(search_on_clean=False), attacks={"bpda-eot": PGD(THREAT, steps=2)})
    found = Evaluation(defended(), out=tmp_path, undefended=False, **given)
    state = torch.get_rng_state()
    expected = found.expected()
    assert not (tmp_path / "settings.json").exists()
    assert torch.equal(torch.get_rng_state(), state)
    once = SMALL.n_latents * (SMALL.iterations + 1)
    assert expected.passes == {"defended/clean": IMAGES * 3 * once, "defended/bpda-eot": IMAGES * (2 + 1 + 3) * once}
    assert expected.total_passes == sum(passes or 0 for passes in expected.passes.values())
    assert expected.seconds > 0
    with pytest.raises(Interrupted):
        found.run(interrupt(1))
    timing = found.folder.timings()["defended/clean"]
    assert (timing.images, timing.passes) == (2, 2 * 3 * once)
    measured = found.expected()
    assert measured.passes["defended/clean"] == 1 * 3 * once
    with pytest.raises(Interrupted):
        found.run(interrupt(2))
    found.run()
    assert {name: timing.passes for name, timing in found.folder.timings().items()} == dict(expected.passes)
    assert found.expected() == Expected({}, 0.0, None)


def test_the_cost_of_an_attack_that_does_not_declare_it_is_not_known_before(tmp_path: Path) -> None:
    found = evaluation(tmp_path, attacks={"failing": Failing(THREAT)}, protocol=BRIEF)
    assert found.expected().passes["defended/failing"] is not None
    found = evaluation(tmp_path, attacks={"short": ShortCMAP(THREAT)}, protocol=BRIEF)
    expected = found.expected()
    assert expected.passes["defended/short"] is None
    assert expected.total_passes == expected.passes["defended/clean"]


def test_making_an_evaluation_reads_nothing_and_runs_no_model(tmp_path: Path) -> None:
    def refuse(images: Tensor) -> Tensor:
        raise AssertionError

    (tmp_path / "settings.json").write_text("{")
    evaluation(tmp_path, refuse, attacks={"pgd": PGD(THREAT)}, data="nowhere.npz", baselines={"other": refuse})
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_baseline_without_the_classes_is_refused_at_once(tmp_path: Path) -> None:
    wide = (labelled(3)[0], torch.tensor([2, 0, 1]))
    with pytest.raises(InputValueError, match=r"from 0 to 1, the classes of the model 'narrow'"):
        evaluation(tmp_path, data=wide, baselines={"narrow": lambda images: linear(images)[:, :2]}).run()


def test_a_chunk_that_fits_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device, where what fits depends on what else is there. Here its memory is a stand-in."""
    monkeypatch.setattr("cmap_defense.purifiers.base.default_max_parallel", lambda *_, **__: 7)
    cuda, model = torch.device("cuda"), defended(max_parallel=None)
    assert fixed_chunk(model, None) is model
    assert fixed_chunk(model, None, cuda).max_parallel == 7
    assert fixed_chunk(model, {"max_parallel": 5}, cuda).max_parallel == 5
    assert fixed_chunk(defended(max_parallel=3), {"max_parallel": 5}, cuda).max_parallel == 3
    assert fixed_chunk(linear, None, cuda) is linear
    with model.register_step_hook(print):
        assert len(fixed_chunk(model, None, cuda)._step_hooks) == 1


def test_nothing_keeps_an_evaluation_that_was_measured(tmp_path: Path) -> None:
    """With its models and images, which may fill a device."""
    made = evaluation(tmp_path, protocol=BRIEF)
    made.expected()
    kept = weakref.ref(made)
    del made
    gc.collect()
    assert kept() is None
