"""The two images of a consistency loss: one with a gradient, one without, one dropout mask for both."""

import torch
from torch import Tensor, nn

from cmap_defense.backbones import CompactUNet, CompactUNetConfig, ConsistencyBackbone
from cmap_defense.training.objectives.base import consistency_pair, noisy_images
from toys import noise

T, R = torch.tensor([2.0, 0.5, 11.0]), torch.tensor([1.5, 0.002, 7.0])


def dropping(noisy: Tensor, sigma: Tensor) -> Tensor:
    """Half of the elements, chosen by torch's global generator."""
    return nn.functional.dropout(torch.ones_like(noisy), 0.5)


def test_noisy_images_are_their_formula() -> None:
    images, z = noise(3, 2, 4, 5, seed=1), noise(3, 2, 4, 5, seed=2)
    found = noisy_images(images, z, T)
    for i, sigma in enumerate(T.tolist()):
        torch.testing.assert_close(found[i], images[i] + sigma * z[i])


def test_each_function_sees_its_own_image_and_level_and_only_the_first_autograd() -> None:
    noisy, less_noisy = noise(3, 1, 4, 5, seed=1), noise(3, 1, 4, 5, seed=2)
    weight = torch.tensor(2.0, requires_grad=True)
    calls: list[tuple[str, bool, Tensor, Tensor]] = []

    def watched(name: str):
        def call(x: Tensor, sigma: Tensor) -> Tensor:
            calls.append((name, torch.is_grad_enabled(), x, sigma))
            return weight * x

        return call

    ahead, behind = consistency_pair(watched("model"), watched("target"), noisy, T, less_noisy, R)
    assert [(name, grad) for name, grad, _, _ in calls] == [("model", True), ("target", False)]
    assert all(seen is given for (_, _, seen, _), given in zip(calls, (noisy, less_noisy), strict=True))
    assert all(seen is given for (_, _, _, seen), given in zip(calls, (T, R), strict=True))
    assert ahead.requires_grad
    assert not behind.requires_grad
    torch.testing.assert_close(behind, 2 * less_noisy)


def test_both_images_see_the_same_dropout_mask_and_the_next_pair_another() -> None:
    x = noise(3, 1, 8, 9, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ahead, behind = consistency_pair(dropping, dropping, x, T, x, R)
        again, _ = consistency_pair(dropping, dropping, x, T, x, R)
    assert torch.equal(ahead, behind)
    assert not torch.equal(ahead, again)


def test_afterwards_the_generator_stands_where_the_first_call_left_it() -> None:
    x = noise(3, 1, 8, 9, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        dropping(x, T)
        expected = torch.random.get_rng_state()
        torch.manual_seed(3)
        consistency_pair(dropping, dropping, x, T, x, R)
        assert torch.equal(torch.random.get_rng_state(), expected)


def test_a_network_with_dropout_agrees_with_itself() -> None:
    """The same image at the same level: in training mode, without shared masks, the two would differ."""
    config = CompactUNetConfig(image_shape=(1, 8, 12), channels=(8,), blocks=1, attention=(False,), dropout=0.5)
    x = noise(3, 1, 8, 12, seed=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone = ConsistencyBackbone(CompactUNet(config), config.image_shape).train()
        with torch.no_grad():
            for parameter in backbone.parameters():  # the last layer starts at zero
                parameter.add_(0.1 * noise(*parameter.shape, seed=4))
        ahead, behind = consistency_pair(backbone.denoise, backbone.denoise, x, T, x, T)
        other = backbone.denoise(x, T)
    assert torch.equal(ahead, behind)
    assert not torch.equal(ahead, other)
