"""NCSN++: the official layers' results and names, and precision; ``test_networks.py`` has the laws of all networks."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from cmap_defense.backbones.convert.jcm import jcm_slots
from cmap_defense.backbones.karras import ConsistencyBackbone
from cmap_defense.backbones.ncsnpp import Attention, NCSNpp, NCSNppConfig, NoiseEmbedding
from cmap_defense.errors import SettingsError
from goldens import FOLDER, arrays, channels_first
from tiny import randomised
from toys import noise

SMALL = NCSNppConfig(nf=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8)


def backbone_of(config: NCSNppConfig, dtype: torch.dtype = torch.float64) -> ConsistencyBackbone:
    with torch.random.fork_rng(devices=[]):
        network = randomised(NCSNpp(config).to(dtype), 1)
    return ConsistencyBackbone(network, config.image_shape).eval()


def network_of(config: NCSNppConfig = SMALL, dtype: torch.dtype = torch.float32) -> NCSNpp:
    network = backbone_of(config, dtype).network
    assert isinstance(network, NCSNpp)
    return network


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    """Results of the official layers."""
    return channels_first(arrays(FOLDER / "ops" / "ops.npz"))


@pytest.fixture(scope="module")
def full() -> NCSNpp:
    """The network of the published models, without memory for its weights."""
    with torch.device("meta"):
        return NCSNpp(NCSNppConfig())


def test_fourier_features_agree(recorded: dict[str, Tensor]):
    with torch.random.fork_rng(devices=[]):
        embedding = NoiseEmbedding(24, 16.0)
    embedding.frequencies.copy_(recorded["fourier_W"])
    inputs: list[Tensor] = []
    embedding.first.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    embedding(recorded["cond_t"])
    torch.testing.assert_close(inputs[0], recorded["fourier"], rtol=0, atol=2e-6)


@pytest.mark.parametrize(("given", "expected", "atol"), [("gn_x", "gn", 2e-5), ("gn_small_x", "gn_small", 2e-6)])
def test_normalisation_agrees(recorded: dict[str, Tensor], given: str, expected: str, atol: float):
    """The small input tells one eps from another; on the large one flax's variance E x^2 - (E x)^2 has lost digits."""
    with torch.random.fork_rng(devices=[]):
        norm = Attention(24, rescale=True).norm
    assert norm.num_groups == recorded["gn_groups"].item()
    norm.load_state_dict({"weight": recorded["gn_scale"], "bias": recorded["gn_bias"]})
    torch.testing.assert_close(norm(recorded[given]), recorded[expected], rtol=0, atol=atol)


def attention_of(recorded: dict[str, Tensor], *, rescale: bool) -> Attention:
    """The layer with the recorded weights."""
    with torch.random.fork_rng(devices=[]):
        layer = Attention(12, rescale)
    weights = {"norm.weight": recorded["attn/GroupNorm_0/scale"], "norm.bias": recorded["attn/GroupNorm_0/bias"]}
    for i, name in enumerate(("query", "key", "value", "project")):
        weights[f"{name}.weight"] = recorded[f"attn/NIN_{i}/W"].T
        weights[f"{name}.bias"] = recorded[f"attn/NIN_{i}/b"]
    layer.load_state_dict(weights)
    return layer


def test_attention_agrees(recorded: dict[str, Tensor]):
    layer = attention_of(recorded, rescale=True)
    torch.testing.assert_close(layer(recorded["attn_x"]), recorded["attn"], rtol=0, atol=2e-6)


def test_attention_agrees_with_a_fused_kernel_on_unequal_axes(recorded: dict[str, Tensor]):
    layer = attention_of(recorded, rescale=False).double()
    x = noise(2, 12, 4, 2, seed=1, dtype=torch.float64)
    tokens = layer.norm(x).flatten(2).mT
    heads = [part(tokens)[:, None] for part in (layer.query, layer.key, layer.value)]
    mixed = layer.project(nn.functional.scaled_dot_product_attention(*heads)[:, 0])
    torch.testing.assert_close(layer(x), x + mixed.mT.reshape(2, 12, 4, 2), rtol=0, atol=1e-12)


def test_without_rescaling_branches_are_added_as_they_are():
    """In every layer that adds two."""
    embedding, x, image = (noise(2, *shape, seed=1, dtype=torch.float64) for shape in ((32,), (8, 8, 4), (3, 8, 4)))
    layers = {}
    for rescale in (True, False):
        down = network_of(SMALL.replace(skip_rescale=rescale), torch.float64).down
        layers[rescale] = down[0].block, down[2].attention, down[1]
    for scaled, plain, width in zip(layers[True][:2], layers[False][:2], (8, 16), strict=True):
        inner = (noise(2, width, 8, 4, seed=2, dtype=torch.float64), *([embedding] if width == 8 else []))
        torch.testing.assert_close(plain(*inner), scaled(*inner) * 2**0.5, rtol=0, atol=1e-12)
    for rescale, (*_, shrink) in layers.items():
        added = shrink.pyramid(image) + shrink.block(x, embedding)
        expected = added / 2**0.5 if rescale else added
        torch.testing.assert_close(shrink(x, image, embedding), expected, rtol=0, atol=1e-12)


def test_names_and_shapes_are_those_of_the_published_checkpoint(full: NCSNpp):
    recorded = json.loads((FOLDER / "full_det" / "full_tree.json").read_text())
    found = {}
    for name, (tensor, axes) in jcm_slots(full):
        assert name not in found
        sizes = dict(zip(axes, tensor.shape, strict=True))
        found[name] = [sizes[axis] for axis in range(len(axes))]
    assert len(found) == recorded["n_tensors"] == 445
    assert found == recorded["tree"]


def test_network_has_the_published_number_of_weights(full: NCSNpp):
    """The fixed frequencies are counted among them."""
    assert sum(tensor.numel() for tensor in full.state_dict().values()) == 56_395_651


@pytest.mark.parametrize("config", [SMALL, SMALL.replace(ch_mult=(1,), attn_resolutions=(8,)), NCSNppConfig()])
def test_every_tensor_has_one_place_in_a_checkpoint(config: NCSNppConfig):
    with torch.device("meta"):
        network = NCSNpp(config)
    placed = [id(tensor) for _, (tensor, _) in jcm_slots(network)]
    own = [id(t) for t in (*network.parameters(), network.embed.frequencies)]
    assert sorted(placed) == sorted(own)


NARROWER = {
    "half": lambda network: network.half(),
    "bfloat16": lambda network: network.bfloat16(),
    "to dtype": lambda network: network.to(torch.bfloat16),
    "to device and dtype": lambda network: network.to(device="cpu", dtype=torch.float16),
    "as another": lambda network: network.to(torch.zeros((), dtype=torch.bfloat16)),
    "over float64": lambda network: network.double().bfloat16(),
    "there and back": lambda network: network.half().float(),
}


@pytest.mark.parametrize("cast", NARROWER.values(), ids=NARROWER.keys())
def test_frequencies_stay_in_float32(cast):
    network = network_of()
    before = network.embed.frequencies.clone()
    cast(network)
    assert network.embed.frequencies.dtype == torch.float32
    assert torch.equal(network.embed.frequencies, before)
    assert torch.equal(network.state_dict()["embed.frequencies"], before)
    assert len({p.dtype for p in network.parameters()}) == 1


def test_frequencies_move_to_another_device():
    network = network_of().to("meta", torch.bfloat16)
    assert network.embed.frequencies.device.type == "meta"
    assert network.embed.frequencies.dtype == torch.float32


def test_bfloat16_is_near_float32_where_the_noise_is_largest():
    """Rounded frequencies would turn angles of a hundred radians by tenths, and give other images."""
    config = SMALL.replace(nf=16)
    exact = backbone_of(config, torch.float32)
    latents = noise(4, *config.image_shape, seed=7)
    expected = exact.denoise(80 * latents, 80.0)
    rounded = copy.deepcopy(exact)
    rounded.network.embed.frequencies.copy_(rounded.network.embed.frequencies.bfloat16())
    narrow = copy.deepcopy(exact).to(torch.bfloat16)
    error = (narrow.denoise(80 * latents, 80.0) - expected).abs().max().item()
    error_of_rounded = (rounded.denoise(80 * latents, 80.0) - expected).abs().max().item()
    assert error < 0.05
    assert error < error_of_rounded / 3


@pytest.mark.parametrize(("nf", "channels"), [(132, 132), (100, 200)])
def test_channels_that_do_not_divide_into_groups_are_refused(nf: int, channels: int):
    """There are 32 groups from 128 channels on; two hundred are those of a block with its skip."""
    with pytest.raises(SettingsError, match=f"^NCSNppConfig: {channels} channels .* 32 groups"):
        NCSNppConfig(nf=nf, ch_mult=(1,))
