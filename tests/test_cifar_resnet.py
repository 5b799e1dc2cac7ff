"""The CIFAR ResNets have the sizes of He et al. 2016, Tab. 6, and normalise images where asked."""

import pytest
import torch

from cmap_defense.cifar_resnet import MEAN, STD, CifarResNet
from cmap_defense.errors import SettingsError


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])
def test_it_has_as_many_parameters_as_in_the_paper(depth: int, millions: float) -> None:
    count = sum(parameter.numel() for parameter in CifarResNet(depth).parameters())
    assert round(count / 1e6, 2) == millions


def test_the_one_for_images_in_the_unit_range_normalises_them() -> None:
    plain, unit = CifarResNet(20).eval(), CifarResNet(20, unit=True).eval()
    unit.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 32, 32)
    normalised = (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(unit(images), plain(normalised))


@pytest.mark.parametrize("depth", [2, 21, 56.5])
def test_other_depths_are_refused(depth: int) -> None:
    with pytest.raises(SettingsError, match="depth must be 6 n"):
        CifarResNet(depth)
