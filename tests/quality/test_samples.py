"""Samples: functions of (seed, number) alone, classes in turn."""

import torch
from torch import Tensor

from attack_toys import SHAPE, Denoiser, wrapped
from cmap_defense.quality import sample_images


class Conditional(Denoiser):
    """Its images show their class."""

    num_classes = 3

    def generate(self, latents: Tensor, labels: Tensor) -> Tensor:
        return (labels.to(latents) / 2 - 0.5)[:, None, None, None].expand_as(latents)


def test_each_sample_belongs_to_its_number_and_the_seed() -> None:
    model = wrapped()
    together = sample_images(model, torch.arange(5), seed=3)
    assert together.shape == (5, *SHAPE)
    assert together.min() >= 0
    assert together.max() <= 1
    assert not together.requires_grad
    torch.testing.assert_close(sample_images(model, torch.tensor([4, 1]), seed=3), together[[4, 1]])
    assert (together[0] - together[1]).abs().max() > 0.01
    assert (sample_images(model, torch.arange(5), seed=4) - together).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_classes_in_turn() -> None:
    found = sample_images(wrapped(backbone=Conditional()), torch.arange(2, 9))
    assert (found[:, 0, 0, 0] * 4 - 1).round().tolist() == [2, 0, 1, 2, 0, 1, 2]


def test_the_size_of_the_data_where_the_model_resizes() -> None:
    found = sample_images(wrapped(resize="bilinear"), torch.arange(2), size=(10, 12))
    assert found.shape == (2, 3, 10, 12)
