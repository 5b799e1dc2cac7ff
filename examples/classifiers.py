"""Classifiers of other libraries for ``cmap-defense evaluate``: a function without arguments for each.

    cmap-defense evaluate --classifier examples/classifiers.py:torchvision_resnet50 ...
    cmap-defense evaluate --baseline gowal2021=examples/classifiers.py:robustbench_gowal2021 ...
    cmap-defense evaluate --classifier examples/classifiers.py:hub_vit --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5 ...

Each fetches its weights when it is first used. Models take images in [0, 1] unless --mean and --std say what they are
normalised with; --size and --resize bring images to the sizes of the classifier and the backbone. Copy the function
that is nearest to your own model, and give its file.
"""

from torch import Tensor, nn


def torchvision_resnet50() -> nn.Module:
    """ImageNet, 1000 classes; wants --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225."""
    from torchvision.models import ResNet50_Weights, resnet50

    return resnet50(weights=ResNet50_Weights.IMAGENET1K_V2)


def robustbench_gowal2021() -> nn.Module:
    """An adversarially trained CIFAR-10 model, for the same table: pip install robustbench "setuptools<81"."""
    from robustbench.utils import load_model

    return load_model("Gowal2021Improving_28_10_ddpm_100m", dataset="cifar10", threat_model="Linf")


def pyautoattack_resnet18() -> nn.Module:
    """An ordinary CIFAR-10 ResNet-18, not adversarially trained, in the wheel of pyautoattack (the extra [attacks])."""
    from pathlib import Path

    import pyautoattack
    import torch
    from pyautoattack.examples.resnet import ResNet18

    model = ResNet18()
    folder = Path(pyautoattack.__file__).parent / "examples"
    model.load_state_dict(torch.load(folder / "model_test.pt", map_location="cpu", weights_only=True))
    return model.eval()


class LogitsOnly(nn.Module):
    """A model of the transformers library as one from images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits


def hub_vit() -> nn.Module:
    """A vision transformer from the Hugging Face Hub, ImageNet at 224 x 224: pip install transformers."""
    from transformers import AutoModelForImageClassification

    return LogitsOnly(AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224"))
