"""Every attack of torchattacks, foolbox and ART that runs on an undefended classifier runs behind the defence."""

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from library_attacks import CLASSES, SHAPE, Run, art_attacks, foolbox_attacks, torchattacks_attacks
from toys import ToyBackbone, noise, uniform

FOUND = {"torchattacks": torchattacks_attacks(), "foolbox": foolbox_attacks(), "art": art_attacks()}

RUN_ON_BARE = {
    "torchattacks": """
        APGD APGDT AutoAttack BIM CW DIFGSM DeepFool EADEN EADL1 EOTPGD FAB FFGSM FGSM GN JSMA Jitter LGV MIFGSM
        MultiAttack NIFGSM OnePixel PGD PGDL2 PGDRS PGDRSL2 PIFGSM PIFGSMPP Pixle RFGSM SINIFGSM SPSA SparseFool Square
        TIFGSM TPGD UPGD VANILA VMIFGSM VNIFGSM
    """,
    "foolbox": """
        BinarizationRefinementAttack BinarySearchContrastReductionAttack BoundaryAttack DDNAttack DatasetAttack
        EADAttack GaussianBlurAttack GenAttack HopSkipJumpAttack InversionAttack L1AdamBasicIterativeAttack
        L1AdamProjectedGradientDescentAttack L1BasicIterativeAttack L1FMNAttack L1FastGradientAttack
        L1MomentumIterativeFastGradientMethod L1ProjectedGradientDescentAttack L2AdamBasicIterativeAttack
        L2AdamProjectedGradientDescentAttack L2AdditiveGaussianNoiseAttack L2AdditiveUniformNoiseAttack
        L2BasicIterativeAttack L2CarliniWagnerAttack L2ClippingAwareAdditiveGaussianNoiseAttack
        L2ClippingAwareAdditiveUniformNoiseAttack L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack
        L2ClippingAwareRepeatedAdditiveUniformNoiseAttack L2ContrastReductionAttack L2DeepFoolAttack L2FMNAttack
        L2FastGradientAttack L2MomentumIterativeFastGradientMethod L2ProjectedGradientDescentAttack
        L2RepeatedAdditiveGaussianNoiseAttack L2RepeatedAdditiveUniformNoiseAttack LInfFMNAttack
        LinearSearchBlendedUniformNoiseAttack LinearSearchContrastReductionAttack LinfAdamBasicIterativeAttack
        LinfAdamProjectedGradientDescentAttack LinfAdditiveUniformNoiseAttack LinfBasicIterativeAttack
        LinfDeepFoolAttack LinfFastGradientAttack LinfMomentumIterativeFastGradientMethod
        LinfProjectedGradientDescentAttack LinfRepeatedAdditiveUniformNoiseAttack NewtonFoolAttack
        SaltAndPepperNoiseAttack SparseL1DescentAttack SpatialAttack VirtualAdversarialAttack
    """,
    "art": """
        AdversarialPatchPyTorch AutoConjugateGradient AutoProjectedGradientDescent BasicIterativeMethod BoundaryAttack
        CarliniL0Method CarliniL2Method CarliniLInfMethod DeepFool ElasticNet FastGradientMethod
        FeatureAdversariesNumpy FeatureAdversariesPyTorch FrameSaliencyAttack HopSkipJump MomentumIterativeMethod
        NewtonFool PixelAttack ProjectedGradientDescentNumpy ProjectedGradientDescentPyTorch
        RescalingAutoConjugateGradient SaliencyMapMethod ShadowAttack SignOPTAttack SimBA SpatialTransformation
        SquareAttack TargetedUniversalPerturbation UniversalPerturbation VirtualAdversarialMethod Wasserstein ZooAttack
    """,
}
"""Those that run on the undefended classifier with what the tests install, each class once."""

ATTACKS: dict[str, Run] = {
    f"{library}.{name}": FOUND[library][name] for library, names in RUN_ON_BARE.items() for name in names.split()
}

SLOW = {
    "art.FeatureAdversariesNumpy",
    "art.PixelAttack",
    "art.VirtualAdversarialMethod",
    "torchattacks.AutoAttack",
}


class Tiny(nn.Module):
    """A convolution and a linear layer with fixed weights, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        channels, height, width = SHAPE
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.last = nn.Linear(8 * height * width, CLASSES)
        with torch.no_grad():
            for place, weight in enumerate(self.parameters()):
                weight.copy_(noise(*weight.shape, seed=place) / max(1, weight[0].numel()) ** 0.5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.first.weight.dtype)  # some attacks compute in double precision
        return self.last(torch.tanh(self.first(images - 0.5)).flatten(1))


def purified() -> PurifiedClassifier:
    """With one long step of the latents: its predictions depend on the images, as some attacks need."""
    settings = CMAPSettings(n_latents=1, iterations=1, learning_rate=3.0)
    backbone = ToyBackbone(SHAPE).requires_grad_(False)
    return PurifiedClassifier(Tiny(), backbone, settings=settings, seed=0, max_parallel=64).eval()


def attack(run: Run, model: nn.Module) -> None:
    """Two images that the model gets right; what the library prints and warns about is left out."""
    images = uniform(2, *SHAPE, seed=3)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  that is what the libraries draw from
        with torch.no_grad():
            labels = model(images).argmax(dim=1)
        run(model, images, labels)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in sorted(ATTACKS)]
)
def test_what_runs_on_the_bare_classifier_runs_behind_the_defence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some attacks write files
    attack(ATTACKS[name], Tiny())
    attack(ATTACKS[name], purified())
