"""All attacks on images of torchattacks, foolbox and ART, found in the libraries' own modules, small enough for a test.

Arguments of the names below get these small values.
"""

import contextlib
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import art.attacks.evasion
    import foolbox
    import torchattacks
    from art.attacks.attack import EvasionAttack
    from art.estimators.classification import PyTorchClassifier

SHAPE = (3, 8, 8)
"""Square, as some attacks need it."""

CLASSES = 10

Run = Callable[[nn.Module, Tensor, Tensor], object]
"""Attacks a model in eval mode, given images [B, C, H, W] in [0, 1] and their labels [B]; raises where it cannot."""

SIZES = {
    0.1: "initial_const step_size",
    1: "eot_iter epochs max_doubling max_halving nb_models_epoch nb_random_init",
    2: """N binary_search_steps conjugate_sinkhorn_max_iter eps_iter first_steps m max_inner_iter max_iter n_steps
        nb_steps noise_batch_size num_iter_set num_rotations num_translations num_trial num_xforms num_xforms_boost
        num_xforms_mask popsize projected_sinkhorn_max_iter repeats restarts sample_size steps""",
    4: """init_eval initial_gradient_eval_steps k max_batch_size n_queries nb_parallel nb_sample num_boost_queries
        population sub_dim""",
    8: "max_eval max_gradient_eval_steps",
    10: "directions max_iterations",
    40: "query_limit",
    50: "init_size",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"distance": foolbox.distances.l2, "largest_const": 1.0, "verbose": False}
SMALL |= {"n_classes": CLASSES, "patch_shape": SHAPE}


def small(kind: type, sizes: Mapping[str, Any], **special: Any) -> dict[str, Any]:
    """Arguments for an attack's class: of its own names those that are small, and the special ones."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in sizes.items() if name in names} | special


def subclasses(module: Any, base: type) -> dict[str, type]:
    """The classes in a module that can be made, by name."""
    return {
        name: kind
        for name, kind in vars(module).items()
        if inspect.isclass(kind) and issubclass(kind, base) and not inspect.isabstract(kind)
    }


def torchattacks_attacks(sizes: Mapping[str, Any] = SMALL) -> dict[str, Run]:
    """By name."""

    def runner(name: str, kind: Any) -> Run:
        def run(model: nn.Module, images: Tensor, labels: Tensor) -> object:
            special: dict[str, Any] = {}
            if name == "MultiAttack":
                return kind([torchattacks.FGSM(model), torchattacks.FFGSM(model)])(images, labels)
            if name == "LGV":
                special["trainloader"] = [(images, labels)]
            if name == "Pixle":
                special["x_dimensions"] = special["y_dimensions"] = (2, 4)
            return kind(model, **small(kind, sizes, **special))(images, labels)

        return run

    found = subclasses(torchattacks, torchattacks.attack.Attack)
    return {name: runner(name, kind) for name, kind in found.items()}


def foolbox_attacks(sizes: Mapping[str, Any] = SMALL) -> dict[str, Run]:
    """By name."""

    def runner(name: str, kind: Any) -> Run:
        def run(model: nn.Module, images: Tensor, labels: Tensor) -> object:
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
            criterion: Any = foolbox.criteria.Misclassification(labels)
            if name == "GenAttack":
                criterion = foolbox.criteria.TargetedMisclassification((labels + 1) % CLASSES)
            attack = kind(**small(kind, sizes))
            if name == "DatasetAttack":
                attack.feed(wrapped, images.flip(0))
            special: dict[str, Any] = {}
            if name == "BinarizationRefinementAttack":
                special["starting_points"] = images.flip(0).round()
            return attack(wrapped, images, criterion, epsilons=[0.1], **special)

        return run

    found = subclasses(foolbox.attacks, foolbox.attacks.base.Attack)
    return {name: runner(name, kind) for name, kind in found.items()}


def art_attacks(sizes: Mapping[str, Any] = SMALL) -> dict[str, Run]:
    """By name."""
    for module in pkgutil.walk_packages(art.attacks.evasion.__path__, "art.attacks.evasion."):
        with contextlib.suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module.name)

    def runner(name: str, kind: Any) -> Run:
        def run(model: nn.Module, images: Tensor, labels: Tensor) -> object:
            if name in ("SimBA", "VirtualAdversarialMethod"):  # which take probabilities
                model = nn.Sequential(model, nn.Softmax(dim=1))
            estimator = PyTorchClassifier(
                model,
                loss=nn.CrossEntropyLoss(),
                optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
                input_shape=SHAPE,
                nb_classes=CLASSES,
                clip_values=(0.0, 1.0),
                device_type="cpu",
            )
            x, y = images.numpy(), np.eye(CLASSES, dtype=np.float32)[labels.numpy()]
            special: dict[str, Any] = {}
            given: dict[str, Any] = {}
            names = inspect.signature(kind).parameters
            if "targeted" in names:
                special["targeted"] = False
            if name.startswith("FeatureAdversaries"):
                x, y, special["layer"], special["delta"] = x[:1], x[1:], -1, 0.2
            if name == "FeatureAdversariesNumpy":
                given["maxfun"] = 1
            if name == "UniversalPerturbation":
                special["attacker_params"] = {"max_iter": 2, "verbose": False}
            if name == "Wasserstein":
                special["regularization"] = 100.0
            if name == "FrameSaliencyAttack":
                special["attacker"] = art.attacks.evasion.FastGradientMethod(estimator)
            if name == "ShadowAttack":
                x, y = x[:1], y[:1]
            if name == "TargetedUniversalPerturbation":
                y = np.roll(y, 1, axis=1)
            first = next(iter(names))
            attack = kind(**{first: estimator}, **small(kind, sizes, **special))
            return attack.generate(x=x, y=y, **given)

        return run

    found: dict[str, type] = {}
    queue = [EvasionAttack]
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        if kind.__module__.startswith("art.attacks.evasion") and not inspect.isabstract(kind):
            found[kind.__name__] = kind
    return {name: runner(name, kind) for name, kind in found.items()}
