"""Warnings of a classifier in training mode, and of one that returns probabilities: once each, and where it is due."""

import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_toys import CLASSES, SHAPE, THREATS, Denoiser, Linear, labelled, suite, wrapped
from cmap_defense.attacks import PGD, Transfer
from cmap_defense.classifier import PurifiedClassifier
from cmap_defense.classifier.cautions import warn_of_probabilities, warn_of_training_mode
from cmap_defense.cli.demo import demonstrate
from cmap_defense.common.modules import evaluating
from cmap_defense.common.progress import Progress
from cmap_defense.detection import EPS, deep_kernel, detect
from cmap_defense.detection.deep import DeepKernelSettings
from cmap_defense.errors import ClassifierWarning
from cmap_defense.evaluation import Protocol, Subset, evaluate
from cmap_defense.purifiers import OneStep
from cmap_defense.quality import QualityRun
from toys import uniform

PGD1 = PGD(THREATS["linf"], steps=1)
BRIEF = Protocol(predictions=1, reevaluations=1, sanity_images=0, search_on_clean=False)


class Noted(nn.Module):
    """A classifier with BatchNorm and Dropout that notes in which modes it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.linear = nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES))
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes |= set(map(operator.attrgetter("training"), self.modules()))  # it asks for no mode of its own
        return self.linear(self.drop(self.norm(images)))


def half_trained() -> Noted:
    """In training mode but for one part."""
    classifier = Noted().train()
    classifier.drop.eval()
    return classifier


@pytest.fixture
def said() -> Iterator[Callable[[], list[str]]]:
    """The warnings of this package so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(w.message) for w in caught if issubclass(w.category, ClassifierWarning)]


def test_the_cautions_are_no_part_of_a_compiled_program() -> None:
    """What was said is kept by classifier outside of any graph, so that a traced model is not warned of."""
    classifier = Linear()

    def traced(images: Tensor) -> Tensor:
        warn_of_training_mode(classifier, images)
        outputs = classifier(images)
        warn_of_probabilities(classifier, outputs)
        return outputs

    images, _ = labelled(2)
    with torch.no_grad():
        compiled = torch.compile(traced, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), classifier(images))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
def test_a_compiled_model_has_the_same_logits() -> None:
    images, _ = labelled(2)
    model = PurifiedClassifier(Linear(), Denoiser(), purifier=OneStep(n_latents=2), seed=0).eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(images), model(images))


def frozen(classifier: nn.Module) -> nn.Module:
    return classifier.requires_grad_(False)


class TestTrainingMode:
    @pytest.mark.parametrize(
        "call",
        [
            lambda model, x: torch.no_grad()(model)(x),
            lambda model, x: torch.inference_mode()(model.purify)(x),
            lambda model, x: torch.no_grad()(model.undefended)(x),
            lambda model, x: torch.no_grad()(model.variant(vote="soft"))(x),
        ],
    )
    def test_a_call_without_gradients_warns_once(self, call: Callable[..., Any], said: Callable[[], list[str]]) -> None:
        model, x = wrapped(classifier=half_trained()), labelled(2)[0]
        call(model, x)
        call(model, x)
        (text,) = said()
        assert "model.eval()" in text
        assert "BatchNorm2d" in text

    def test_each_classifier_has_its_own_warning(self, said: Callable[[], list[str]]) -> None:
        for _ in range(2):
            with torch.no_grad():
                wrapped(classifier=half_trained())(labelled(2)[0])
        assert len(said()) == 2

    def test_frozen_weights_and_images_without_gradient_cannot_be_trained_either(
        self, said: Callable[[], list[str]]
    ) -> None:
        wrapped(classifier=frozen(half_trained()))(labelled(2)[0])
        assert len(said()) == 1

    def test_it_points_at_the_line_of_the_caller(self) -> None:
        with pytest.warns(ClassifierWarning) as caught, torch.no_grad():
            wrapped(classifier=half_trained())(labelled(2)[0])
        assert caught[0].filename == __file__

    def test_a_bound_method_is_known_by_its_module(self, said: Callable[[], list[str]]) -> None:
        with torch.no_grad():
            wrapped(classifier=half_trained().forward)(labelled(2)[0])
        assert len(said()) == 1

    def test_training_stays_as_it_is(self) -> None:
        classifier, x = half_trained(), labelled(2)[0]
        before = classifier.norm.running_mean.clone()
        wrapped(classifier=classifier)(x)
        assert not torch.equal(classifier.norm.running_mean, before)
        wrapped(classifier=frozen(half_trained()))(x.requires_grad_())

    def test_modules_whose_mode_is_no_matter_are_left_in_peace(self) -> None:
        with torch.no_grad():
            wrapped(classifier=nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES), nn.ReLU()).train())(labelled(2)[0])
            wrapped(classifier=half_trained().eval())(labelled(2)[0])
            wrapped(classifier=lambda x: x.flatten(1)[:, :3])(labelled(2)[0])

    @pytest.mark.parametrize("part", [nn.Dropout(), nn.InstanceNorm2d(3, track_running_stats=True), nn.RReLU()])
    def test_all_parts_that_ask_for_the_mode_count(self, part: nn.Module, said: Callable[[], list[str]]) -> None:
        with torch.no_grad():
            wrapped(classifier=nn.Sequential(part, Linear()))(labelled(2)[0])
        assert len(said()) == 1


def attacked_with(name: str) -> Callable[..., Any]:
    return lambda model, x, y: suite(THREATS["linf"])[name](model, x, y)


def observed(model: PurifiedClassifier, x: Tensor, y: Tensor) -> None:
    small = EPS(sigmas=(0.5, 1.0))
    detect(model, x, y, reference=uniform(3, *SHAPE, seed=9), attack=PGD1, eps=small)
    deep_kernel(model, x, y, eps=small, settings=DeepKernelSettings(steps=1))


def demonstrated(model: PurifiedClassifier, x: Tensor, y: Tensor) -> None:
    for purifier in (model.purifier, OneStep(level=0.5, n_latents=2)):  # the second one is attacked itself
        with Progress(0, "demo", shown=False) as progress:
            demonstrate(
                model.variant(purifier=purifier), x, y, threat=THREATS["linf"], steps=1, seed=0, progress=progress
            )


WORK: dict[str, Callable[..., Any]] = {
    **{name: attacked_with(name) for name in ("PGD", "SPSA", "Transfer", "LatentAttack", "ShortCMAP")},
    "PGD on the undefended classifier": lambda model, x, y: PGD1(model.classifier, x, y),
    "PGD on a method": lambda model, x, y: PGD1(model.undefended, x, y),
    "Transfer from another model": lambda model, x, y: Transfer(PGD1, source=model.classifier)(Linear(), x, y),
    "evaluate": lambda model, x, y: evaluate(model, (x, y), attacks={"pgd": PGD1}, protocol=BRIEF),
    "evaluate the undefended classifier": lambda model, x, y: evaluate(
        model.classifier, (x, y), attacks={"pgd": PGD1}, protocol=BRIEF
    ),
    "quality": lambda model, x, y: QualityRun(model, (x, y), subset=Subset(count=len(x)), samples=2, attack=PGD1).run(),
    "observation": observed,
    "demonstration": demonstrated,
}


@pytest.mark.parametrize("name", WORK)
def test_the_packages_own_work_is_in_eval_mode_and_leaves_the_modes(name: str) -> None:
    classifier = half_trained()
    model = wrapped(classifier=classifier, backbone=Denoiser())
    x, y = labelled(4)
    before, modes = classifier.norm.running_mean.clone(), [part.training for part in model.modules()]
    WORK[name](model, x, y)
    assert classifier.modes == {False}
    assert torch.equal(classifier.norm.running_mean, before)
    assert [part.training for part in model.modules()] == modes


def test_evaluating_takes_several_and_puts_each_part_back_also_after_an_error() -> None:
    first, second = half_trained(), half_trained()
    modes = [part.training for model in (first, second) for part in model.modules()]
    with pytest.raises(ZeroDivisionError), evaluating(first, second.forward, len):
        first.norm(1 / 0)
    assert [part.training for model in (first, second) for part in model.modules()] == modes
    with evaluating(first, second.forward, len):
        inside = [part.training for model in (first, second) for part in model.modules()]
    assert True not in inside
    assert [part.training for model in (first, second) for part in model.modules()] == modes


def ending_in(last: nn.Module) -> nn.Module:
    """A classifier whose last part is this one; its linear layer has a feature vector as its input."""
    return nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES), last).eval()


class TestProbabilities:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_a_softmax_at_the_end_warns_once(self, dtype: torch.dtype, said: Callable[[], list[str]]) -> None:
        model = wrapped(classifier=ending_in(nn.Softmax(dim=1))).to(dtype)
        for other in (model, model.variant(vote="soft")):
            other(labelled(2)[0].to(dtype))
            other.undefended(labelled(2)[0].to(dtype))
        (text,) = said()
        assert "classifier[:-1]" in text
        assert ".log()" in text

    @pytest.mark.parametrize("last", [nn.LogSoftmax(dim=1), nn.Sigmoid(), nn.Identity()], ids=repr)
    def test_other_ends_do_not(self, last: nn.Module) -> None:
        wrapped(classifier=ending_in(last))(labelled(2)[0])

    def test_one_row_that_sums_to_something_else_is_enough(self) -> None:
        rows = torch.tensor([[0.25, 0.75], [0.25, 0.5]])
        wrapped(classifier=lambda x: rows[torch.arange(len(x)) % 2] + 0 * x.flatten(1)[:, :1])(labelled(2)[0])

    def test_the_remedies_of_the_warning_do_not_warn(self, said: Callable[[], list[str]]) -> None:
        classifier, x = ending_in(nn.Softmax(dim=1)), labelled(2)[0]
        logits = wrapped(classifier=classifier[:-1], vote="soft", seed=0)(x)
        logarithm = lambda images: classifier(images).clamp_min(1e-30).log()  # noqa: E731
        assert torch.allclose(wrapped(classifier=logarithm, vote="soft", seed=0)(x), logits, atol=1e-5)
        assert said() == []
        assert not torch.allclose(wrapped(classifier=classifier, vote="soft", seed=0)(x), logits, atol=0.01)

    @pytest.mark.parametrize("name", WORK)
    def test_the_packages_own_work_warns_once(self, name: str, said: Callable[[], list[str]]) -> None:
        model = wrapped(classifier=ending_in(nn.Softmax(dim=1)), backbone=Denoiser())
        WORK[name](model, *labelled(4))
        assert len(said()) == 1

    def test_a_function_has_one_warning_too(self, said: Callable[[], list[str]]) -> None:
        model = lambda x: x.flatten(1)[:, :3].softmax(dim=1)  # noqa: E731
        for _ in range(2):
            PGD1(model, *labelled(2))
        assert len(said()) == 1
