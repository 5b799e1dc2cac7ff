"""torchattacks, foolbox and the Adversarial Robustness Toolbox as their documentation says to use them."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchattacks
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from library_models import EPS, accuracy, assert_legal_and_moved, images_and_labels, purified, traces, undefended

with warnings.catch_warnings():  # foolbox.attacks.blur imports from a place that SciPy has deprecated
    warnings.simplefilter("ignore")
    import foolbox


def by_torchattacks(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    return torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps, random_start=False)(images, labels)


def by_foolbox(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=steps, random_start=False)
    _, found, success = attack(wrapped, images, labels, epsilons=EPS)
    assert success.shape == labels.shape
    return found


def estimator(model: nn.Module) -> PyTorchClassifier:
    shapes: Any = {"input_shape": (1, 28, 28), "nb_classes": 10, "clip_values": (0.0, 1.0)}
    return PyTorchClassifier(model=model, loss=nn.CrossEntropyLoss(), device_type="cpu", **shapes)


def by_art(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> Tensor:
    sizes: Any = {"eps": EPS, "eps_step": EPS / 4, "max_iter": steps}
    attack = ProjectedGradientDescent(estimator(model), norm=np.inf, verbose=False, **sizes)
    return torch.from_numpy(attack.generate(x=images.numpy(), y=labels.numpy()))


EVERY = pytest.mark.parametrize("attack", [by_torchattacks, by_foolbox, by_art])


@EVERY
def test_pgd_breaks_the_bare_classifier(attack: Any) -> None:
    images, labels = images_and_labels()
    model = undefended()
    found = attack(model, images, labels, 10)
    assert_legal_and_moved(found, images)
    assert accuracy(model, images, labels) == 1
    assert accuracy(model, found, labels) <= 0.25


@EVERY
def test_pgd_runs_on_the_purified_classifier_and_leaves_what_it_leaves_on_any(attack: Any) -> None:
    """foolbox and ART call ``backward()``, which reaches the weights of any model."""
    images, labels = images_and_labels(2)
    model, plain = purified(), undefended()
    modes, weights = traces(model)
    assert not weights
    found = attack(model, images, labels, 2)
    assert_legal_and_moved(found, images)
    assert torch.isfinite(model(found)).all()
    attack(plain, images, labels, 1)
    assert bool(traces(plain)[1]) == (attack is not by_torchattacks)
    assert traces(model) == (modes, ["classifier." + name for name in traces(plain)[1]])


def test_eot_of_torchattacks_averages_over_the_purifications_noise() -> None:
    images, labels = images_and_labels(2)
    found = torchattacks.EOTPGD(purified(), eps=EPS, alpha=EPS / 4, steps=2, eot_iter=2)(images, labels)
    assert_legal_and_moved(found, images)


def test_gradients_by_the_libraries_reach_every_image() -> None:
    images, labels = images_and_labels(2)
    leaf = images.clone().requires_grad_()
    logits = foolbox.PyTorchModel(purified(), bounds=(0, 1), device="cpu")(leaf)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
    model = purified(seed=0)
    wrapped = estimator(model)
    with torch.no_grad():
        assert np.array_equal(wrapped.predict(images.numpy()), model(images).numpy())
    by_label = wrapped.loss_gradient(images.numpy(), np.eye(10, dtype=np.float32)[labels.numpy()])
    assert (np.abs(by_label).reshape(len(images), -1).max(axis=1) > 0).all()
