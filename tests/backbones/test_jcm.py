"""The JAX checkpoints as backbones: they compute what the JAX code computes, and other files are refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cmap_defense.backbones.convert import convert_jcm
from cmap_defense.backbones.convert.jcm import jcm_slots
from cmap_defense.backbones.folder import read_backbone, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.errors import BackboneFileError
from goldens import FOLDER, JCM, arrays, channels_first, flax_bytes, full_size_weights, jcm, jcm_names, nested
from toys import noise


@pytest.fixture(scope="module", params=jcm_names())
def recorded(request: pytest.FixtureRequest) -> JCM:
    return jcm(request.param)


@pytest.fixture(scope="module")
def backbone(recorded: JCM) -> ConsistencyBackbone:
    """The converted checkpoint; not to be changed."""
    return convert_jcm(recorded.checkpoint, recorded.config)


@pytest.fixture(scope="module")
def precise(recorded: JCM) -> ConsistencyBackbone:
    """The converted checkpoint in float64; not to be changed."""
    return convert_jcm(recorded.checkpoint, recorded.config).double()


def raw(backbone: ConsistencyBackbone, x: Tensor, sigma: Tensor) -> Tensor:
    """F, the network's own output."""
    return backbone.network(x / (sigma**2 + 0.25).sqrt()[:, None, None, None], sigma.log() / 4)


def gradient(backbone: ConsistencyBackbone, x: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """Of the weighted sum of f, with respect to x."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad((backbone.denoise(x, sigma) * weight).sum(), x)
    return found


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_consistency_function_and_network_agree(recorded: JCM, backbone: ConsistencyBackbone):
    x, sigma = recorded.arrays["x"], recorded.arrays["sigma"]
    close(backbone.denoise(x, sigma), recorded.arrays["f"], 2e-5)
    close(raw(backbone, x, sigma), recorded.arrays["F"], 2e-5)
    close(backbone.network(recorded.arrays["raw_in"], recorded.arrays["raw_cond"]), recorded.arrays["F_raw"], 2e-5)


def test_input_gradients_agree(recorded: JCM, backbone: ConsistencyBackbone):
    found = gradient(backbone, *(recorded.arrays[name] for name in ("x_grad", "sigma_grad", "w_grad")))
    close(found, recorded.arrays["dx"], 1e-6)


def test_gradients_to_unit_latents_agree(recorded: JCM, backbone: ConsistencyBackbone):
    """In the units of 80 u; images that the clip of the generator touches are left out."""
    latents = (recorded.arrays["x_grad"] / 80).requires_grad_()
    unclipped = (backbone.denoise(80 * latents, 80.0).detach().abs() < 1).float()
    weight = unclipped * recorded.arrays["w_grad"]
    (found,) = torch.autograd.grad((backbone.generate(latents) * weight).sum(), latents)
    expected = gradient(backbone, recorded.arrays["x_grad"], recorded.arrays["sigma_grad"], weight)
    close(found / 80, expected, 1e-6)


def test_float64_agrees_to_seven_digits(recorded: JCM, precise: ConsistencyBackbone):
    """Float32 would hide a wrong eps."""
    doubles = {name: value.double() for name, value in recorded.arrays.items()}
    x, sigma = doubles["x"], doubles["sigma"]
    close(precise.denoise(x, sigma), doubles["f_f64"], 1e-7)
    close(raw(precise, x, sigma), doubles["F_f64"], 1e-7)
    close(precise.network(doubles["raw_in"], doubles["raw_cond"]), doubles["F_raw_f64"], 1e-7)
    close(gradient(precise, doubles["x_grad"], doubles["sigma_grad"], doubles["w_grad"]), doubles["dx_f64"], 1e-8)


def test_the_denoiser_of_the_same_network_agrees(
    recorded: JCM, backbone: ConsistencyBackbone, precise: ConsistencyBackbone
):
    x, sigma, expected = (recorded.arrays[name] for name in ("x", "sigma", "D_edm"))
    close(EDMDenoiser(backbone.network, backbone.image_shape).denoise(x, sigma), expected, 2e-5)
    denoiser = EDMDenoiser(precise.network, precise.image_shape)
    close(denoiser.denoise(x.double(), sigma.double()), recorded.arrays["D_edm_f64"], 1e-7)
    shift = denoiser.score(x.double(), sigma.double()) * sigma.double()[:, None, None, None] ** 2
    close(x.double() + shift, recorded.arrays["D_edm_f64"], 1e-7)


def test_backbone_is_ready_for_use(recorded: JCM, backbone: ConsistencyBackbone):
    assert backbone.image_shape == (3, 32, 32)
    assert backbone.num_classes is None
    assert backbone.network.config == recorded.config
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    assert {(t.dtype, t.device.type) for t in backbone.state_dict().values()} == {(torch.float32, "cpu")}
    assert not any(t.is_inference() for t in backbone.state_dict().values())


def test_written_conversion_is_read_to_the_bit(tmp_path: Path, recorded: JCM, backbone: ConsistencyBackbone):
    write_backbone(backbone, tmp_path, name="converted")
    read = read_backbone(tmp_path)
    expected = backbone.state_dict()
    assert read.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in read.state_dict().items())
    assert read.network.config == recorded.config
    x, sigma = recorded.arrays["x"], recorded.arrays["sigma"]
    alike = convert_jcm(recorded.checkpoint, recorded.config).to(memory_format=torch.channels_last)
    assert torch.equal(read.denoise(x, sigma), alike.denoise(x, sigma))


def test_written_in_bfloat16_the_frequencies_stay_exact(tmp_path: Path):
    golden = jcm("tiny_c")
    backbone = convert_jcm(golden.checkpoint, golden.config)
    record = write_backbone(backbone, tmp_path, dtype=torch.bfloat16, name="converted")
    stored = load_file(tmp_path / record.weights_file)
    frequencies = stored.pop("embed.frequencies")
    assert torch.equal(frequencies, backbone.network.embed.frequencies)
    assert frequencies.dtype == torch.float32
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    for dtype in (torch.float32, torch.bfloat16):
        network = read_backbone(tmp_path, dtype=dtype).network
        assert torch.equal(network.embed.frequencies, frequencies)
        assert {p.dtype for p in network.parameters()} == {dtype}


TINY = NCSNppConfig(nf=4, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(4,), image_size=8)


def weights(config: NCSNppConfig = TINY, values: Callable[..., Any] | None = None) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint, in its order of axes; random, or what ``values`` makes of a shape and a precision."""
    with torch.device("meta"):
        network = NCSNpp(config)
    found = {}
    for seed, (name, (tensor, axes)) in enumerate(jcm_slots(network)):
        sizes = dict(zip(axes, tensor.shape, strict=True))
        shape = [sizes[axis] for axis in range(len(axes))]
        found[name] = noise(*shape, seed=seed).numpy() if values is None else values(shape, np.float32)
    return found


def checkpoint(folder: Path, leaves: dict[str, Any]) -> Path:
    path = folder / "checkpoint_80"
    path.write_bytes(flax_bytes({"step": np.asarray(80), "params_ema": nested(leaves)}))
    return path


def test_arrays_arrive_in_their_places(tmp_path: Path):
    """Each kind of layer has its own order of axes."""
    leaves = weights()
    network = convert_jcm(checkpoint(tmp_path, leaves), TINY).network
    expected = {
        "Conv_0/kernel": network.enter.weight.permute(2, 3, 1, 0),
        "Dense_0/kernel": network.embed.first.weight.T,
        "Dense_1/bias": network.embed.second.bias,
        "GaussianFourierProjection_0/W": network.embed.frequencies,
        "ResnetBlockBigGANpp_0/GroupNorm_1/scale": network.down[0].block.norm_out.weight,
        "ResnetBlockBigGANpp_1/Conv_2/kernel": network.down[1].block.skip.weight.permute(2, 3, 1, 0),
        "Downsample_0/Conv2d_0/weight": network.down[1].pyramid.conv.weight.permute(2, 3, 1, 0),
        "Downsample_0/Conv2d_0/bias": network.down[1].pyramid.conv.bias,
        "AttnBlockpp_0/NIN_1/W": network.down[2].attention.key.weight.T,
        "AttnBlockpp_2/NIN_3/b": network.up[1].attention.project.bias,
        "ResnetBlockBigGANpp_9/Dense_0/kernel": network.up[4].block.embed.weight.T,
        "Conv_1/bias": network.leave.bias,
    }
    for name, tensor in expected.items():
        assert np.array_equal(leaves[name], tensor.numpy()), name


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda leaves: {key: value for key, value in leaves.items() if key != name}


def having(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda leaves: leaves | {name: change(leaves.get(name, np.zeros((2, 3), np.float32)))}


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return change


DAMAGE = {
    "one missing": ("Conv_0/kernel", "lacks 1 of", without("Conv_0/kernel")),
    "frequencies missing": ("GaussianFourierProjection_0/W", "lacks 1 of", without("GaussianFourierProjection_0/W")),
    "one too many": ("AttnBlockpp_9/NIN_0/W", "has not", having("AttnBlockpp_9/NIN_0/W", np.copy)),
    "NaN": ("AttnBlockpp_1/NIN_2/b", "NaN or infinite", having("AttnBlockpp_1/NIN_2/b", with_value(np.nan))),
    "infinite": ("Conv_1/kernel", "NaN or infinite", having("Conv_1/kernel", with_value(np.inf))),
    "too large for float32": ("Conv_1/bias", "in float32", having("Conv_1/bias", lambda a: a + np.float64(1e300))),
    "integers": ("Dense_0/bias", "int32", having("Dense_0/bias", lambda a: a.astype("int32"))),
    "booleans": ("Dense_0/bias", "bool", having("Dense_0/bias", lambda a: a > 0)),
    "complex": ("Dense_0/bias", "complex64", having("Dense_0/bias", lambda a: a.astype("complex64"))),
    "a number": ("Dense_0/bias", "does not fit", having("Dense_0/bias", lambda a: 1.5)),
    "an axis less": ("Conv_0/kernel", "does not fit", having("Conv_0/kernel", lambda a: a[0])),
    "an axis more": ("Dense_0/kernel", "does not fit", having("Dense_0/kernel", lambda a: a[None])),
    "the other order of axes": ("Dense_0/kernel", "does not fit", having("Dense_0/kernel", lambda a: a.T.copy())),
    "shorter": ("GroupNorm_0/scale", "does not fit", having("GroupNorm_0/scale", lambda a: a[:-1])),
    "copied per device": ("Conv_0/bias", "does not fit", having("Conv_0/bias", lambda a: np.stack([a] * 8))),
}


@pytest.mark.parametrize(("name", "words", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_weights_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, name: str, words: str, damage: Callable[[dict[str, Any]], dict[str, Any]]
):
    path = checkpoint(tmp_path, damage(weights()))
    with pytest.raises(BackboneFileError, match=words) as caught:
        convert_jcm(path, TINY)
    assert repr(name) in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"nf": 8}, {"num_res_blocks": 2}, {"ch_mult": (1,)}, {"attn_resolutions": ()}, {"num_channels": 1}]
)
def test_another_config_than_the_files_is_refused(tmp_path: Path, changes: dict[str, Any]):
    path = checkpoint(tmp_path, weights())
    with pytest.raises(BackboneFileError) as caught:
        convert_jcm(path, TINY.replace(**changes))
    assert str(path) in str(caught.value)
    assert "config" in str(caught.value)


def test_the_published_size_agrees(tmp_path: Path):
    """Only at this size do 32 groups bound the normalisation."""
    path = checkpoint(tmp_path, dict(full_size_weights()))
    backbone = convert_jcm(path)
    path.unlink()
    recorded = channels_first(arrays(FOLDER / "full_det" / "io.npz"))
    x, sigma = recorded["x"], recorded["sigma"]
    close(backbone.denoise(x, sigma), recorded["f"], 2e-5)
    close(raw(backbone, x, sigma), recorded["F"], 2e-5)
    close(gradient(backbone, x[:1], sigma[:1], recorded["w_grad"]), recorded["dx"], 1e-6)
    close(backbone.double().denoise(x.double(), sigma.double()), recorded["f_f64"], 1e-7)
