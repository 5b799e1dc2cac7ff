"""torchattacks as its documentation says to use it: an attack made of a model, called with images and labels."""

import torch
import torchattacks

from library_models import EPS, accuracy, assert_legal_and_moved, bare, images_and_labels, purified, traces


def test_pgd_breaks_the_bare_classifier() -> None:
    images, labels = images_and_labels()
    model = bare()
    found = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=10)(images, labels)
    assert_legal_and_moved(found, images)
    assert accuracy(model, images, labels) == 1
    assert accuracy(model, found, labels) <= 0.25


def test_pgd_runs_on_the_purified_classifier_and_leaves_nothing_behind() -> None:
    images, labels = images_and_labels()
    model = purified()
    before = traces(model)
    found = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=2, random_start=False)(images, labels)
    assert_legal_and_moved(found, images)
    assert torch.isfinite(model(found)).all()
    assert traces(model) == before


def test_eot_averages_over_the_purifications_noise() -> None:
    images, labels = images_and_labels(2)
    found = torchattacks.EOTPGD(purified(), eps=EPS, alpha=EPS / 4, steps=2, eot_iter=2)(images, labels)
    assert_legal_and_moved(found, images)
