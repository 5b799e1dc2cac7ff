"""The Adversarial Robustness Toolbox as its documentation says to use it: PyTorchClassifier around model and loss."""

import numpy as np
import torch
from art.attacks.evasion import ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

from library_models import EPS, accuracy, assert_legal_and_moved, bare, images_and_labels, purified, traces


def estimator(model: nn.Module) -> PyTorchClassifier:
    return PyTorchClassifier(
        model=model,
        loss=nn.CrossEntropyLoss(),
        input_shape=(1, 28, 28),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def attacked(model: nn.Module, steps: int) -> torch.Tensor:
    images, labels = images_and_labels()
    attack = ProjectedGradientDescent(
        estimator(model), norm=np.inf, eps=EPS, eps_step=EPS / 4, max_iter=steps, verbose=False
    )
    return torch.from_numpy(attack.generate(x=images.numpy(), y=labels.numpy()))


def test_pgd_breaks_the_bare_classifier() -> None:
    images, labels = images_and_labels()
    model = bare()
    found = attacked(model, 10)
    assert_legal_and_moved(found, images)
    assert accuracy(model, found, labels) <= 0.25


def test_pgd_runs_on_the_purified_classifier_and_leaves_what_it_leaves_on_any() -> None:
    images, _ = images_and_labels()
    model, plain = purified(), bare()
    modes, _ = traces(model)
    assert_legal_and_moved(attacked(model, 2), images)
    attacked(plain, 1)
    assert traces(plain)[1], "ART goes back by backward(), which reaches the weights of any model"
    assert traces(model) == (modes, ["classifier." + name for name in traces(plain)[1]])


def test_its_own_predictions_and_gradients_are_those_of_the_wrapper() -> None:
    images, labels = images_and_labels()
    model = purified(seed=0)
    wrapped = estimator(model)
    with torch.no_grad():
        assert np.array_equal(wrapped.predict(images.numpy()), model(images).numpy())
    gradient = wrapped.loss_gradient(images.numpy(), np.eye(10, dtype=np.float32)[labels.numpy()])
    assert (np.abs(gradient).reshape(len(images), -1).max(axis=1) > 0).all()
