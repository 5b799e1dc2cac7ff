"""Pipelines of the diffusers library: what they compute, what is written and read, and every kind of damage."""

import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmap_defense.backbones.convert import convert_openai
from cmap_defense.backbones.diffusers import DiffusersUNet, UnscaledUNet, build_unet, configuration_of
from cmap_defense.backbones.folder import RECORD_FILE, read_backbone, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, NoiseRange
from cmap_defense.backbones.weights import sha256_of_weights
from cmap_defense.errors import BackboneFileError, CmapError, InputValueError, MissingExtraError, WrongKindError
from goldens import FOLDER, arrays
from tiny import randomised, unet_config
from toys import noise

INDEX, SCHEDULER, UNET = "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"
SAFETENSORS, PICKLE = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"

OFFICIAL_WEIGHTS = "1e3309ed747e8e18be0eedd55882f0668c400561540beb7325e33bd657c095a2"
"""Of the pipeline that diffusers' own conversion made of tests/golden/openai_tiny: :func:`checksum` of its weights."""


def checksum(weights: dict[str, Tensor]) -> str:
    """SHA-256 over name, shape and raw float32 numbers of every tensor, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


SMALL = unet_config(8, [False, True], [8, 8], num_class_embeds=5, downsample_type="conv", upsample_type="conv")


def small_backbone(kind: type[Any] = DiffusersUNet, config: dict[str, Any] = SMALL) -> ConsistencyBackbone:
    with torch.random.fork_rng(devices=[]):
        network = randomised(kind(build_unet(config).unet), 1)
    noise_range = NoiseRange() if kind is UnscaledUNet else NoiseRange(sigma_min=0.01, sigma_max=40.0, sigma_data=0.25)
    return ConsistencyBackbone(network, (3, 8, 8), noise_range, config["num_class_embeds"]).eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded pipeline: its own configurations beside weights of our conversion. Not to be changed."""
    folder = tmp_path_factory.mktemp("diffusers") / "tiny"
    weights = FOLDER / "openai_tiny" / "tiny_cd_imagenet64_style.pt"
    with torch.random.fork_rng(devices=[]):
        write_backbone(convert_openai(weights, image_size=32, head_channels=16), folder, name="tiny")
    (folder / RECORD_FILE).unlink()
    for file in (INDEX, SCHEDULER, UNET):
        shutil.copyfile(FOLDER / "diffusers_tiny" / file, folder / file)
    return folder


@pytest.fixture(scope="module")
def backbone(converted: Path) -> ConsistencyBackbone:
    return read_backbone(converted)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return arrays(FOLDER / "diffusers_tiny" / "io.npz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole pipeline that nothing of ours describes."""
    write_backbone(small_backbone(), tmp_path / "pipeline", name="toy")
    (tmp_path / "pipeline" / RECORD_FILE).unlink()
    return tmp_path / "pipeline"


def as_read(backbone: ConsistencyBackbone) -> ConsistencyBackbone:
    """In the state of one that is read, on which the choice of kernels depends."""
    return backbone.to(memory_format=torch.channels_last).requires_grad_(False)


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_converted_weights_are_those_of_the_librarys_own_conversion(converted: Path):
    assert checksum(load_file(converted / SAFETENSORS)) == OFFICIAL_WEIGHTS


def test_written_configurations_are_the_librarys_own(tmp_path: Path, backbone: ConsistencyBackbone):
    """Whatever the library's version: what both name is the same, and both name what matters."""
    write_backbone(backbone, tmp_path, name="tiny")
    for file in (INDEX, SCHEDULER, UNET):
        ours, theirs = (json.loads((place / file).read_text()) for place in (tmp_path, FOLDER / "diffusers_tiny"))
        both = (ours.keys() & theirs.keys()) - {"_diffusers_version"}
        assert {name: ours[name] for name in both} == {name: theirs[name] for name in both}
        needed = {"_class_name", *(SMALL if file == UNET else ())}
        assert needed | ({"sigma_min", "sigma_max", "sigma_data"} if file == SCHEDULER else set()) <= both


def test_consistency_function_and_network_agree(recorded: dict[str, Tensor], backbone: ConsistencyBackbone):
    noisy, labels = 80 * recorded["latents"], recorded["class_labels"]
    close(backbone.denoise(noisy, 80.0, labels), recorded["f_unclipped"], 2e-5)
    level = recorded["sigma"].log().expand(4) / 4
    close(backbone.network(noisy / (80**2 + 0.25) ** 0.5, level, labels), recorded["F"], 2e-5)


def test_gradients_to_unit_latents_agree(recorded: dict[str, Tensor], backbone: ConsistencyBackbone):
    """They are up to 1.5; in units of the noisy image, 80 u, they are smaller by 80."""
    latents = recorded["latents"][:2].requires_grad_()
    f = backbone.denoise(80 * latents, 80.0, recorded["class_labels"][:2])
    (found,) = torch.autograd.grad((f * recorded["w_grad"]).sum(), latents)
    close(found, recorded["dlatents"], 1e-5)


def test_images_are_those_of_the_librarys_pipeline(
    recorded: dict[str, Tensor], backbone: ConsistencyBackbone, converted: Path
):
    latents, labels = recorded["latents"], recorded["class_labels"]
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(str(converted), low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(batch_size=4, class_labels=labels, num_inference_steps=1, latents=latents, output_type="pt").images
    ours = (backbone.generate(latents, labels) + 1) / 2
    close(ours, torch.as_tensor(made), 2e-6)
    close(ours, recorded["images_pt"], 2e-5)


@pytest.mark.parametrize("kind", [DiffusersUNet, UnscaledUNet])
def test_forward_passes_log_nothing(kind: type[Any]):
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    library = logging.getLogger("diffusers")
    assert library.getEffectiveLevel() <= logging.WARNING
    backbone = small_backbone(kind)
    library.addHandler(handler)
    try:
        backbone.generate(noise(2, 3, 8, 8, seed=1), torch.tensor([0, 3]))
    finally:
        library.removeHandler(handler)
    assert [record.getMessage() for record in logged] == []


def test_labels_matter_and_are_required(recorded: dict[str, Tensor], backbone: ConsistencyBackbone):
    latents, labels = recorded["latents"], recorded["class_labels"]
    assert (backbone.generate(latents, labels) - backbone.generate(latents, labels.flip(0))).abs().max().item() > 0.01
    with pytest.raises(InputValueError, match="class-conditional"):
        backbone.generate(latents)
    with pytest.raises(InputValueError, match=r"0 \.\. 999"):
        backbone.generate(latents, labels + 1)


def test_bare_pipeline_is_described_from_its_configurations(converted: Path, backbone: ConsistencyBackbone):
    record = read_record(converted)
    assert record == backbone.record
    assert (record.name, record.kind, record.network) == ("tiny", "consistency", "diffusers-unet2d")
    assert record.image_shape == backbone.image_shape == (3, 32, 32)
    assert record.num_classes == backbone.num_classes == 1000
    assert record.noise == backbone.noise.to_dict() == {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
    assert record.network_config == json.loads((FOLDER / "diffusers_tiny" / UNET).read_text())
    assert (record.weights_file, record.weights_sha256) == (SAFETENSORS, "")


def test_description_follows_the_configurations(folder: Path):
    edit(folder / SCHEDULER, sigma_max=7.0, sigma_data=None)
    edit(folder / UNET, sample_size=[8, 16], in_channels=2, num_class_embeds=None)
    record = read_record(folder)
    assert record.noise == {"sigma_min": 0.01, "sigma_max": 7.0}
    assert record.image_shape == (2, 8, 16)
    assert record.num_classes is None


def test_bfloat16_is_near_float32(recorded: dict[str, Tensor], backbone: ConsistencyBackbone, converted: Path):
    narrow = read_backbone(converted, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    images = narrow.generate(recorded["latents"], recorded["class_labels"])
    assert images.dtype == torch.float32
    close(images, backbone.generate(recorded["latents"], recorded["class_labels"]), 0.05)


def resaved(folder: Path, **options: Any) -> None:
    """The network's weights as the library itself saves them with these options, and no others."""
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False)
    for file in (folder / "unet").glob("diffusion_pytorch_model*"):
        file.unlink()
    if options.get("variant") == "fp16":
        unet = unet.half()
    unet.save_pretrained(folder / "unet", **options)


@pytest.mark.parametrize("pickles", [False, True])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", [None, "10KB"])
def test_shards_and_variants_are_read(folder: Path, variant: str | None, shard: str | None, pickles: bool):
    expected = read_backbone(folder).state_dict()
    sizes = {} if shard is None else {"max_shard_size": shard}
    resaved(folder, variant=variant, safe_serialization=not pickles, **sizes)
    files = [file.name for file in (folder / "unet").glob("diffusion_pytorch_model*")]
    assert (len(files) > 2) == (shard is not None), files
    found = read_backbone(folder)
    assert found.record.weights_dtype == ("float32" if variant is None else "float16")
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=0 if variant is None else 1e-3, atol=1e-6)


def test_attentions_of_older_versions_of_the_library_are_read(folder: Path):
    expected, former = read_backbone(folder).state_dict(), {}
    for name, tensor in load_file(folder / SAFETENSORS).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        former[name] = tensor
    assert sum("proj_attn" in name for name in former) >= 2
    save_file(former, folder / SAFETENSORS)
    found = read_backbone(folder).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_checksum_of_shards_depends_on_each(folder: Path):
    single = sha256_of_weights(folder / SAFETENSORS)
    assert single == hashlib.sha256((folder / SAFETENSORS).read_bytes()).hexdigest()
    resaved(folder, max_shard_size="10KB")
    index = folder / read_record(folder).weights_file
    before = sha256_of_weights(index)
    shard = sorted((folder / "unet").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert before != sha256_of_weights(index) != single


SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("words", "content"),
    [
        ("not an index of shards", "<html>"),
        ("not an index of shards", "[]"),
        ("not an index of shards", '{"weight_map": [1]}'),
        ("names 'none'", '{"weight_map": {}}'),
        ("names '../other.safetensors'", '{"weight_map": {"a": "../other.safetensors"}}'),
        ("names '/other.safetensors'", '{"weight_map": {"a": "/other.safetensors"}}'),
        ("names '*.safetensors'", '{"weight_map": {"a": "*.safetensors"}}'),
        ("names 'other.py'", '{"weight_map": {"a": "other.py"}}'),
        ("other.safetensors is missing", '{"weight_map": {"a": "other.safetensors"}}'),
    ],
)
def test_damaged_indices_of_shards_are_refused(folder: Path, words: str, content: str):
    (folder / SAFETENSORS).rename(folder / "unet" / "unused.safetensors")
    (folder / SHARDS).write_text(content)
    check_refused(folder, words)


def test_weights_of_unknown_names_are_listed_with_what_to_do(folder: Path):
    (folder / SAFETENSORS).rename(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    check_refused(folder, "holds diffusion_pytorch_model.non_ema.safetensors")
    check_refused(folder, "save_pretrained(folder")


@pytest.mark.parametrize("kind", [DiffusersUNet, UnscaledUNet])
def test_written_backbone_is_read_to_the_bit(tmp_path: Path, kind: type[Any]):
    ours = as_read(small_backbone(kind))
    record = write_backbone(ours, tmp_path, name="toy", settings={"n_latents": 3})
    files = {INDEX, UNET, SAFETENSORS, RECORD_FILE} | ({SCHEDULER} if kind is DiffusersUNet else set())
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} == files
    assert record == read_record(tmp_path)
    assert record.weights_sha256 == hashlib.sha256((tmp_path / SAFETENSORS).read_bytes()).hexdigest()
    latents, labels = noise(3, 3, 8, 8, seed=1), torch.tensor([0, 4, 2])
    for described in (True, False):
        theirs = read_backbone(tmp_path)
        assert type(theirs.network) is kind
        assert theirs.record.weights_sha256 == (record.weights_sha256 if described else "")
        assert theirs.default_settings == ({"n_latents": 3} if described else {})
        assert (theirs.noise, theirs.num_classes, theirs.image_shape) == (ours.noise, 5, (3, 8, 8))
        assert configuration_of(theirs.network)["block_out_channels"] == SMALL["block_out_channels"]
        assert all(torch.equal(t, ours.state_dict()[name]) for name, t in theirs.state_dict().items())
        assert torch.equal(theirs.generate(latents, labels), ours.generate(latents, labels))
        (tmp_path / RECORD_FILE).unlink(missing_ok=True)


def test_denoiser_is_written_and_read(tmp_path: Path):
    made = small_backbone()
    ours = EDMDenoiser(made.network, made.image_shape, made.noise, made.num_classes)
    write_backbone(ours, tmp_path, name="teacher")
    x, sigma, labels = noise(2, 3, 8, 8, seed=1), torch.tensor([0.3, 5.0]), torch.tensor([1, 2])
    close(read_backbone(tmp_path).denoise(x, sigma, labels), ours.denoise(x, sigma, labels), 1e-5)
    with pytest.raises(WrongKindError, match="is a denoiser"):
        read_backbone(tmp_path, kind="consistency")


@pytest.fixture
def unscaled(tmp_path: Path) -> Path:
    """A pipeline in the community's layout, which has no scheduler."""
    write_backbone(small_backbone(UnscaledUNet), tmp_path / "pipeline", name="toy")
    (tmp_path / "pipeline" / RECORD_FILE).unlink()
    return tmp_path / "pipeline"


def test_pipeline_without_scheduler_is_described(unscaled: Path):
    record = read_record(unscaled)
    assert (record.network, record.noise, record.num_classes) == ("diffusers-unet2d-unscaled", {}, 5)
    assert not (unscaled / "scheduler").exists()


def test_unscaled_network_gets_the_noisy_image_and_sigma(unscaled: Path):
    backbone = read_backbone(unscaled).double()
    unet: Any = backbone.network.unet
    x, sigma = noise(4, 3, 8, 8, seed=1, dtype=torch.float64), torch.tensor([0.002, 0.3, 7.0, 80.0]).double()
    labels = torch.tensor([4, 0, 1, 1])
    raw = unet(x, sigma, class_labels=labels).sample
    s = sigma[:, None, None, None]
    expected = 0.25 / ((s - 0.002) ** 2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * raw
    close(backbone.denoise(x, sigma, labels), expected, 1e-6)
    noisy = 80 * x
    raw = unet(noisy, 80.0, class_labels=labels).sample
    expected = 0.25 / (79.998**2 + 0.25) * noisy + 40 / (6400.25**0.5) * raw
    close(backbone.generate(x, labels), expected.clamp(-1, 1), 1e-5)


def test_unscaled_network_keeps_its_promise_at_sigma_min(unscaled: Path):
    backbone = read_backbone(unscaled)
    x, labels = noise(4, 3, 8, 8, seed=2), torch.tensor([4, 0, 1, 1])
    error = (backbone.denoise(x, backbone.noise.sigma_min, labels) - x).abs().max().item()
    assert 0 < error < backbone.network.boundary_error


def missing(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def holding(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text)


def editing(file: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / file, **changes)


PAGE = "<!doctype html><html><body>Not found</body></html>" * 10
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n"

DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no network configuration": (UNET, missing(UNET)),
    "network configuration is a page": (UNET, holding(UNET, PAGE)),
    "network configuration is a list": (UNET, holding(UNET, "[1, 2]")),
    "scheduler of another kind": ("EulerDiscreteScheduler", editing(SCHEDULER, _class_name="EulerDiscreteScheduler")),
    "network of another kind": ("UNet2DConditionModel", editing(UNET, _class_name="UNet2DConditionModel")),
    "no size": ("image_shape", editing(UNET, sample_size=None)),
    "classes of text": ("num_classes", editing(UNET, num_class_embeds="5")),
    "noise of text": (f"{SCHEDULER}: NoiseRange.sigma_max", editing(SCHEDULER, sigma_max="80")),
}


def cut(file: str, count: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:count])

    return damage


def with_tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / SAFETENSORS)), folder / SAFETENSORS)


def pickled(content: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / SAFETENSORS).unlink()
        torch.save(content, folder / PICKLE)

    return damage


def cut_pickle(folder: Path) -> None:
    pickled(load_file(folder / SAFETENSORS))(folder)
    cut(PICKLE, -1000)(folder)


DAMAGE |= {
    "missing": ("missing", missing(SAFETENSORS)),
    "cut": ("not a whole safetensors file", cut(SAFETENSORS, -10)),
    "a pointer": ("Git LFS pointer", holding(SAFETENSORS, POINTER)),
    "a tensor less": ("conv_out.bias", with_tensors(lambda t: {k: v for k, v in t.items() if k != "conv_out.bias"})),
    "another shape": ("conv_out.bias", with_tensors(lambda t: t | {"conv_out.bias": torch.zeros(4)})),
    "another network's": ("does not hold the weights", editing(UNET, block_out_channels=[8, 16])),
    "a configuration that is none": ("cannot be built", editing(UNET, block_out_channels=[8, 8, 8])),
    "a pickle that is cut": ("not a whole PyTorch file", cut_pickle),
}


def check_refused(folder: Path, words: str) -> None:
    with pytest.raises(BackboneFileError) as caught:
        read_backbone(folder)
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, CmapError)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("words", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_pipelines_are_refused(folder: Path, words: str, damage: Callable[[Path], None]):
    damage(folder)
    check_refused(folder, words)


def test_weights_of_another_name_are_refused(tmp_path: Path):
    """The library would read the usual ones, whatever was checked."""
    write_backbone(small_backbone(), tmp_path, name="toy")
    other = tmp_path / "unet" / "other.safetensors"
    shutil.copyfile(tmp_path / SAFETENSORS, other)
    edit(tmp_path / RECORD_FILE, weights_file="unet/other.safetensors")
    check_refused(tmp_path, "other.safetensors")


def test_configuration_of_another_network_than_the_records_is_refused(tmp_path: Path):
    write_backbone(small_backbone(), tmp_path, name="toy")
    edit(tmp_path / UNET, norm_eps=0.1)
    check_refused(tmp_path, "norm_eps")


@pytest.mark.parametrize("changes", [{"image_shape": [3, 16, 16]}, {"num_classes": 1000}, {"num_classes": None}])
def test_record_that_contradicts_the_configuration_is_refused(tmp_path: Path, changes: dict[str, Any]):
    write_backbone(small_backbone(), tmp_path, name="toy")
    edit(tmp_path / RECORD_FILE, **changes)
    (name,) = changes
    check_refused(tmp_path, name)


def test_foreign_weights_beside_our_record_are_refused(tmp_path: Path):
    record = write_backbone(small_backbone(), tmp_path, name="toy")
    with_tensors(lambda t: t | {"conv_out.bias": t["conv_out.bias"] + 1})(tmp_path)
    check_refused(tmp_path, record.weights_sha256)


class Hostile:
    """Pickles to a call that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def test_hostile_pickle_is_refused_and_not_executed(folder: Path):
    mark = folder.parent / "was here"
    pickled({"conv_out.bias": Hostile(mark)})(folder)
    check_refused(folder, "requires code to be run")
    assert not mark.exists()


def test_without_the_library_the_error_names_the_extra(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    made = small_backbone()
    monkeypatch.setitem(sys.modules, "diffusers", None)
    tiny = FOLDER / "openai_tiny" / "tiny_cd_imagenet64_style.pt"
    attempts: list[Callable[[], object]] = [
        lambda: read_backbone(folder),
        lambda: build_unet(SMALL),
        lambda: convert_openai(tiny, image_size=32, head_channels=16),
        lambda: write_backbone(made, tmp_path / "written", name="toy"),
    ]
    for attempt in attempts:
        with pytest.raises(MissingExtraError, match=r"pip install 'cmap-defense\[diffusers\]'") as caught:
            attempt()
        assert isinstance(caught.value, ImportError)
    assert read_record(folder).network == "diffusers-unet2d"


class Softmaxes(TorchDispatchMode):
    """Notes the precision of every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.precisions: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if "softmax" in str(function):
            self.precisions.append(result.dtype)
        return result


def test_attention_in_float64_is_in_float64_throughout():
    """The library's own runs its softmax in float32."""
    backbone = small_backbone().double()
    with Softmaxes() as softmaxes:
        backbone.denoise(noise(2, 3, 8, 8, seed=1, dtype=torch.float64), 3.0, torch.tensor([1, 2]))
    assert set(softmaxes.precisions) == {torch.float64}
