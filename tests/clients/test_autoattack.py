"""AutoAttack as its documentation says to use it, and its automatic checks of the defence."""

import sys
from collections.abc import Iterator

import pyautoattack
import pytest
import torch
from pyautoattack import checks

from library_models import EPS, accuracy, assert_legal_and_moved, images_and_labels, purified, traces, undefended

RANDOM, DYNAMIC = "randomized defense", "dynamic defense"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The library's check for dynamic defences takes away the trace function, and never resets what it counted."""
    trace, counts = sys.gettrace(), dict(checks.funcs)
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    yield
    checks.funcs.update(counts)
    sys.settrace(trace)


def quick(model: torch.nn.Module, version: str) -> pyautoattack.AutoAttack:
    """Its first attack, for two steps."""
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, version=version, seed=0)
    attack.attacks_to_run = attack.attacks_to_run[:1]
    attack.apgd.n_iter, attack.apgd.eot_iter = 2, min(2, attack.apgd.eot_iter)
    return attack


def test_the_standard_version_breaks_the_bare_classifier_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = images_and_labels()
    model = undefended()
    attack = pyautoattack.AutoAttack(model, norm="Linf", eps=EPS, version="standard", seed=0)
    found, predictions = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    assert_legal_and_moved(found, images)
    assert accuracy(model, found, labels) == 0
    assert (predictions != labels).all()
    assert not caplog.records


def test_the_rand_version_runs_on_the_purified_classifier_and_leaves_nothing_behind() -> None:
    images, labels = images_and_labels(2)
    model = purified(seed=0)
    with torch.no_grad():
        right = model(images).argmax(dim=1) == labels
    before = traces(model)
    found, predictions = quick(model, "rand").run_standard_evaluation(images, labels, batch_size=len(images))
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found - images).abs().max() <= EPS + 1e-6
    assert traces(model) == before
    assert torch.equal(predictions, model(found).argmax(dim=1)), "with a seed, predictions are repeated"
    assert torch.equal(found[~right], images[~right]), "what is wrong at first is not attacked"


def test_gradients_of_its_losses_reach_every_image() -> None:
    images, labels = images_and_labels(2)
    for loss in (torch.nn.functional.cross_entropy, quick(undefended(), "rand").apgd.dlr_loss):
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(purified(seed=0)(leaf), labels).sum(), leaf)
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("version", "seed", "expected"),
    [
        ("standard", None, {RANDOM, DYNAMIC}),
        ("standard", 0, {DYNAMIC}),
        ("rand", None, {DYNAMIC}),
        ("rand", 0, {DYNAMIC}),
    ],
)
def test_its_checks_call_the_defence_random_without_a_seed_and_dynamic_always(
    version: str, seed: int | None, expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = images_and_labels(2)
    attack = quick(purified(seed), version)
    attack.attacks_to_run = ["apgd-dlr"]  # which checks for gradients that are zero
    attack.run_standard_evaluation(images, labels, batch_size=2)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == len(expected)
    assert all(any(word in line for line in said) for word in expected)
