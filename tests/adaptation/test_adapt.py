"""Adapting a classifier to a purifier."""

import contextlib
import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cmap_defense import PurifiedClassifier, ThreatModel, adapt, errors, load_adapted
from cmap_defense.adaptation import AdaptationConfig, learner, run
from cmap_defense.adaptation.learner import AdaptationLearner, attacked_images
from cmap_defense.common.ranks import Ranks
from cmap_defense.common.rng import derived_seeds, draw_latents
from cmap_defense.data import LabelledImages, sources
from cmap_defense.gradients import Unrolled
from cmap_defense.purifiers import Identity, OneStep

SHAPE = (1, 4, 6)


class Shrinking(nn.Module):
    """A denoiser in closed form: the posterior mean under a Gaussian prior of variance 1/4."""

    kind = "denoiser"
    image_shape = SHAPE

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return noisy * (0.25 / (0.25 + torch.as_tensor(sigma).to(noisy) ** 2))


class Mirroring(Shrinking):
    """A denoiser whose derivative is no multiple of the identity: it mirrors and inverts the image."""

    def denoise(self, noisy: Tensor, sigma: Tensor | float) -> Tensor:
        return -super().denoise(noisy, sigma).flip(-1)


class Net(nn.Module):
    """Normalisation, dropout, a frozen layer and one to learn."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)).requires_grad_(False)
        self.norm: nn.Module = nn.BatchNorm2d(2)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(2 * 4 * 6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.frozen(images).tanh()).flatten(1)))


def data(count: int = 24, seed: int = 0) -> LabelledImages:
    """Images whose brightest third is their class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.rand(count, *SHAPE, generator=generator)
    for row, label in enumerate(labels.tolist()):
        images[row, :, :, 2 * label : 2 * label + 2] += 0.5
    return LabelledImages((255 * images).to(torch.uint8), labels)


def net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout).eval()


SMALL = AdaptationConfig(
    images=48,
    batch_size=6,
    checkpoint_every=12,
    warmup_images=0,
    learning_rate=0.01,
    ema_half_life=(6,),
    flip=False,
    shift=1,
)
PURIFIER = OneStep(level=0.3, n_latents=2)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def accuracy(model: PurifiedClassifier, images: LabelledImages) -> float:
    with torch.no_grad():
        labels = model.purify(images.unit, seeds=torch.arange(len(images))).labels
    assert labels is not None
    return (labels == images.labels).float().mean().item()


def test_it_learns_a_copy_and_leaves_the_original_alone(tmp_path: Path) -> None:
    original = net(dropout=0.2)
    before = copy.deepcopy(original)
    result = adapt(original, Shrinking(), PURIFIER, data(), out=tmp_path, config=SMALL.replace(images=600))
    assert same(original, before)
    assert not original.training
    assert result.finished
    adapted = result.classifier
    assert not adapted.training
    models = [PurifiedClassifier(c, Shrinking(), purifier=PURIFIER) for c in (original, adapted)]
    bare, better = (accuracy(model, data(30, 1)) for model in models)
    assert better > max(0.9, bare)
    assert same(adapted.get_submodule("frozen"), before.frozen), "frozen parts and their statistics stay"
    assert not same(adapted.get_submodule("norm"), before.norm)


def test_modules_without_parameters_go_with_the_nearest_one_around_them_that_has_some() -> None:
    model, still, moving = net(), nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, affine=False)
    model.frozen.append(nn.Sequential(still, nn.Dropout(0.5)))
    model.norm = nn.Sequential(model.norm, nn.Sequential(moving, nn.Dropout(0.5)))
    purified = PurifiedClassifier(model, Shrinking(), purifier=PURIFIER)
    modes: dict[str, bool] = {}
    for name, part in model.named_modules():
        part.register_forward_pre_hook(lambda part, _, name=name: modes.update({name: part.training}))
    AdaptationLearner(purified, data(), None, None, SMALL).step(0)
    assert still.num_batches_tracked == 0
    assert moving.num_batches_tracked == 1
    assert {name for name, mode in modes.items() if not mode} == {
        name for name in modes if name.partition(".")[0] == "frozen"
    }


def test_the_optimum_of_a_linear_classifier_on_purified_images_is_found(tmp_path: Path) -> None:
    """Logistic regression on a number that is Gaussian behind the purifier: Newton's method on its expected loss."""

    def half(images: Tensor) -> Tensor:
        return 10 * (images[..., :3].mean((1, 2, 3)) - images[..., 3:].mean((1, 2, 3)))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([torch.zeros(len(images)), self.weight[0] * half(images) + self.weight[1]], 1)

    labels = torch.arange(16) % 2
    images = 0.4 + 0.15 * torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    images[labels == 1, :, :, :3] += 0.05
    kept = LabelledImages((255 * images).to(torch.uint8), labels)
    changes = {"batch_size": 16, "learning_rate": 0.05, "ema_half_life": (400,), "weight_decay": 0.0, "shift": 0}
    config = SMALL.replace(images=16 * 400, checkpoint_every=16 * 400, precision="float32", **changes)
    purifier = OneStep(level=0.2, n_latents=8)
    found = adapt(Mean(), Shrinking(), purifier, kept, out=tmp_path, config=config).classifier.get_parameter("weight")

    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    shrunk = 0.25 / (0.25 + 0.2**2)  # what the denoiser leaves of an image, and of the noise
    noise = 10 * shrunk * 0.2 / 2 * (1 / 12 + 1 / 12) ** 0.5  # of the means of twelve pixels each, for images in [0, 1]
    behind = shrunk * half(kept.unit).double()[:, None] + noise * nodes
    truth = labels.double()[:, None].expand_as(behind)

    def expected(weight: Tensor) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(weight[0] * behind + weight[1], truth, reduction="none")
        return (losses @ weights).mean() / weights.sum()

    best = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        gradient, curve = torch.func.grad(expected)(best), torch.autograd.functional.hessian(expected, best)
        best -= torch.linalg.solve(curve, gradient)
    torch.testing.assert_close(found.detach().double(), best, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_attack_climbs_the_exact_gradient(norm: str) -> None:
    purified = PurifiedClassifier(net().double(), Shrinking(), purifier=PURIFIER, gradient=Unrolled())
    images, labels, seeds = data(5).unit.double() * 0.5 + 0.2, data(5).labels, torch.arange(5)
    threat = ThreatModel(norm=norm, eps=0.1)
    config = SMALL.replace(attack_steps=2)
    attacked = attacked_images(purified, images, labels, seeds, threat, config)
    assert (threat.distance(attacked, images) <= 0.1 + 1e-9).all()
    assert not attacked.requires_grad

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(purified(x, seeds=seeds), labels, reduction="sum")

    probe = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(probe), probe)
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        slope = (loss(images + 1e-6 * direction) - loss(images - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-8)
    with torch.no_grad():
        assert loss(attacked) > loss(images)


def test_a_shift_leaves_black_and_wraps_nothing() -> None:
    x = torch.arange(1.0, 25.0).view(1, 1, 4, 6).repeat(3, 1, 1, 1)
    still, down, up = learner._shifted(x, torch.tensor([[1, 1], [0, 1], [2, 2]]), 1)
    assert torch.equal(still, x[0])
    assert torch.equal(down[:, 1:], x[1][:, :-1])
    assert not down[:, 0].any()
    assert torch.equal(up[:, :-1, :-1], x[2][:, 1:, 1:])
    assert not up[:, -1].any()
    assert not up[..., -1].any()


def test_each_step_of_the_attack_has_noise_of_its_own() -> None:
    seen: list[Tensor] = []

    class Recording(OneStep):
        def __call__(self, backbone: nn.Module, images: Tensor, *, seeds: Tensor, **options: Any) -> Any:
            seen.append(seeds)
            return super().__call__(backbone, images, seeds=seeds, **options)

        def differentiate(self, backbone: nn.Module, images: Tensor, *, seeds: Tensor, **options: Any) -> Any:
            seen.append(seeds)
            return super().differentiate(backbone, images, seeds=seeds, **options)

    purifier = Recording(level=0.3, n_latents=2)
    purified, chosen = PurifiedClassifier(net(), Shrinking(), purifier=purifier, gradient=Unrolled()), data(5)
    config = SMALL.replace(attack_steps=3)
    attacked_images(purified, chosen.unit, chosen.labels, torch.arange(5), ThreatModel(eps=0.1), config)
    assert len(torch.cat(seen).unique()) == 3 * 5


def test_adapt_attacks_along_the_exact_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signs of a step are those of finite differences; the straight-through gradient has others."""
    found: list[PurifiedClassifier] = []

    def recorded(purified: PurifiedClassifier, *rest: Any) -> Tensor:
        found.append(copy.deepcopy(purified).double())
        return attacked_images(purified, *rest)

    monkeypatch.setattr(learner, "attacked_images", recorded)
    threat, config = ThreatModel(eps=0.1), SMALL.replace(images=6, attack_steps=1)
    adapt(net(), Mirroring(), PURIFIER, data(), out=tmp_path, adversarial=True, threat=threat, config=config)
    purified, images, labels, seeds = found[0], data(5).unit.double() * 0.5 + 0.2, data(5).labels, torch.arange(5)
    start, moved = (
        attacked_images(purified, images, labels, seeds, threat, config.replace(attack_step_size=size))
        for size in (1e-12, 1e-3)
    )

    @torch.no_grad()
    def losses(x: Tensor) -> Tensor:
        return F.cross_entropy(purified(x, seeds=derived_seeds(seeds, 2)), labels, reduction="none")

    steps = 1e-6 * torch.eye(images[0].numel(), dtype=torch.float64).reshape(-1, *SHAPE)
    slopes = torch.stack([losses(start + step) - losses(start - step) for step in steps], 1).reshape(images.shape)
    inside = (start - images).abs() < 0.098  # where the step is not cut off
    assert inside.float().mean() > 0.9
    assert torch.equal((moved - start).sign()[inside], slopes.sign()[inside])


def test_dropout_and_batch_statistics_belong_to_the_loss_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attacking, calls = net(0.5), [], []
    expected = copy.deepcopy(model.norm).train()

    def recorded(*arguments: Any) -> Tensor:
        attacking.append(True)
        attacked = attacked_images(*arguments)
        attacking.clear()
        return attacked

    def note(part: nn.Module, inputs: tuple[Tensor]) -> None:
        phase = "attack" if attacking else "loss" if torch.is_grad_enabled() else "purification"
        calls.append((part, phase, part.training, inputs[0].detach().clone()))

    monkeypatch.setattr(learner, "attacked_images", recorded)
    for part in (model.norm, model.dropout):
        part.register_forward_pre_hook(note)
    purified = PurifiedClassifier(model, Shrinking(), purifier=PURIFIER, gradient=Unrolled())
    config = SMALL.replace(precision="float32")
    trained = AdaptationLearner(purified, data(), data(6, 2), ThreatModel(eps=0.05), config)
    for number in range(3):  # with an evaluation on held-out images after the second one
        trained.step(number)
    assert trained.scores
    assert {(part, phase, mode) for part, phase, mode, _ in calls} == {
        (part, phase, phase == "loss")
        for part in (model.norm, model.dropout)
        for phase in ("attack", "purification", "loss")
    }
    batches = [batch for part, phase, _, batch in calls if part is model.norm and phase == "loss"]
    assert len(batches) == 3 * 2
    for batch in batches:
        expected(batch)
    for name, statistic in expected.named_buffers():
        torch.testing.assert_close(model.norm.get_buffer(name), statistic)


def test_the_start_of_the_attack_is_independent_of_the_noise_of_the_loss() -> None:
    """Both are drawn from the image's seed, and one key for both would give them the same random words."""
    seeds, grey = torch.arange(400), torch.full((400, *SHAPE), 0.5)
    purified = PurifiedClassifier(net(), Shrinking(), purifier=PURIFIER, gradient=Unrolled())
    config = SMALL.replace(attack_steps=1, attack_step_size=1e-9)
    attacked = attacked_images(purified, grey, seeds % 3, seeds, ThreatModel(eps=0.1), config) - grey
    noise = draw_latents(seeds, 1, SHAPE).abs()
    assert torch.corrcoef(torch.stack([attacked.flatten(), noise.flatten()]))[0, 1].abs() < 0.05


def test_adversarial_training_lowers_the_loss_under_attack(tmp_path: Path) -> None:
    threat = ThreatModel(eps=0.25)
    plain = SMALL.replace(images=600, batch_size=12)
    config = plain.replace(attack_steps=2, clean_weight=0.0)
    test, seeds, losses = data(30, 1), torch.arange(30), []
    for adversarial in (False, True):
        attack = {"threat": threat, "config": config} if adversarial else {"config": plain}
        keep = {"adversarial": adversarial, **attack}
        found = adapt(net(), Shrinking(), PURIFIER, data(60), out=tmp_path / str(adversarial), **keep)
        model = PurifiedClassifier(found.classifier, Shrinking(), purifier=PURIFIER, gradient=Unrolled())
        attacked = attacked_images(model, test.unit, test.labels, seeds, threat, config.replace(attack_steps=5))
        with torch.no_grad():
            losses.append(F.cross_entropy(model(attacked, seeds=seeds + 99), test.labels).item())
    assert losses[1] < 0.8 * losses[0]


def test_a_killed_adaptation_continues_to_the_same_weights(tmp_path: Path) -> None:
    keep = {"held_out": data(9, 2), "adversarial": True, "threat": ThreatModel(eps=0.05), "config": SMALL}
    whole = adapt(net(0.2), Shrinking(), PURIFIER, data(), out=tmp_path / "whole", **keep)

    def kill(state: object) -> None:
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapt(net(0.2), Shrinking(), PURIFIER, data(), out=tmp_path / "killed", on_step=kill, **keep)
    continued = adapt(net(0.2), Shrinking(), PURIFIER, data(), out=tmp_path / "killed", **keep)
    assert same(whole.classifier, continued.classifier)
    assert whole.record == continued.record
    assert len(whole.record["held_out_scores"]) == 4
    again = adapt(net(0.2), Shrinking(), PURIFIER, data(), out=tmp_path / "killed", **keep)
    assert same(again.classifier, whole.classifier)
    adapt(net(0.2), Shrinking(), PURIFIER, data(), out=tmp_path / "killed", max_parallel=5, normalize=None, **keep)
    frozen = net(0.2)
    frozen.norm.requires_grad_(False)
    for model, purifier, options in (
        (net(0.2), PURIFIER.replace(level=0.4), {}),
        (net(0.2), PURIFIER.replace(n_latents=PURIFIER.n_latents + 1), {}),
        (net(0.2), PURIFIER, {"normalize": (0.3, 0.2)}),
        (frozen, PURIFIER, {}),
        (net(0.2), PURIFIER, {"config": SMALL.replace(micro_batch=2)}),  # other statistics in BatchNorm
    ):
        with pytest.raises(errors.CheckpointError, match="other settings"):
            adapt(model, Shrinking(), purifier, data(), out=tmp_path / "killed", **(keep | options))


def test_without_held_out_images_a_stop_has_the_last_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two checkpoints, which are every fourth step."""
    config, found = SMALL.replace(checkpoint_every=24, minutes=1.0), {}
    for steps in (5, 7):
        left = iter([1.0] * (steps - 1) + [-1.0] * 9)
        monkeypatch.setattr(run, "countdown", lambda minutes, left=left: lambda: next(left))
        monkeypatch.setattr(run, "settled", lambda config, *_: config.replace(minutes=None))
        result = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path / str(steps), config=config)
        assert not result.finished
        found[result.record["images_seen"]] = result.classifier
    whole = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path / "30", config=SMALL.replace(images=30))
    assert list(found) == [30, 42]
    assert not same(found[30], found[42])
    assert whole.finished


def test_a_training_that_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(errors.TrainingError, match="diverged"):
        adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path, config=SMALL.replace(learning_rate=1e20))


def test_another_backbone_in_float16_does_not_continue_an_adaptation(tmp_path: Path) -> None:
    for weight, refused in ((0.5, False), (0.5, False), (0.9, True)):
        backbone = Shrinking()
        backbone.gain = nn.Parameter(torch.tensor(weight, dtype=torch.float16), requires_grad=False)
        with pytest.raises(errors.CheckpointError, match="other settings") if refused else contextlib.nullcontext():
            adapt(net(), backbone, PURIFIER, data(), out=tmp_path / "out", config=SMALL)


class Tied(Net):
    """The same weights under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = self.head

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.copy(images.flatten(1).repeat(1, 2))


def test_weights_under_two_names_stay_the_same_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Tied().eval()
    first = adapt(start, Shrinking(), PURIFIER, data(), out=tmp_path / "a", config=SMALL)
    assert not torch.equal(first.classifier.head.weight, start.head.weight)
    assert first.classifier.head.weight is first.classifier.copy.weight
    read = load_adapted(tmp_path / "a", Tied())
    assert same(read, first.classifier)
    again = adapt(start, Shrinking(), PURIFIER, data(), out=tmp_path / "a", config=SMALL)
    assert same(again.classifier, first.classifier)


def test_the_best_weights_on_held_out_images_are_kept_and_patience_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.8, 0.6, 0.7, 0.9])
    monkeypatch.setattr(AdaptationLearner, "_score", lambda self, held_out: next(scores))
    keep = {"held_out": data(6, 2), "config": SMALL.replace(images=600, patience=2)}
    result = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path, **keep)
    assert result.record["held_out_scores"] == [0.5, 0.8, 0.6, 0.7]
    assert result.record["images_seen"] == 4 * 12
    assert result.finished
    shorter = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path, **keep)
    assert same(shorter.classifier, result.classifier), "what has ended does not go on"


@pytest.mark.parametrize(("trained_on", "held_out_steps"), [(1, 10), (12, 12)])
def test_attacks_on_held_out_images_are_no_shorter_than_ten_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained_on: int, held_out_steps: int
) -> None:
    """A classifier that has learned to withstand one step alone must not be taken for a robust one."""
    found: list[tuple[int, int]] = []

    def recorded(purified: PurifiedClassifier, images: Tensor, *rest: Any) -> Tensor:
        *_, config = rest
        found.append((len(images), config.attack_steps))
        return attacked_images(purified, images, *rest)

    monkeypatch.setattr(learner, "attacked_images", recorded)
    config = SMALL.replace(images=12, attack_steps=trained_on, attack_step_size=0.02)
    threat = ThreatModel(eps=0.05)
    adapt(
        net(),
        Shrinking(),
        PURIFIER,
        data(),
        out=tmp_path,
        held_out=data(5, 2),
        adversarial=True,
        threat=threat,
        config=config,
    )
    assert found == [(6, trained_on), (6, trained_on), (5, held_out_steps)]


def test_the_weights_are_read_again_and_know_what_they_were_adapted_to(tmp_path: Path) -> None:
    result = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path, config=SMALL)
    read = load_adapted(tmp_path, net())
    assert same(read, result.classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PurifiedClassifier(read, Shrinking(), purifier=PURIFIER.replace(n_latents=8))
        PurifiedClassifier(read, Shrinking(), purifier=Identity())
    with pytest.warns(errors.ClassifierWarning, match="adapted to another purifier"):
        PurifiedClassifier(read, Shrinking(), purifier=PURIFIER.replace(level=0.5))
    record = json.loads((tmp_path / "adaptation.json").read_text())
    assert record["purifier"]["level"] == 0.3
    assert "Net" in repr(result)
    with pytest.raises(errors.ClassifierError, match="another architecture"):
        load_adapted(tmp_path, nn.Linear(2, 3))
    with pytest.raises(errors.BackboneFileError, match="no record of an adaptation"):
        load_adapted(tmp_path / "nothing", net())


def test_the_training_images_are_never_taken_for_normalised_ones(tmp_path: Path) -> None:
    keep = {"config": SMALL.replace(images=12), "normalize": (0.3, 0.2)}
    found = [
        adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path / inputs, inputs=inputs, **keep).classifier
        for inputs in ("unit", "normalized")
    ]
    assert same(*found)


def test_a_classifier_may_be_adapted_again(tmp_path: Path) -> None:
    config = SMALL.replace(images=12)
    first = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path / "first", config=config).classifier
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adapt(first, Shrinking(), OneStep(level=0.5), data(), out=tmp_path / "again", config=config).classifier
    assert (first.adapted_to["purifier"]["level"], again.adapted_to["purifier"]["level"]) == (0.3, 0.5)


def test_a_length_in_minutes_leaves_time_for_the_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation belongs to a checkpoint: it is in the measured cost of one, and leaves nothing behind."""
    given, evaluated = [], []
    monkeypatch.setattr(AdaptationLearner, "evaluate", lambda self: evaluated.append(None))

    def planned(learner: AdaptationLearner, *_: object) -> int:
        given.append(lambda: _[-1](learner))
        return 12

    monkeypatch.setattr("cmap_defense.training.plan.planned_images", planned)
    config = SMALL.replace(images=None, minutes=5.0, checkpoint_every=60)
    adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path, held_out=data(6, 2), config=config)
    assert len(evaluated) == 1
    given[0]()
    assert len(evaluated) == 2


LABELS = torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"classifier": lambda x: x}, errors.ClassifierError, "nn.Module"),
        (
            {"classifier": PurifiedClassifier(net(), Shrinking(), purifier=PURIFIER)},
            errors.ClassifierError,
            "purifies already",
        ),
        ({"classifier": net().requires_grad_(False)}, errors.SettingsError, "nothing can be trained"),
        ({"data": (torch.zeros(2, *SHAPE), LABELS[:1])}, errors.CmapError, "label"),
        ({"data": (2 * torch.ones(2, *SHAPE), LABELS)}, errors.CmapError, r"\[0, 1\]"),
        ({"data": (torch.zeros(2, *SHAPE), LABELS + 3)}, errors.CmapError, "from 0 to 2"),
        ({"data": DataLoader(TensorDataset(torch.zeros(2, *SHAPE), LABELS))}, errors.CmapError, "loader.dataset"),
        ({"data": data(0)}, errors.DataError, "one image at least"),
        ({"data": "embedded"}, errors.DataError, "embedded images are test images"),
        (
            {"held_out": "cifar10"},
            errors.InputTypeError,
            r"held-out ones are neither: take .* held_out=images\[-5_000:",
        ),
        ({"held_out": Path("photos")}, errors.InputTypeError, "held_out='photos' names training and test images"),
        ({"held_out": data(0)}, errors.DataError, "one image at least"),
        ({"threat": ThreatModel()}, errors.SettingsError, "adversarial=True"),
        ({"config": SMALL.replace(attack_steps=9)}, errors.SettingsError, "adversarial=True"),
        ({"epochs": 2}, errors.OptionError, r"AdaptationConfig\(images"),
        ({"eps": 0.1}, errors.OptionError, "ThreatModel"),
        ({"normalise": 0.1}, errors.OptionError, "normalize"),
    ],
)
def test_wrong_arguments(tmp_path: Path, changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"classifier": net(), "backbone": Shrinking(), "purifier": PURIFIER, "data": data()} | changes
    with pytest.raises(error, match=message):
        adapt(**arguments, out=tmp_path)


def test_a_data_set_is_read_as_evaluate_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = TensorDataset(data().unit, data().labels)
    first = adapt(net(), Shrinking(), PURIFIER, pairs, config=SMALL)
    assert same(load_adapted("runs/adapted", net()), first.classifier)
    second = adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path / "images", config=SMALL)
    assert same(first.classifier, second.classifier)


def test_there_is_one_average_of_the_weights() -> None:
    with pytest.raises(errors.SettingsError, match=r"one number of images.* \(6, 12\)"):
        AdaptationConfig(ema_half_life=(6, 12))


def test_what_is_only_named_is_opened_as_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def known(split: str) -> LabelledImages:
        opened.append(split)
        return data()

    monkeypatch.setitem(sources.KNOWN, "cifar10", known)  # pyright: ignore[reportArgumentType]
    adapt(net(), Shrinking(), PURIFIER, "cifar10", out=tmp_path, config=SMALL)
    assert opened == ["train"]


def test_two_processes_share_the_gradient_of_one() -> None:
    config = SMALL.replace(precision="float32")  # a sum in bfloat16 depends on how the rows are divided

    def gradients(team: Ranks) -> list[Tensor]:
        model = net()
        model.norm = nn.Identity()  # its statistics are those of a process's own rows
        purified = PurifiedClassifier(model, Shrinking(), purifier=PURIFIER, gradient=Unrolled())
        learner = AdaptationLearner(purified, data(), None, ThreatModel(eps=0.1), config, team)
        learner._backward(learner._batch(3))
        return [p.grad for p in learner.weights.values() if p.grad is not None]

    first, second = gradients(Ranks(0, 2)), gradients(Ranks(1, 2))
    for a, b, whole in zip(first, second, gradients(Ranks()), strict=True):
        torch.testing.assert_close(a + b, whole)
        assert not torch.allclose(a, b)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    adapt(net(), Shrinking(), PURIFIER, data(), out=tmp_path, config=SMALL)
    with pytest.raises(errors.ClassifierError, match=r"Weights are loaded into an nn\.Module"):
        load_adapted(tmp_path, lambda images: images)  # pyright: ignore[reportArgumentType]
    (tmp_path / "classifier.safetensors").unlink()
    with pytest.raises(errors.BackboneFileError, match=r"classifier\.safetensors is missing"):
        load_adapted(tmp_path, net())


def test_a_classifier_that_does_not_take_the_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.SettingsError, match="no weights, so that nothing can be trained"):
        adapt(nn.Flatten(), Shrinking(), PURIFIER, data(), out=tmp_path, config=SMALL)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(7, 3))
    with pytest.raises(errors.ClassifierError, match=r"The classifier of 'adapt' raised RuntimeError for an image"):
        adapt(narrow, Shrinking(), PURIFIER, data(), out=tmp_path, config=SMALL)
    large = torch.rand(4, SHAPE[0], 2 * SHAPE[1], SHAPE[2]), torch.tensor([0, 1, 2, 0])
    with pytest.raises(errors.InputValueError, match="size"):
        adapt(net(), Shrinking(), PURIFIER, large, out=tmp_path, config=SMALL)
    assert list(tmp_path.iterdir()) == []
