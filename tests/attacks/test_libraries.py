"""APGD, Square and AutoAttack by their authors' library: legal, repeatable, without traces or successes by chance."""

import logging
import sys

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.attacks import APGD, Attack, AutoAttack, SeededModel, Square, ThreatModel
from cmap_defense.common.rng import draw_latents
from cmap_defense.errors import GradientError, MissingExtraError, SettingsError
from cmap_defense.gradients import Detached, StraightThrough, Unrolled
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 7, 5)
WEIGHT = noise(105, 5, seed=2)


def linear(images: Tensor) -> Tensor:
    return (images.flatten(1) - 0.5) @ WEIGHT.to(images)


def labelled(count: int = 6) -> tuple[Tensor, Tensor]:
    images = uniform(count, *SHAPE, seed=1)
    return images, linear(images).argmax(dim=1)


def flaky(images: Tensor) -> Tensor:
    """Three predictions in ten are moved on to the next class, by chance."""
    logits = linear(images)
    moved = torch.rand(len(images)) < 0.3
    return torch.where(moved[:, None], logits.roll(1, dims=1), logits)


class Noisy(SeededModel):
    """A random model that needs seeds, and keeps them."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def __call__(self, images: Tensor, *, seeds: Tensor | None = None) -> Tensor:
        assert seeds is not None
        self.given.append(seeds)
        return linear(images + 0.05 * draw_latents(seeds, 1, SHAPE)[:, 0].to(images))


def small(threat: ThreatModel, **options: object) -> list[Attack]:
    """One of each, cheap."""
    return [
        APGD(threat, steps=4, **options),
        APGD(threat, steps=4, eot=2, loss="dlr", **options),
        Square(threat, queries=12, samples=2, **options),
        AutoAttack(threat, steps=3, eot=2, **options),
        AutoAttack(threat, version="standard", steps=2, queries=6, **options),
    ]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("eps", "count"), [(0.0, 6), (0.05, 6), (0.5, 6), (0.1, 0), (0.1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", range(5))
def test_images_are_legal_and_reevaluated(norm: str, eps: float, count: int, dtype: torch.dtype, which: int) -> None:
    images, labels = labelled(count)
    images, threat = images.to(dtype), ThreatModel(norm=norm, eps=eps)
    result = small(threat, restarts=1 if count > 1 else 2)[which](linear, images, labels)
    assert result.images.shape == images.shape
    assert result.images.dtype == dtype
    assert (threat.distance(result.images, images) <= eps + 1e-6).all()
    assert ((result.images >= 0) & (result.images <= 1)).all()
    assert torch.equal(result.success, linear(result.images).argmax(dim=1) != labels)
    assert eps > 0 or not result.success.any()


@pytest.mark.parametrize("which", range(5))
def test_the_seed_rules_them_and_nothing_outside_changes(which: int) -> None:
    images, labels = labelled()
    before, level = torch.get_rng_state(), logging.getLogger("auto-attack").level
    counts = dict(pyautoattack.checks.funcs)
    trace = sys.gettrace()

    def tracing(*_: object) -> None:
        return None

    def grad(batch: Tensor) -> Tensor:  # a call of this name is what the library's check for dynamic models counts
        return flaky(batch)

    sys.settrace(tracing)
    try:
        first, again, other = (
            small(ThreatModel(), seed=seed)[which](grad, images, labels).candidates for seed in (1, 1, 2)
        )
        left = sys.gettrace()
    finally:
        sys.settrace(trace)
    assert left is tracing
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.getLogger("auto-attack").level == level
    assert pyautoattack.checks.funcs == counts


@pytest.mark.parametrize("attack", [APGD, Square, AutoAttack])
def test_without_the_library_the_error_names_the_extra(attack: type[Attack], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    images, labels = labelled()
    with pytest.raises(MissingExtraError, match=r"cmap-defense\[attacks\]"):
        attack(ThreatModel())(linear, images, labels)


@pytest.mark.parametrize("which", [0, 1, 3, 4])
@pytest.mark.parametrize("trained", [False, True])
def test_a_model_without_a_gradient_is_an_error(which: int, trained: bool) -> None:
    """Also where its logits have one to its own weights."""
    images, labels = labelled()
    weight = torch.ones((), requires_grad=trained)
    with pytest.raises(GradientError):
        small(ThreatModel())[which](lambda x: weight * linear(x).detach(), images, labels)


@pytest.mark.parametrize("attack", [APGD, AutoAttack])
def test_the_gradient_is_that_of_the_given_mode(attack: type[APGD] | type[AutoAttack]) -> None:
    class Pooled(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return linear(batch)

    quick = CMAPSettings(n_latents=1, iterations=2)
    model = PurifiedClassifier(Pooled(), ToyBackbone(SHAPE).requires_grad_(False), settings=quick, gradient=Detached())
    images, _ = labelled(2)
    with torch.no_grad():
        labels = model(images, seeds=[0, 1]).argmax(dim=1)
    threat = ThreatModel(eps=0.05)
    with pytest.raises(GradientError):
        attack(threat, steps=1, eot=1)(model, images, labels)
    modes = (StraightThrough(), Unrolled())
    found = [attack(threat, steps=3, eot=1, gradient=mode)(model, images, labels) for mode in modes]
    assert attack is AutoAttack or not torch.equal(found[0].candidates, found[1].candidates)
    with pytest.raises(SettingsError, match="PurifiedClassifier"):
        attack(threat, gradient=Unrolled())(linear, images, labels)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("which", [0, 3])
def test_an_images_noise_and_outcome_are_its_own(which: int, known: bool) -> None:
    images, labels = labelled()
    options = {"noise": "known" if known else "fresh"} | ({} if which == 0 else {"batch_size": 1})
    attack = (APGD if which == 0 else AutoAttack)(ThreatModel(eps=0.05), steps=4, eot=2, **options)
    together = attack(Noisy(), images, labels)
    for index in (0, 4):
        rows = slice(index, index + 1)
        alone = attack(Noisy(), images[rows], labels[rows], indices=[index])
        assert torch.allclose(alone.images, together.images[rows], atol=1e-6)
        assert which == 3 or alone.queries == together.queries


@pytest.mark.parametrize("which", range(5))
def test_known_noise_is_the_noise_of_every_evaluation(which: int) -> None:
    images, labels = labelled(6)
    model = Noisy()
    small(ThreatModel(eps=0.02), noise="known")[which](model, images, labels)
    reevaluated = model.given[-1].tolist()
    assert len(set(reevaluated)) == 6
    assert {seed for given in model.given for seed in given.tolist()} == set(reevaluated)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_apgd_finds_the_optimum_of_a_linear_margin(norm: str, targeted: bool) -> None:
    def two_classes(images: Tensor) -> Tensor:
        score = images.flatten(1) @ WEIGHT[:, 0]
        return torch.stack([score, -score], dim=1) / 100

    images, labels = torch.full((2, *SHAPE), 0.5), torch.zeros(2, dtype=torch.int64)
    attack = APGD(ThreatModel(norm=norm, eps=0.1), steps=40)
    found = attack(two_classes, images, labels, targets=1 - labels if targeted else None).candidates[:, 0]
    direction = -WEIGHT[:, 0].sign() if norm == "linf" else -WEIGHT[:, 0] / WEIGHT[:, 0].norm()
    delta = (found - images).flatten(1)
    assert torch.allclose(delta, 0.1 * direction.expand(2, -1), atol=2e-3 if norm == "l2" else 1e-6)


def test_apgd_attacks_images_that_are_wrong_at_first_which_the_library_leaves_alone() -> None:
    images, labels = labelled()
    wrong = (labels + 1) % 5
    attack = pyautoattack.autopgd_base.APGDAttack(linear, n_iter=5, eps=0.1)
    assert torch.equal(attack.perturb(images, wrong), images)
    result = APGD(ThreatModel(eps=0.1), steps=5)(linear, images, wrong)
    assert (result.distance > 0.09).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_square_raises_the_margin_and_breaks_images_without_a_gradient(norm: str, targeted: bool) -> None:
    images, labels = labelled()
    targets = (labels + 1) % 5 if targeted else None
    eps = 0.25 if norm == "linf" else 3.0
    with torch.no_grad():
        result = Square(ThreatModel(norm=norm, eps=eps), queries=150, samples=1)(
            linear, images, labels, targets=targets
        )
    margin = result.history["margin"]
    assert margin.shape == (151, 6)
    assert (margin.diff(dim=0) >= 0).all()
    assert (margin[-1] > margin[0]).all()
    assert torch.equal(result.success, margin[-1] > 0)
    assert result.success.float().mean() > 0.5
    assert result.queries == 152


def unguarded(eps: float, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The library as it is: its images, and which it says are broken."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack = pyautoattack.AutoAttack(flaky, eps=eps, version="rand", seed=0)
        attack.apgd = pyautoattack.autopgd_base.APGDAttack(flaky, n_iter=5, eps=eps, eot_iter=4, device="cpu")
        found, predicted = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    return found, predicted != labels


def wrong_share(images: Tensor, labels: Tensor) -> Tensor:
    """[B], of forty predictions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.stack([flaky(images).argmax(dim=1) != labels for _ in range(40)]).float().mean(dim=0)


def test_alone_the_library_takes_chance_for_success_on_images_that_cannot_be_attacked() -> None:
    images, labels = labelled(60)
    found, claimed = unguarded(1e-6, images, labels)
    assert claimed.float().mean() > 0.5, "it claims to have broken most of them"
    assert 0.2 < wrong_share(found, labels)[claimed].mean() < 0.4, "re-evaluated, they fail as often as clean ones"
    result = AutoAttack(ThreatModel(eps=1e-6), steps=5, eot=4)(flaky, images, labels, reevaluations=40)
    assert result.history["claimed"].shape == result.history["held"].shape == (3, 60)
    assert result.history["claimed"][0].mean() > 0.5
    assert 0.2 < result.history["held"][0].mean() < 0.4
    assert (result.history["claimed"][-1] * (result.history["held"][-1] == 1)).mean() < 0.2
    assert 0.2 < result.mean_success.mean() < 0.4


def test_alone_the_library_never_attacks_what_is_misclassified_once_and_the_rounds_do() -> None:
    images, labels = labelled(60)
    threat = ThreatModel(eps=0.2)
    found, claimed = unguarded(0.2, images, labels)
    untouched = (found == images).flatten(1).all(dim=1)
    assert 0.15 < untouched.float().mean() < 0.6
    assert claimed[untouched].float().mean() > 0.8, "and of the others claims that they are robust"
    assert wrong_share(found, labels)[untouched].mean() < 0.4
    one, more = (
        AutoAttack(threat, steps=5, eot=4, rounds=rounds)(flaky, images, labels, reevaluations=40) for rounds in (1, 4)
    )
    assert (one.distance == 0).float().mean() > 0.15
    assert (more.distance == 0).float().mean() < 0.05
    assert more.mean_success.mean() > one.mean_success.mean() + 0.1
    held = more.history["held"].mean(dim=1)
    assert held[-1] > held[0] + 0.1


def test_rounds_cost_a_deterministic_model_nothing_but_the_confirmations() -> None:
    images, labels = labelled()
    results = [
        AutoAttack(ThreatModel(eps=0.03), steps=5, eot=1, rounds=rounds)(linear, images, labels) for rounds in (1, 3)
    ]
    assert results[0].queries == results[1].queries
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].history["claimed"][0], results[0].history["held"][0])
