"""foolbox as its documentation says to use it: PyTorchModel around a model in eval mode, then an attack."""

from types import ModuleType

import pytest
import torch
from torch import nn

from library_models import EPS, accuracy, assert_legal_and_moved, bare, images_and_labels, purified, traces

# foolbox.attacks.blur imports from a place that SciPy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:foolbox.attacks.blur")


@pytest.fixture
def foolbox() -> ModuleType:
    import foolbox

    return foolbox


def attacked(foolbox: ModuleType, model: nn.Module, steps: int, start: bool) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = images_and_labels()
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=steps, random_start=start)
    _, found, success = attack(wrapped, images.to(wrapped.device), labels.to(wrapped.device), epsilons=EPS)
    model.cpu()
    return found.cpu(), success.cpu()


def test_pgd_breaks_the_bare_classifier(foolbox: ModuleType) -> None:
    images, labels = images_and_labels()
    model = bare()
    found, success = attacked(foolbox, model, 10, True)
    assert_legal_and_moved(found, images)
    assert success.float().mean() >= 0.75
    assert accuracy(model, found, labels) <= 0.25


def test_pgd_runs_on_the_purified_classifier_and_leaves_what_it_leaves_on_any(foolbox: ModuleType) -> None:
    images, _ = images_and_labels()
    model, plain = purified(), bare()
    modes, _ = traces(model)
    found, success = attacked(foolbox, model, 2, False)
    assert_legal_and_moved(found, images)
    assert success.shape == (len(images),)
    attacked(foolbox, plain, 1, False)
    assert traces(plain)[1], "foolbox goes back by backward(), which reaches the weights of any model"
    assert traces(model) == (modes, ["classifier." + name for name in traces(plain)[1]])


def test_its_own_gradient_reaches_every_image(foolbox: ModuleType) -> None:
    images, labels = images_and_labels()
    leaf = images.clone().requires_grad_()
    logits = foolbox.PyTorchModel(purified(), bounds=(0, 1), device="cpu")(leaf)
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, labels), leaf)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()
