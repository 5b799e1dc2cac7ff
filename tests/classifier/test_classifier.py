"""PurifiedClassifier: the drop-in contract."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier, load_backbone
from cmap_defense.attacks import PGD, ThreatModel
from cmap_defense.cmap.voting import log_mean_probability, majority_label
from cmap_defense.errors import BackboneWarning, ClassifierError, CmapError
from cmap_defense.gradients import StraightThrough
from cmap_defense.purifiers import CMAP, OneStep
from toys import ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
CLASSES = 5
QUICK = CMAPSettings(n_latents=3, iterations=4, learning_rate=0.1)


class ToyClassifier(nn.Module):
    """A linear classifier that counts its calls; ``scale`` makes it confident."""

    def __init__(self, scale: float = 1.0, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        channels, height, width = shape
        self.linear = nn.Linear(channels * height * width, CLASSES)
        with torch.no_grad():
            self.linear.weight.copy_(scale * noise(*self.linear.weight.shape, seed=5))
            self.linear.bias.zero_()
        self.calls = 0
        self.images = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.images += len(images)
        return self.linear(images.flatten(1))


def make(**options: object) -> PurifiedClassifier:
    """A small defended classifier; options as for PurifiedClassifier."""
    options.setdefault("settings", QUICK)
    classifier = options.pop("classifier", None) or ToyClassifier()
    backbone = options.pop("backbone", None) or ToyBackbone(SHAPE)
    return PurifiedClassifier(classifier, backbone, **options)


def images(count: int = 4, seed: int = 1, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return uniform(count, *shape, seed=seed)


class TestAnswer:
    def test_logits_have_the_vote_on_top_and_the_result_says_how(self) -> None:
        model, x = make(), images()
        result = model.purify(x, seeds=[1, 2, 3, 4])
        logits = model(x, seeds=[1, 2, 3, 4])
        assert logits.shape == (4, CLASSES)
        assert result.images.shape == result.latents.shape == (4, 3, *SHAPE)
        assert result.logits.shape == (4, 3, CLASSES)
        assert result.votes.sum(dim=1).tolist() == [3] * 4
        assert torch.equal(logits.argmax(1), result.labels)
        assert torch.equal(result.labels, majority_label(result.logits))
        assert result.images.min() >= 0
        assert result.images.max() <= 1
        assert result.history.total.shape == (QUICK.iterations, 4)
        assert result.seeds.tolist() == [1, 2, 3, 4]
        assert ((result.margin >= 0) & (result.margin <= 1)).all()

    def test_soft_vote_is_the_log_mean_probability(self) -> None:
        model, x = make(vote="soft"), images()
        expected = log_mean_probability(model.purify(x, seeds=[1] * 4).logits)
        assert torch.equal(model(x, seeds=[1] * 4), expected)

    def test_the_labels_of_a_soft_vote_are_those_of_its_logits(self) -> None:
        """Two of three versions are just above one half for class 0, the third is sure of class 1."""

        class Unsure(nn.Module):
            def forward(self, shown: Tensor) -> Tensor:
                sure = torch.arange(len(shown)) % 3 == 2
                return torch.where(sure[:, None], torch.tensor([-9.0, 9.0]), torch.tensor([0.1, 0.0]))

        found = {vote: make(classifier=Unsure(), vote=vote) for vote in ("label", "soft")}
        for vote, label in (("label", 0), ("soft", 1)):
            model, x = found[vote], images()
            for labels in (model(x).argmax(1), model.purify(x).labels, model.predict(x).labels):
                assert labels.tolist() == [label] * 4

    def test_the_classifier_runs_once_on_all_purified_images(self) -> None:
        classifier = ToyClassifier()
        make(classifier=classifier)(images())
        assert (classifier.calls, classifier.images) == (1, 4 * QUICK.n_latents)

    def test_given_latents_are_the_start(self) -> None:
        model, x, start = make(), images(2), noise(2, 5, *SHAPE, seed=3)
        seen = []
        with model.register_step_hook(lambda state: seen.append(state.latents)):
            result = model.purify(x, latents=start)
        assert torch.equal(seen[0], start)
        assert result.latents.shape == (2, 5, *SHAPE)
        assert result.seeds is None

    def test_a_plain_function_serves_as_classifier(self) -> None:
        assert make(classifier=lambda x: x.flatten(1)[:, :CLASSES])(images()).shape == (4, CLASSES)

    def test_the_repr_is_a_few_lines_and_the_networks_are_attributes(self) -> None:
        model = make(seed=3)
        lines = repr(model).splitlines()
        assert lines[:3] == [
            "PurifiedClassifier(",
            "  classifier: ToyClassifier, 725 parameters",
            "  backbone: ToyBackbone, 440 parameters",
        ]
        assert lines[3:5] == [f"  purifier: {model.purifier!r}", "  K = 3, network passes per image: 15"]
        assert len(lines) == 7
        assert "ToyClassifier" in repr(nn.Sequential(model)), "also inside another module"
        assert "linear" in repr(model.classifier)
        assert "  classifier: relu\n" in repr(make(classifier=torch.relu))

    def test_an_empty_batch_has_a_gradient(self) -> None:
        x = images()[:0].requires_grad_()
        make()(x).sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape

    def test_an_empty_batch_gives_an_empty_result_and_leaves_the_classifier_alone(self) -> None:
        classifier = nn.Sequential(
            nn.Flatten(), nn.BatchNorm1d(144), nn.BatchNorm1d(144), nn.Linear(144, CLASSES)
        ).train()
        classifier[2].eval()
        before = copy.deepcopy(classifier.state_dict())
        model = make(classifier=classifier)
        result = model.purify(images()[:0])
        assert model(images()[:0]).shape == (0, CLASSES)
        assert result.images.shape == (0, 3, *SHAPE)
        assert result.labels.shape == (0,)
        assert [module.training for module in classifier.modules()] == [True, True, True, False, True]
        assert model.purify(images()[:0], latents=torch.zeros(0, 7, *SHAPE)).images.shape == (0, 7, *SHAPE)
        assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


class TestNoise:
    @settings(max_examples=20)
    @given(order=st.permutations(range(4)), kept=st.integers(1, 4), chunk=st.integers(1, 13))
    def test_noise_and_answer_belong_to_image_and_seed(self, order: list[int], kept: int, chunk: int) -> None:
        x, seeds = images(), torch.tensor([11, 22, 33, 44])
        one_step = QUICK.replace(iterations=1)
        whole = make(settings=one_step).purify(x, seeds=seeds)
        part = order[:kept]
        again = make(settings=one_step, max_parallel=chunk).purify(x[part], seeds=seeds[part])
        assert torch.allclose(again.latents, whole.latents[part], rtol=0, atol=1e-5)
        assert torch.equal(again.labels, whole.labels[part])
        full = make().purify(x, seeds=seeds)
        assert torch.equal(make(max_parallel=chunk).purify(x[part], seeds=seeds[part]).labels, full.labels[part])

    def test_one_seed_for_all_images(self) -> None:
        x = images(1).expand(3, *SHAPE)
        assert torch.equal(make(seed=5).purify(x).latents[0], make(seed=5).purify(x).latents[2])
        assert torch.equal(make(seed=5)(x), make(seed=5)(x, seeds=[5, 5, 5]))

    def test_without_a_seed_each_call_and_image_has_fresh_noise_that_manual_seed_rules(self) -> None:
        model, x = make(), images(1).expand(2, *SHAPE)
        torch.manual_seed(3)
        first, second = model.purify(x), model.purify(x)
        torch.manual_seed(3)
        again = model.purify(x)
        assert torch.equal(first.latents, again.latents)
        assert not torch.equal(first.latents, second.latents)
        assert not torch.equal(first.latents[0], first.latents[1])

    def test_seeded_calls_leave_the_global_generator_alone(self) -> None:
        one, many = make(seed=1), make()
        before = torch.get_rng_state()
        one(images())
        many(images(), seeds=[1, 2, 3, 4])
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
    def test_every_64_bit_seed_is_legal(self, seed: int) -> None:
        assert make(seed=seed).purify(images(2)).seeds.tolist() == [seed] * 2


class TestInputs:
    def test_normalize_is_applied_after_purification(self) -> None:
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        seen = []

        def classifier(x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)[:, :CLASSES]

        result = make(classifier=classifier, normalize=(mean, std)).purify(images(), seeds=[1] * 4)
        back = seen[-1] * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
        assert torch.allclose(back, result.images.flatten(0, 1), atol=1e-6)

    def test_normalized_inputs_give_the_answer_of_the_unit_inputs(self) -> None:
        mean, std, x = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), images()
        normalized = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        plain = make(normalize=(mean, std))(x, seeds=[1] * 4)
        other = make(normalize=(mean, std), inputs="normalized")(normalized, seeds=[1] * 4)
        assert torch.allclose(plain, other, atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_normalized_inputs_in_half_precision_pass_although_they_are_rounded(self, dtype: torch.dtype) -> None:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        x = images().round(decimals=1).clamp(0, 1)
        assert x.min() == 0
        assert x.max() == 1
        normalized = ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).to(dtype)
        assert make(normalize=(mean, std), inputs="normalized")(normalized).shape == (4, CLASSES)
        with pytest.raises(CmapError, match="mean and std"):
            make(normalize=(mean, std), inputs="normalized")(normalized * 3)

    def test_numpy_values_are_numbers_too(self) -> None:
        x = images()
        by_numpy = make(normalize=(np.full(3, 0.5), np.full(3, 0.25)), seed=np.int64(3))
        assert torch.equal(by_numpy(x), make(normalize=(0.5, 0.25), seed=3)(x))
        assert torch.equal(by_numpy(x), make(normalize=([0.5] * 3, [0.25] * 3), seed=3)(x))
        assert torch.equal(make()(x, seeds=np.arange(4)), make()(x, seeds=[0, 1, 2, 3]))
        assert CMAPSettings.from_json(CMAPSettings(n_latents=np.int64(3)).to_json()) == CMAPSettings(n_latents=3)

    @pytest.mark.parametrize("mode", [True, "bilinear", "bicubic", "area", "nearest-exact"])
    def test_other_sizes_are_resized_there_and_back_when_asked_for(self, mode: str | bool) -> None:
        shape = (3, 13, 10)
        model = make(classifier=ToyClassifier(shape=shape), resize=mode)
        result = model.purify(images(2, shape=shape))
        assert result.images.shape == (2, 3, *shape)
        assert result.latents.shape == (2, 3, *SHAPE)
        assert result.images.min() >= 0
        assert result.images.max() <= 1


class TestModule:
    def test_a_call_changes_nothing_of_the_caller(self) -> None:
        model, x = make(seed=0).train(), images()
        kept = x.clone()
        weights = copy.deepcopy(model.state_dict())
        flags = [(p.requires_grad, p.grad) for p in model.parameters()]
        modes = [m.training for m in model.modules()]
        model(x)
        assert torch.equal(x, kept)
        assert x.grad is None
        assert not x.requires_grad
        assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    def test_the_backbone_keeps_its_flags_and_gets_no_gradient(self) -> None:
        backbone = ToyBackbone(SHAPE)
        model = make(backbone=backbone)
        F.cross_entropy(model(images().requires_grad_()), torch.arange(4)).backward()
        assert all(p.requires_grad and p.grad is None for p in backbone.parameters())
        assert all(p.grad is not None for p in model.classifier.parameters())

    def test_the_backbone_stays_in_eval_mode(self) -> None:
        model = make().train()
        assert model.training
        assert model.classifier.training
        assert not model.backbone.training
        model.eval()
        assert not model.classifier.training

    def test_state_dict_round_trip(self) -> None:
        model, other = make(seed=0), make(seed=0, classifier=ToyClassifier(3.0), backbone=ToyBackbone(SHAPE, seed=9))
        assert not torch.equal(model(images()), other(images()))
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(images()), other(images()))
        assert {name.split(".")[0] for name in model.state_dict()} == {"classifier", "backbone"}

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_answer_alike_and_have_no_hooks(self, how: object) -> None:
        model, calls = make(seed=0), []
        model.register_step_hook(lambda state: calls.append(state.iteration))
        twin = how(model)
        answer = model(images())
        assert len(calls) == QUICK.iterations
        assert torch.equal(twin(images()), answer)
        assert len(calls) == QUICK.iterations

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_replica_of_data_parallel_answers_alike_in_every_precision(self, dtype: torch.dtype) -> None:
        model = make(seed=0).to(dtype)
        twin = replica_of(model)
        assert not list(twin.parameters())
        assert torch.equal(twin(images()), model(images()))
        with pytest.raises(CmapError, match="images are on meta"):
            twin(images().to("meta"))

    def test_a_default_device_does_not_reach_seeds_and_noise(self) -> None:
        model, x = make(), images()
        torch.manual_seed(5)
        expected = model(x)
        torch.manual_seed(5)
        with torch.device("meta"):
            assert torch.equal(model(x), expected)

    def test_a_hook_may_replace_the_latents(self) -> None:
        model = make(settings=QUICK.replace(iterations=1, learning_rate=1e-9))
        with model.register_step_hook(lambda state: torch.full_like(state.latents, 0.25)):
            found = model.purify(images()).latents
        assert torch.allclose(found, torch.full_like(found, 0.25), atol=1e-6)

    def test_settings_come_from_the_backbone_where_none_are_given(self) -> None:
        backbone = ToyBackbone(SHAPE)
        assert PurifiedClassifier(ToyClassifier(), backbone).settings == CMAPSettings()
        backbone.default_settings = {"n_latents": 2, "iterations": 3}
        assert PurifiedClassifier(ToyClassifier(), backbone).settings == CMAPSettings(n_latents=2, iterations=3)


class TestPrecision:
    def test_double_stays_double(self) -> None:
        model = make().double()
        result = model.purify(images().double(), seeds=[1] * 4)
        assert result.latents.dtype == result.images.dtype == result.logits.dtype == torch.float64

    def test_noise_is_drawn_in_float32_then_cast(self) -> None:
        starts = []
        for model, x in ((make(), images()), (make().double(), images().double())):
            with model.register_step_hook(lambda s: starts.append(s.latents) if s.iteration == 0 else None):
                model.purify(x, seeds=[1] * 4)
        assert torch.equal(starts[0].double(), starts[1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_precision_model_keeps_latents_and_losses_in_float32(self, dtype: torch.dtype) -> None:
        model = make().to(dtype)
        result = model.purify(images().to(dtype), seeds=[1] * 4)
        exact = make().purify(images().to(dtype).float(), seeds=[1] * 4)
        assert result.latents.dtype == result.images.dtype == result.logits.dtype == torch.float32
        assert result.history.total.dtype == torch.float32
        assert torch.allclose(result.history.total, exact.history.total, rtol=0.02)

    def test_under_autocast_latents_and_losses_are_float32_and_the_backbone_is_not(self) -> None:
        class Spy(ToyBackbone):
            def generate(self, latents: Tensor) -> Tensor:
                out = super().generate(latents)
                seen.append((latents.dtype, F.conv2d(latents, self.enter).dtype))
                return out

        seen: list[tuple[torch.dtype, torch.dtype]] = []
        model = make(backbone=Spy(SHAPE))
        with torch.autocast("cpu", torch.bfloat16):
            result = model.purify(images(), seeds=[1] * 4)
            logits = model(images(), seeds=[1] * 4)
        assert {inside for _, inside in seen} == {torch.bfloat16}
        assert result.latents.dtype == result.history.total.dtype == logits.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            CMAP(QUICK)(Spy(SHAPE), images(), seeds=torch.arange(4), max_parallel=9, compiler=lambda f, size, **_: f)
        assert {inside for _, inside in seen} == {torch.bfloat16}, "compiled as well"

    def test_no_grad_and_inference_mode_callers_get_the_same_answer(self) -> None:
        model, x = make(seed=0), images()
        plain = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), plain)
            assert not model(x).requires_grad
        with torch.inference_mode():
            assert torch.equal(model(images()), plain)
            assert not model.purify(images()).logits.requires_grad

    def test_a_tensor_made_in_inference_mode_can_be_used_outside(self) -> None:
        with torch.inference_mode():
            x = images()
        assert torch.equal(make(seed=0)(x), make(seed=0)(images()))


class TestGradient:
    def test_cross_entropy_has_a_gradient_on_unanimous_votes(self) -> None:
        model, x = make(classifier=ToyClassifier(3.0), seed=0), images().requires_grad_()
        result = model.purify(x)
        assert (result.margin == 1).any()
        loss = F.cross_entropy(model(x), result.labels, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        unanimous = result.margin == 1
        assert (gradient[unanimous].abs().flatten(1).amax(dim=1) > 0).all()
        assert torch.isfinite(gradient).all()
        assert model.gradient == StraightThrough()


def replica_of(module: nn.Module) -> nn.Module:
    """A copy as nn.DataParallel makes it on each device: plain tensors in place of registered parameters."""
    twin = module._replicate_for_data_parallel()
    twin._former_parameters = {name: p.detach() for name, p in module._parameters.items() if p is not None}
    for name, tensor in twin._former_parameters.items():
        setattr(twin, name, tensor)
    for name, child in module._modules.items():
        if child is not None:
            twin._modules[name] = replica_of(child)
            setattr(twin, name, twin._modules[name])
    return twin


def bad_nan() -> Tensor:
    x = images()
    x[2, 0, 1, 1] = float("nan")
    return x


def bad_inf() -> Tensor:
    x = images()
    x[1, 0, 1, 1] = float("inf")
    return x


BAD_IMAGES = {
    "rank 3": (lambda: images()[0], ValueError, r"\[B, C, H, W\].*images\[None\]"),
    "channels": (lambda: images(shape=(1, 8, 6)), ValueError, "3 channel.*have 1"),
    "size": (lambda: images(shape=(3, 9, 6)), ValueError, "8 x 6.*9 x 6.*resize"),
    "NaN": (bad_nan, ValueError, "finite.*these of the batch: 2"),
    "inf": (bad_inf, ValueError, "finite.*: 1"),
    "8-bit values": (lambda: images() * 255, ValueError, r"\[0, 1\].*255"),
    "normalized values": (lambda: images() * 2 - 1, ValueError, 'inputs="normalized"'),
    "uint8": (lambda: (images() * 255).byte(), TypeError, "floating-point.*uint8.*255"),
    "int64": (lambda: images().long(), TypeError, r"Convert them to floating-point in \[0, 1\]"),
    "an array": (lambda: images().numpy(), TypeError, "torch.Tensor.*ndarray"),
    "another device": (lambda: images().to("meta"), RuntimeError, "model is on cpu.*images are on meta"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name: str) -> None:
    make_bad, builtin, message = BAD_IMAGES[name]
    with pytest.raises(CmapError, match=message) as caught:
        make()(make_bad())
    assert isinstance(caught.value, builtin)


BAD_CALLS = {
    "seeds: too few": ({"seeds": [1]}, ValueError, r"one per image, \[4\]"),
    "seeds: floats": ({"seeds": torch.rand(4)}, TypeError, "integers"),
    "seeds: text": ({"seeds": "1234"}, TypeError, "integer"),
    "seeds: too large": ({"seeds": [2**64] * 4}, ValueError, "64 bits"),
    "latents: shape": ({"latents": torch.zeros(4, 2, 3, 6, 8)}, ValueError, r"\[4, K, 3, 8, 6\]"),
    "latents: none": ({"latents": torch.zeros(4, 0, 3, 8, 6)}, ValueError, "K at least 1"),
    "latents: NaN": ({"latents": torch.full((4, 1, 3, 8, 6), torch.nan)}, ValueError, "finite"),
    "latents: integers": ({"latents": torch.zeros(4, 1, 3, 8, 6, dtype=torch.int64)}, TypeError, "floating-point"),
    "latents: elsewhere": ({"latents": torch.zeros(4, 1, 3, 8, 6, device="meta")}, RuntimeError, "meta"),
    "both": ({"latents": torch.zeros(4, 1, 3, 8, 6), "seeds": [1] * 4}, ValueError, "not both"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    arguments, builtin, message = BAD_CALLS[name]
    with pytest.raises(CmapError, match=message) as caught:
        make().purify(images(), **arguments)
    assert isinstance(caught.value, builtin)


BAD_OPTIONS = {
    "no latents": (lambda: make(settings=CMAPSettings(n_latents=0)), ValueError, "n_latents.*at least 1"),
    "no iterations": (lambda: make(settings=CMAPSettings(iterations=0)), ValueError, "iterations.*at least 1"),
    "infinite weight": (
        lambda: make(settings=CMAPSettings(ssim_weight=float("inf"))),
        ValueError,
        "ssim_weight.*finite",
    ),
    "NaN weight": (
        lambda: make(settings=CMAPSettings(latent_weight=float("nan"))),
        ValueError,
        "latent_weight.*finite",
    ),
    "settings of another kind": (lambda: make(settings={"n_latents": 3}), ValueError, "CMAPSettings"),
    "unknown name": (lambda: make(backbone="fashion-mnist-cd"), LookupError, "fashion-mnist-ct"),
    "no backbone": (lambda: make(backbone=nn.Linear(2, 2)), TypeError, "image_shape"),
    "no generate": (lambda: make(backbone=with_shape(nn.Identity())), TypeError, "generate"),
    "not a module": (lambda: make(backbone=3), TypeError, "nn.Module"),
    "classifier elsewhere": (
        lambda: make(classifier=ToyClassifier().to("meta"))(images()),
        RuntimeError,
        "backbone is on cpu.*classifier is on meta",
    ),
    "missing folder": (lambda: make(backbone="./no-such-folder"), OSError, "backbone.json"),
    "hook": (lambda: make().register_step_hook(3), ValueError, "callable"),
    "a class as classifier": (lambda: make(classifier=ToyClassifier), ValueError, "instance"),
    "classifier": (lambda: make(classifier="resnet"), ValueError, "callable"),
    "vote": (lambda: make(vote="hard"), ValueError, "'label', 'soft'"),
    "inputs": (lambda: make(inputs="imagenet"), ValueError, "'unit', 'normalized'"),
    "normalized without normalize": (lambda: make(inputs="normalized"), ValueError, "normalize"),
    "normalize: too few": (lambda: make(normalize=((0.5,), (0.5,))), ValueError, "3 numbers"),
    "normalize: zero std": (lambda: make(normalize=(0.5, 0.0)), ValueError, "above 0"),
    "normalize: no pair": (lambda: make(normalize=0.5), ValueError, "mean, std"),
    "resize": (lambda: make(resize="stretch"), ValueError, "bilinear"),
    "seed": (lambda: make(seed=1.5), ValueError, "integer"),
    "gradient": (lambda: make(gradient="bpda"), ValueError, "StraightThrough"),
    "max_parallel": (lambda: make(max_parallel=0), ValueError, "max_parallel"),
}


def with_shape(module: nn.Module) -> nn.Module:
    module.image_shape = SHAPE
    return module


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str) -> None:
    make_bad, builtin, message = BAD_OPTIONS[name]
    with pytest.raises(CmapError, match=message) as caught:
        make_bad()
    assert isinstance(caught.value, builtin)


BAD_CLASSIFIERS = {
    "rank": (lambda x: x.flatten(), r"\[12, classes\]"),
    "batch": (lambda x: x.flatten(1)[:3], r"\[12, classes\]"),
    "no classes": (lambda x: x.flatten(1)[:, :0], r"\[12, classes\]"),
    "one logit": (lambda x: x.flatten(1)[:, :1], r"2 classes at least.*ConstantPad1d\(\(1, 0\), 0.0\)"),
    "one number": (lambda x: x.flatten(1)[:, 0], r"nn.Unflatten\(0, \(-1, 1\)\), nn.ConstantPad1d"),
    "a tuple": (lambda x: (x.flatten(1), None), r"tuple\. Take the logits out of it, .*\[0\]"),
    "a mapping": (lambda x: {"logits": x.flatten(1)}, r"dict\. Take the logits out of it, .*\['logits'\]"),
    "labels": (lambda x: x.flatten(1).long(), "int64"),
    "NaN": (lambda x: x.flatten(1) * float("nan"), "NaN"),
    "nothing but -inf": (lambda x: torch.full((len(x), 4), -torch.inf), "-inf"),
}


@pytest.mark.parametrize("name", BAD_CLASSIFIERS)
def test_bad_classifiers(name: str) -> None:
    classifier, message = BAD_CLASSIFIERS[name]
    with pytest.raises(CmapError, match=message) as caught:
        make(classifier=classifier)(images())
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("squeezed", [False, True])
def test_the_two_logits_that_the_error_makes_of_one_have_the_sigmoid_as_their_softmax(squeezed: bool) -> None:
    classifier: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(144, 1))
    x, sigmoid = images(), torch.sigmoid(classifier(images()))
    if squeezed:
        classifier.append(nn.Flatten(0))
    with pytest.raises(CmapError) as caught:
        make(classifier=classifier)(x)
    line = re.search(r"nn\.Sequential\(.*\)(?=, without)", str(caught.value))
    assert line is not None
    wrapped = eval(line.group(), {"nn": nn, "classifier": classifier})
    assert torch.allclose(wrapped(x).softmax(dim=1), torch.cat([1 - sigmoid, sigmoid], dim=1), atol=1e-6)
    assert make(classifier=wrapped)(x).shape == (4, 2)


def test_one_logit_is_refused_bare_too() -> None:
    attack, labels = PGD(ThreatModel(), steps=1), torch.zeros(4, dtype=torch.int64)
    for model in (make(classifier=lambda x: x.flatten(1)[:, :1]).undefended, lambda x: x.flatten(1)[:, :1]):
        with pytest.raises(ClassifierError, match="2 classes"):
            attack(model, images(), labels)


def test_masked_classes_stay_finite() -> None:
    def classifier(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :CLASSES].clone().index_fill(1, torch.tensor([2]), -torch.inf)

    x = images().requires_grad_()
    logits = make(classifier=classifier)(x)
    assert torch.isfinite(logits).all()
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert torch.isfinite(gradient).all()


class BrokenBackbone(ToyBackbone):
    """Generates what ``change`` makes of the images."""

    def __init__(self, change: object) -> None:
        super().__init__(SHAPE)
        self.change = change

    def generate(self, latents: Tensor) -> Tensor:
        return self.change(super().generate(latents))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g[:, :1], "shaped"),
        (lambda g: g.detach(), "detach"),
        (lambda g: g * float("nan"), "NaN"),
        (lambda g: None, "NoneType"),
        (lambda g: 3 * g, r"\[-1, 1\]"),
    ],
)
def test_a_backbone_that_breaks_its_promise(change: object, message: str) -> None:
    with pytest.raises(CmapError, match=message) as caught:
        make(backbone=BrokenBackbone(change))(images())
    assert isinstance(caught.value, TypeError)


def test_a_state_dict_of_another_backbone_is_no_silent_change() -> None:
    models = [
        PurifiedClassifier(nn.Flatten(), name, purifier=OneStep()) for name in ("fashion-mnist-ct", "fashion-mnist-edm")
    ]
    model = models[0]
    model.load_state_dict(model.state_dict())
    outer = nn.Sequential(model)
    outer.load_state_dict(nn.Sequential(model).state_dict())
    with pytest.warns(BackboneWarning, match="other weights of the backbone than 'fashion-mnist-ct'"):
        outer.load_state_dict(nn.Sequential(models[1]).state_dict())
    pair = PurifiedClassifier(nn.Flatten(), (models[1].backbone, load_backbone("fashion-mnist-ct")), purifier=OneStep())
    pair.load_state_dict(pair.state_dict())
    changed = {name: tensor + 1 for name, tensor in pair.state_dict().items()}
    with pytest.warns(BackboneWarning) as caught:
        pair.load_state_dict(changed)
    model.to("meta").load_state_dict(models[1].state_dict(), assign=True)
    assert ["fashion-mnist-ct" in str(caught[0].message), "fashion-mnist-edm" in str(caught[1].message)] == [True, True]
