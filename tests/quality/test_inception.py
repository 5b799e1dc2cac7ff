"""FID's features: only from a file that is there and is the right one, and never from anywhere else."""

import hashlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmap_defense.errors import DataError, InputValueError, MissingExtraError
from cmap_defense.quality import features as inception
from cmap_defense.quality.features import FILE, inception_features, inception_file
from toys import uniform

CONTENT = b"weights"


class StandIn(nn.Module):
    """In place of the library's network: means of the three channels."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        assert feature_extractor_weights_path is not None, "the library would fetch its weights"
        assert Path(feature_extractor_weights_path).read_bytes() == CONTENT
        self.weight = nn.Parameter(torch.rand(2))  # from torch's own generator, as a network's first weights are

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        assert images.dtype == torch.uint8
        return (images.double().mean(dim=(2, 3)),)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for torch-fidelity, and where its weights belong."""
    made: Any = types.ModuleType("torch_fidelity")
    made.FeatureExtractorInceptionV3, made.__version__ = StandIn, "0.4.0"
    monkeypatch.setitem(sys.modules, "torch_fidelity", made)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints" / FILE


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"cmap-defense\[quality\].*https://.*checkpoints"):
        inception_file()
    with pytest.raises(MissingExtraError, match="torch-fidelity"):
        inception_features(tmp_path / "any", torch.device("cpu"))


def test_without_the_weights(library: Path) -> None:
    with pytest.raises(DataError, match=f"Put https://.*{FILE} at {library}"):
        inception_file()
    assert not library.exists()


def test_the_place_is_shown_without_the_home_folder(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(library.parents[2]))
    monkeypatch.setenv("USERPROFILE", str(library.parents[2]))
    with pytest.raises(DataError, match=f"at ~/hub/checkpoints/{FILE}"):
        inception_file()


def test_other_weights(library: Path) -> None:
    library.parent.mkdir(parents=True)
    library.write_bytes(b"truncated")
    with pytest.raises(DataError, match="damaged or another file"):
        inception_file()


def test_features(library: Path) -> None:
    library.parent.mkdir(parents=True)
    library.write_bytes(CONTENT)
    assert inception_file() == library
    state = torch.get_rng_state()
    features, source = inception_features(library, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert source == "torch-fidelity 0.4.0"
    images = uniform(2, 3, 8, 6, seed=0)
    found = features(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (images * 255).round().mean(dim=(2, 3)))
    torch.testing.assert_close(features(images[:, :1]), found[:, :1].expand(2, 3))
    with pytest.raises(InputValueError, match="1 or 3 channels, but these have 2"):
        features(images[:, :2])


def test_the_address_and_the_checksum_are_of_one_file() -> None:
    assert inception.ADDRESS.endswith(FILE)
    assert FILE.endswith(f"-{inception.SHA256[:8]}.pth")
