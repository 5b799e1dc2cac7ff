"""Class-conditional backbones: how labels are chosen, checked and handed to the right latents."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.classifier.class_labels import choose_class_labels
from cmap_defense.cmap.objective import LatentObjective
from cmap_defense.cmap.optimise import LatentState, optimise_latents
from cmap_defense.errors import BackboneError, ClassifierError, InputTypeError, InputValueError, SettingsError
from cmap_defense.purifiers.cmap import CMAP
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
CLASSES = 5
QUICK = CMAPSettings(n_latents=3, iterations=3, learning_rate=0.1)
SEEDS = st.integers(0, 2**31)


class ConditionalBackbone(ToyBackbone):
    """Adds an image of its own for each class; remembers the labels of every call."""

    def __init__(self, num_classes: int = CLASSES) -> None:
        super().__init__(SHAPE)
        self.num_classes = num_classes
        self.offsets = nn.Parameter(0.5 * noise(num_classes, *SHAPE, seed=9))
        self.calls: list[Tensor] = []

    def generate(self, latents: Tensor, class_labels: Tensor) -> Tensor:
        assert class_labels.dtype == torch.int64
        assert class_labels.shape == latents.shape[:1]
        self.calls.append(class_labels)
        return torch.tanh(super().generate(latents) + self.offsets[class_labels])


class Classifier(nn.Module):
    """A linear classifier behind batch normalisation and dropout; counts its calls."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(SHAPE[0])
        self.dropout = nn.Dropout(0.5)
        with torch.random.fork_rng(devices=[]):
            self.linear = nn.Linear(SHAPE[0] * SHAPE[1] * SHAPE[2], classes)
        with torch.no_grad():
            self.linear.weight.copy_(noise(*self.linear.weight.shape, seed=5))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        pooled = nn.functional.adaptive_avg_pool2d(self.norm(images), SHAPE[1:])
        return self.linear(self.dropout(pooled.flatten(1) - 0.5))


def make(**options: Any) -> PurifiedClassifier:
    """A small defended classifier in eval mode; options as for PurifiedClassifier."""
    classifier, backbone = options.pop("classifier", None), options.pop("backbone", None)
    options = {"settings": QUICK, "seed": 1} | options
    return PurifiedClassifier(classifier or Classifier(), backbone or ConditionalBackbone(), **options).eval()


def images(count: int = 4, seed: int = 1) -> Tensor:
    return uniform(count, *SHAPE, seed=seed)


def from_table(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """A classifier whose logits are known."""

    def classify(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not images.requires_grad
        return logits

    return classify


def never(images: Tensor) -> Tensor:
    raise AssertionError("the classifier was called")


def choose(choice: Any, given: Any = None, **options: Any) -> Tensor | None:
    """Labels for two images and four latents, of three classes."""
    options = {"classify": never, "n_latents": 4, "num_classes": 3} | options
    classify = options.pop("classify")
    return choose_class_labels(choice, given, images(2).requires_grad_(), classify, **options)


TABLE = torch.tensor([[0.1, 0.7, 0.2], [3.0, -1.0, 2.0]])

# --------------------------------------------------------------------------------------------------------- choosing


def test_predicted_is_the_top_label_for_every_latent():
    assert choose("predicted", classify=from_table(TABLE)).tolist() == [[1] * 4, [0] * 4]


@pytest.mark.parametrize("n_latents", [1, 2, 3, 4, 7])
def test_spread_is_one_label_per_latent_from_the_top_and_again(n_latents: int):
    labels = choose("spread", classify=from_table(TABLE), n_latents=n_latents)
    ranked = torch.tensor([[1, 2, 0], [0, 2, 1]])
    assert labels.tolist() == ranked.repeat(1, 3)[:, :n_latents].tolist()


@settings(max_examples=30)
@given(seed=SEEDS, classes=st.integers(1, 6), n_latents=st.integers(1, 9))
def test_spread_uses_every_likely_label_equally_often(seed: int, classes: int, n_latents: int):
    logits = noise(2, classes, seed=seed)
    labels = choose("spread", classify=from_table(logits), n_latents=n_latents, num_classes=classes)
    assert labels.shape == (2, n_latents)
    assert torch.equal(labels[:, 0], logits.argmax(dim=1))
    counts = torch.nn.functional.one_hot(labels, classes).sum(dim=1)
    for row, scores in zip(counts, logits, strict=True):
        used = row[scores.argsort(descending=True)]
        assert used.tolist() == sorted(used.tolist(), reverse=True)
        assert used[0] - used[min(n_latents, classes) - 1] <= 1
        assert (used > 0).sum() == min(n_latents, classes)


def tensor_of(dtype: torch.dtype) -> Callable[[list], Tensor]:
    return lambda labels: torch.tensor(labels).to(dtype)


@pytest.mark.parametrize(
    "kind", [list, np.asarray, *map(tensor_of, (torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64))]
)
@pytest.mark.parametrize(
    ("given", "expected"), [([2, 0], [[2] * 4, [0] * 4]), ([[2, 1, 0, 0], [1, 1, 2, 0]], [[2, 1, 0, 0], [1, 1, 2, 0]])]
)
def test_given_labels_win_and_nobody_is_asked(kind: Callable[[list], Any], given: list, expected: list):
    for choice in ("predicted", "spread", never):
        labels = choose(choice, kind(given))
        assert labels.dtype == torch.int64
        assert labels.tolist() == expected
    assert choose("predicted", [2, 0], n_latents=2).tolist() == [[2, 2], [0, 0]], "one per image, not per latent"


def test_function_of_the_images_is_asked_without_a_graph():
    def by_brightness(batch: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not batch.requires_grad
        assert batch.shape == (2, *SHAPE)
        return batch.flatten(1).sum(dim=1).argsort()

    expected = images(2).flatten(1).sum(dim=1).argsort()
    assert torch.equal(choose(by_brightness), expected[:, None].expand(-1, 4))
    assert choose(lambda batch: torch.tensor([[2, 1, 0, 0], [1, 1, 2, 0]])).tolist() == [[2, 1, 0, 0], [1, 1, 2, 0]]


WRONG_LABELS = {
    "one too many": (InputValueError, torch.tensor([0, 1, 2])),
    "one per latent": (InputValueError, torch.tensor([0, 1, 2, 0])),
    "a number": (InputValueError, 1),
    "nothing": (InputValueError, torch.zeros(0, dtype=torch.int64)),
    "too few latents": (InputValueError, torch.zeros(2, 3, dtype=torch.int64)),
    "other way round": (InputValueError, torch.zeros(4, 2, dtype=torch.int64)),
    "an axis more": (InputValueError, torch.zeros(2, 4, 1, dtype=torch.int64)),
    "negative": (InputValueError, [0, -1]),
    "too large": (InputValueError, [[0, 0, 0, 0], [0, 0, 3, 0]]),
    "fractions": (InputTypeError, torch.tensor([0.0, 1.0])),
    "fractions in a list": (InputTypeError, [0.0, 1.0]),
    "truths": (InputTypeError, torch.tensor([True, False])),
    "complex": (InputTypeError, torch.tensor([0j, 1j])),
    "text": (InputTypeError, ["cat", "dog"]),
    "one text": (InputTypeError, "cat"),
    "ragged": (InputTypeError, [[0, 1], [2]]),
    "missing ones": (InputTypeError, [0, None]),
}


@pytest.mark.parametrize(("error", "given"), WRONG_LABELS.values(), ids=WRONG_LABELS.keys())
def test_labels_that_do_not_fit_are_refused(error: type[Exception], given: Any):
    with pytest.raises(error, match="class_labels"):
        choose("predicted", given)
    with pytest.raises(error, match="class_labels"):
        choose(lambda batch: given)


def test_function_that_returns_nothing_is_refused():
    with pytest.raises(InputTypeError, match="class_labels"):
        choose(lambda batch: None)


@pytest.mark.parametrize("choice", ["predicted", "spread"])
def test_classifier_of_other_classes_is_refused_unless_labels_are_given(choice: str):
    with pytest.raises(ClassifierError, match=r"3 classes .* conditioned on 10"):
        choose(choice, classify=from_table(TABLE), num_classes=10)
    assert choose(choice, [7, 9], num_classes=10)[:, 0].tolist() == [7, 9]


@pytest.mark.parametrize("choice", ["predicted", "spread", never])
def test_unconditional_backbone_has_no_labels_and_takes_none(choice: Any):
    assert choose(choice, num_classes=None) is None
    with pytest.raises(InputValueError, match="not class-conditional"):
        choose(choice, [0, 1], num_classes=None)


@pytest.mark.parametrize(
    "choice", ["random", "Predicted", "", None, 3, ["predicted"], [0, 1], torch.tensor([0, 1]), np.array([0, 1])]
)
def test_unknown_choice_is_refused(choice: Any):
    with pytest.raises(SettingsError, match='"predicted", "spread" or a function'):
        make(class_labels=choice)


# ------------------------------------------------------------------------------------------------ the latent loop


def labels_of(batch: int, n_latents: int, seed: int = 3) -> Tensor:
    return torch.randint(CLASSES, (batch, n_latents), generator=torch.Generator().manual_seed(seed))


def double() -> ConditionalBackbone:
    return ConditionalBackbone().double()


@pytest.mark.parametrize("max_parallel", [None, 1, 4, 5, 12, 100])
def test_each_latent_is_optimised_under_its_own_label(max_parallel: int | None):
    """Against a generator that knows the labels by the places of all latents at once."""
    backbone, labels = double(), labels_of(3, 4)
    targets = uniform(3, *SHAPE, seed=1, dtype=torch.float64)
    start = noise(3, 4, *SHAPE, seed=2, dtype=torch.float64)
    expected, expected_history = optimise_latents(
        lambda latents: backbone.generate(latents, labels.flatten()), targets, start, QUICK
    )
    backbone.calls.clear()
    found, history = optimise_latents(
        backbone.generate, targets, start, QUICK, class_labels=labels, max_parallel=max_parallel
    )
    assert torch.equal(torch.cat(backbone.calls), labels.flatten().repeat(QUICK.iterations))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(history.total, expected_history.total, rtol=1e-9, atol=1e-9)
    other, _ = optimise_latents(backbone.generate, targets, start, QUICK, class_labels=labels.flip(1))
    assert (other - expected).abs().max().item() > 1e-3


@pytest.mark.parametrize("max_parallel", [None, 1, 4, 5, 100])
def test_images_are_generated_under_their_own_labels(max_parallel: int | None):
    backbone, labels = double(), labels_of(3, 4)
    latents = noise(3, 4, *SHAPE, seed=2, dtype=torch.float64)
    options: Any = {"class_labels": labels, "max_parallel": max_parallel}
    made = LatentObjective(backbone.generate, uniform(3, *SHAPE, seed=1), 4, QUICK, **options).images_of(latents)
    assert made.shape == latents.shape
    for b in range(3):
        for k in range(4):
            alone = backbone.generate(latents[b, k : k + 1], labels[b, k : k + 1])[0]
            torch.testing.assert_close(made[b, k], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3,), (12,), (3, 4, 1), (0, 4)])
def test_labels_of_another_shape_than_the_latents_are_refused(shape: tuple[int, ...]):
    targets, start = uniform(3, *SHAPE, seed=1), noise(3, 4, *SHAPE, seed=2)
    with pytest.raises(InputValueError, match=r"Class labels must be \[B, K\] = \[3, 4\]"):
        optimise_latents(
            ConditionalBackbone().generate, targets, start, QUICK, class_labels=torch.zeros(shape, dtype=torch.int64)
        )


def test_purifier_hands_the_labels_on_and_names_them():
    backbone, labels = ConditionalBackbone(), labels_of(2, 3)
    result = CMAP(QUICK)(backbone, images(2), seeds=torch.tensor([4, 5]), class_labels=labels)
    assert torch.equal(result.class_labels, labels)
    made = LatentObjective(backbone.generate, images(2), 3, QUICK, class_labels=labels).images_of(result.latents)
    torch.testing.assert_close(result.images, (made + 1) / 2, rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------- a defended classifier


@pytest.mark.parametrize("options", [{}, {"class_labels": "predicted"}, {"class_labels": "spread"}])
def test_result_names_the_labels_that_were_chosen(options: dict[str, str]):
    model, x = make(**options), images()
    logits = model.classifier(x)
    spread = options.get("class_labels") == "spread"
    expected = logits.topk(3, dim=1).indices if spread else logits.argmax(1)[:, None].expand(-1, 3)
    result = model.purify(x)
    assert torch.equal(result.class_labels, expected)
    assert result.class_labels.dtype == torch.int64
    assert result.logits.shape == (4, 3, CLASSES)
    assert len(set(expected[:, 0].tolist())) > 1


@pytest.mark.parametrize("max_parallel", [1, 3, 5])
@pytest.mark.parametrize("choice", ["predicted", "spread"])
def test_chunks_give_what_the_whole_gives(choice: str, max_parallel: int):
    whole, chunked = (make(class_labels=choice, max_parallel=n).purify(images()) for n in (100, max_parallel))
    assert torch.equal(chunked.class_labels, whole.class_labels)
    torch.testing.assert_close(chunked.images, whole.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(chunked.latents, whole.latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(chunked.logits, whole.logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("max_parallel", [None, 1, 5])
def test_labels_reach_their_latents_before_every_step_and_in_the_end(max_parallel: int | None):
    model, labels = make(max_parallel=max_parallel), labels_of(4, 3)
    states: list[LatentState] = []
    with model.register_step_hook(states.append):
        result = model.purify(images(), class_labels=labels)
    assert torch.equal(result.class_labels, labels)
    assert len(states) == QUICK.iterations
    shown = [(state.latents, state.generated) for state in states] + [(result.latents, 2 * result.images - 1)]
    for latents, generated in shown:
        for b in range(4):
            for k in range(3):
                alone = model.backbone.generate(latents[b, k][None], labels[b, k][None])[0]
                torch.testing.assert_close(generated[b, k], alone.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "labels", [[3, 0, 4, 1], torch.tensor([3, 0, 4, 1]), np.array([3, 0, 4, 1]), [[n] * 3 for n in (3, 0, 4, 1)]]
)
def test_labels_may_be_given_to_the_call(labels: Any):
    model = make()
    result = model.purify(images(), class_labels=labels)
    assert result.class_labels.tolist() == [[n] * 3 for n in (3, 0, 4, 1)]
    model.classifier.calls = 0
    logits = model(images(), class_labels=labels)
    assert model.classifier.calls == 1
    assert torch.equal(logits.argmax(1), result.labels)
    assert not torch.equal(logits, model(images(), class_labels=[0, 1, 2, 3]))


def test_given_labels_follow_the_given_latents():
    labels = labels_of(2, 5)
    result = make().purify(images(2), latents=noise(2, 5, *SHAPE, seed=2), class_labels=labels)
    assert torch.equal(result.class_labels, labels)
    assert result.latents.shape == (2, 5, *SHAPE)
    with pytest.raises(InputValueError, match=r"\[2, 5\]"):
        make().purify(images(2), latents=noise(2, 5, *SHAPE, seed=2), class_labels=labels[:, :3])


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, 2, CLASSES], torch.zeros(4), [[0, 1]] * 4])
def test_labels_that_do_not_fit_the_call_are_refused(labels: Any):
    model = make()
    for call in (model, model.purify):
        with pytest.raises((InputValueError, InputTypeError), match="class_labels"):
            call(images(), class_labels=labels)


def test_function_sees_unit_images_of_the_callers_size():
    seen = []

    def function(batch: Tensor) -> Tensor:
        seen.append(batch)
        return torch.tensor([1, 2])

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model = make(class_labels=function, normalize=(mean, std), inputs="normalized", resize="bilinear")
    unit = uniform(2, 3, 11, 9, seed=1)
    given = (unit - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    result = model.purify(given.requires_grad_())
    assert result.class_labels.tolist() == [[1] * 3, [2] * 3]
    (batch,) = seen
    assert not batch.requires_grad
    torch.testing.assert_close(batch, unit, rtol=0, atol=1e-6)
    assert result.images.requires_grad


def test_prediction_is_made_on_normalised_images():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model = make(normalize=(mean, std))
    normalised = (images() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected = model.classifier(normalised).argmax(1)
    assert torch.equal(model.purify(images()).class_labels[:, 0], expected)
    assert not torch.equal(expected, model.classifier(images()).argmax(1))


def test_classifier_of_other_classes_needs_labels():
    model = make(classifier=Classifier(classes=7))
    with pytest.raises(ClassifierError, match=r"7 classes .* conditioned on 5"):
        model(images())
    assert model(images(), class_labels=[0, 1, 2, 3]).shape == (4, 7)
    model = make(classifier=Classifier(classes=7), class_labels=lambda batch: torch.arange(4))
    assert model.purify(images()).class_labels[:, 0].tolist() == [0, 1, 2, 3]


def test_unconditional_backbone_has_no_labels_and_asks_nobody():
    model = make(backbone=ToyBackbone(SHAPE))
    assert model.purify(images()).class_labels is None
    assert model.classifier.calls == 1
    for call in (model, model.purify):
        with pytest.raises(InputValueError, match="not class-conditional"):
            call(images(), class_labels=[0, 1, 2, 3])


@pytest.mark.parametrize("classes", [0, -1, True, 5.0, "5"])
def test_nonsense_number_of_classes_is_refused(classes: Any):
    backbone = ConditionalBackbone()
    backbone.num_classes = classes
    with pytest.raises(BackboneError, match="num_classes must be a positive integer or None"):
        make(backbone=backbone)


@pytest.mark.parametrize("choice", ["predicted", "spread"])
def test_empty_batch_gives_an_empty_result(choice: str):
    model = make(class_labels=choice)
    assert model(images(0)).shape == (0, CLASSES)
    assert model(images(0), class_labels=[]).shape == (0, CLASSES)
    result = model.purify(images(0))
    assert result.images.shape == (0, 3, *SHAPE)
    assert result.votes.shape == (0, CLASSES)
    assert (result.class_labels.shape, result.class_labels.dtype) == ((0, 3), torch.int64)
    assert make(backbone=ToyBackbone(SHAPE)).purify(images(0)).class_labels is None


@pytest.mark.parametrize("labels", [[1, 2, 3], torch.zeros(2)])
def test_labels_for_images_that_are_not_there_are_refused(labels: Any):
    model = make()
    for call in (model, model.purify):
        with pytest.raises(InputValueError, match=r"class_labels must be \[0\] or \[0, 3\], one per image"):
            call(images(0), class_labels=labels)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_labels_are_ordinary_tensors_in_any_mode(mode: Callable[[], Any]):
    expected = make().purify(images())
    model = make()
    with mode():
        result = model.purify(images())
        given = model.purify(images(), class_labels=torch.tensor([0, 1, 2, 3]))
    assert torch.equal(result.class_labels, expected.class_labels)
    torch.testing.assert_close(result.images, expected.images.detach(), rtol=0, atol=1e-6)
    assert given.class_labels[:, 0].tolist() == [0, 1, 2, 3]


def test_straight_through_gradient_is_unchanged_by_the_choice():
    x = images().requires_grad_()
    make()(x).logsumexp(1).sum().backward()
    found, x.grad = x.grad, None
    model = make()
    model(x, class_labels=model.classifier(x).argmax(1).tolist()).logsumexp(1).sum().backward()
    assert found.abs().max().item() > 0
    torch.testing.assert_close(found, x.grad, rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------- the classifier that predicts the class


def modes(module: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in module.named_modules()}


def statistics(classifier: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in classifier.norm.named_buffers()}


def test_prediction_is_made_in_eval_mode_and_leaves_no_trace():
    """Beyond that of classifying the purified images, which the training mode asks for."""
    predicted, given = Classifier(), Classifier()
    expected = predicted.eval()(images()).argmax(1)
    models = [make(classifier=classifier).train() for classifier in (predicted, given)]
    before = modes(predicted)
    assert before["dropout"]
    with torch.random.fork_rng(devices=[]):
        result = models[0].purify(images())
        models[1].purify(images(), class_labels=expected)
    assert torch.equal(result.class_labels[:, 0], expected)
    assert modes(predicted) == modes(given) == before
    assert predicted.norm.num_batches_tracked.item() == 1
    assert all(torch.equal(value, statistics(given)[name]) for name, value in statistics(predicted).items())


def test_every_part_of_the_classifier_keeps_its_own_mode():
    classifier = Classifier()
    model = make(classifier=classifier).train()
    classifier.norm.eval()
    before = statistics(classifier)
    with torch.random.fork_rng(devices=[]):
        model(images())
        model(images(0))
    assert modes(classifier) == {"": True, "norm": False, "dropout": True, "linear": True}
    assert all(torch.equal(value, before[name]) for name, value in statistics(classifier).items())


def test_modes_come_back_after_a_failure():
    class Failing(Classifier):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    model = make(classifier=Failing()).train()
    before = modes(model)
    with pytest.raises(RuntimeError, match="out of order"):
        model(images())
    assert modes(model) == before
    assert before["classifier.norm"]


def test_classifier_is_asked_once_in_chunks():
    classifier = Classifier()
    model = make(classifier=classifier, max_parallel=2)
    model.purify(images(5))
    assert classifier.calls == 3 + 8


def test_classifier_may_be_a_plain_function():
    weight = noise(3 * 8 * 6, CLASSES, seed=5)
    model = make(classifier=lambda x: (x.flatten(1) - 0.5) @ weight)
    expected = ((images().flatten(1) - 0.5) @ weight).argmax(1)
    assert torch.equal(model.purify(images()).class_labels[:, 0], expected)
