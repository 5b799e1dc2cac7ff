"""dtype= and compile=: the same labels up to rounding, shapes that stay, the way back, and the fallback."""

import copy
import functools
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmap_defense import CMAPSettings, PurifiedClassifier
from cmap_defense.classifier import wrapper
from cmap_defense.common import compiling
from cmap_defense.common.modules import dtype_of
from cmap_defense.errors import CompileWarning, SettingsError
from cmap_defense.gradients import Implicit, StraightThrough, Unrolled
from cmap_defense.purifiers import CMAP, Chain, OneStep
from toys import CountingCompiler, ToyBackbone, noise, uniform

SHAPE = (3, 8, 6)
QUICK = CMAPSettings(n_latents=3, iterations=4, learning_rate=0.05)
IMAGES = uniform(4, *SHAPE, seed=1)


class Restoring(ToyBackbone):
    def denoise(self, noisy: Tensor, sigma: float) -> Tensor:
        return self.generate(noisy / (1 + sigma))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(4, 3 * 8 * 6, seed=7))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.mT


def wrapped(backbone: nn.Module | None = None, **options: Any) -> PurifiedClassifier:
    chosen = {"seed": 3, "settings": QUICK} | options
    return PurifiedClassifier(Linear(), backbone or Restoring(SHAPE).requires_grad_(False), **chosen)


# ----------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("level", [None, 0.5])
def test_labels_in_bfloat16_are_those_of_float32(level: float | None) -> None:
    own = Restoring(SHAPE).requires_grad_(False)
    settings = QUICK.replace(level=level)
    model = wrapped(own, settings=settings, dtype=torch.bfloat16)
    assert dtype_of(own) == torch.float32  # a copy was cast
    assert dtype_of(model.backbone) == torch.bfloat16
    assert dtype_of(model.classifier) == torch.float32
    result, exact = model.purify(IMAGES), wrapped(own, settings=settings).purify(IMAGES)
    assert result.images.dtype == result.latents.dtype == torch.float32
    assert torch.equal(result.labels, exact.labels)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(result.images, exact.images, rtol=0, atol=0.05)
    assert not torch.equal(result.images, exact.images)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(wrapper, "multiplies_bfloat16", lambda device: native)
    own = Restoring(SHAPE)
    model = wrapped(own, dtype="auto")
    assert dtype_of(model.backbone) == expected
    assert (model.backbone is own) == (not native)
    assert model.variant(vote="soft").backbone is model.backbone
    assert dtype_of(wrapped("fashion-mnist-ct", settings=None, dtype="auto").backbone) == expected


def test_both_backbones_of_a_pair_get_the_precision() -> None:
    pair = Restoring(SHAPE).to(torch.bfloat16), Restoring(SHAPE)
    pair[1].kind = "denoiser"
    model = wrapped(pair, settings=None, purifier=Chain(OneStep(level=0.2), CMAP(QUICK)), dtype=torch.bfloat16)  # type: ignore[arg-type]
    assert {weight.dtype for weight in model.backbone.parameters()} == {torch.bfloat16}


def test_the_default_leaves_the_backbone_as_it_is() -> None:
    own = Restoring(SHAPE).bfloat16()
    assert wrapped(own).backbone is own
    assert dtype_of(wrapped(own).variant(dtype=torch.float64).backbone) == torch.float64
    assert wrapped(own, dtype=torch.bfloat16).backbone is own
    assert wrapped(own, dtype="bfloat16").backbone is own


@pytest.mark.parametrize("wrong", ["bf16", "int64", torch.int64, 16])
def test_another_dtype_is_refused(wrong: Any) -> None:
    with pytest.raises(SettingsError, match=f'dtype must be "auto", None or.* is {wrong!r}'):
        wrapped(dtype=wrong)


# --------------------------------------------------------------------------------------------------------- compile


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingCompiler]:
    torch.compiler.reset()
    backend = CountingCompiler()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler; the fallback's are looked for where it falls back
        warnings.simplefilter("error", CompileWarning)
        yield backend
    torch.compiler.reset()


@pytest.mark.parametrize("level", [None, 0.5])
@pytest.mark.parametrize("chunk", [None, 5])
def test_the_loop_is_compiled_for_one_size(counting: CountingCompiler, level: float | None, chunk: int | None) -> None:
    settings = QUICK.replace(level=level, stop_decrease=0.5, stop_window=1)
    model = wrapped(settings=settings, compile=True, max_parallel=chunk)
    result, plain = model.purify(IMAGES), wrapped(settings=settings).purify(IMAGES)
    torch.testing.assert_close(result.images, plain.images, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.labels, plain.labels)  # pyright: ignore[reportArgumentType]
    assert counting.graphs == 2  # the backbone and the distances
    assert set(counting.sizes) == {chunk or 12}
    assert len(counting.sizes) > 1
    graphs = counting.graphs
    model.purify(1 - IMAGES)
    model.variant(vote="soft", gradient=Unrolled()).purify(IMAGES)
    assert counting.graphs == graphs  # nothing is compiled again


@pytest.mark.parametrize("mode", [StraightThrough(), Unrolled(), Implicit(damping=30.0)], ids=repr)
def test_gradients_are_those_of_the_loop_that_is_not_compiled(counting: CountingCompiler, mode: Any) -> None:
    gradients = []
    for compiled in (True, False):
        leaf = IMAGES.clone().requires_grad_()
        loss = wrapped(compile=compiled, gradient=mode, max_parallel=5)(leaf).square().sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert counting.graphs > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_chain_compiles_its_loop(counting: CountingCompiler) -> None:
    chain = Chain(OneStep(level=0.3, n_latents=2), CMAP(QUICK), handed_on="mean")
    options = {"settings": None, "purifier": chain}
    expected = wrapped(**options).purify(IMAGES).images
    torch.testing.assert_close(wrapped(**options, compile=True).purify(IMAGES).images, expected, rtol=1e-4, atol=1e-4)
    assert counting.graphs > 0


def test_what_cannot_be_compiled_runs_without_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any, example: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    model = wrapped(compile=True)
    with pytest.warns(CompileWarning, match="torch.compile failed, so that the loop runs without it"):
        result = model.purify(IMAGES)
    model.purify(IMAGES[:2])  # warnings are errors
    model.variant(vote="soft").purify(IMAGES)
    assert torch.equal(result.images, wrapped().purify(IMAGES).images)
    torch.compiler.reset()


def test_the_filters_of_the_distances_are_not_padded(counting: CountingCompiler) -> None:
    images, settings = uniform(18, *SHAPE, seed=1), QUICK.replace(n_latents=1)  # 8 in the last chunk, as many as rows
    expected = wrapped(settings=settings).purify(images)
    found = wrapped(settings=settings, compile=True, max_parallel=10).purify(images)
    torch.testing.assert_close(found.history, expected.history, rtol=1e-4, atol=1e-4)
    assert counting.graphs == 2


@pytest.mark.parametrize("wrong", ["values", "gradients"])
def test_a_function_that_is_compiled_to_another_is_not_used(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def compiled(function: Any, **_: Any) -> Any:
        def run(latents: Tensor, *others: Any, **named: Any) -> Tensor:
            first = torch.arange(len(latents)).view(-1, 1, 1, 1) == 0  # one image of twelve
            if wrong == "gradients":
                return function(torch.where(first, latents.detach(), latents), *others, **named)
            return torch.where(first, 1.2, 1.0) * function(latents, *others, **named)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.warns(CompileWarning, match=f"has other results .{wrong} of 1 of 12 images differ"):
        result = wrapped(compile=True).purify(IMAGES)
    assert torch.equal(result.images, wrapped().purify(IMAGES).images)


def test_more_shapes_than_are_compiled_is_said(counting: CountingCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "SHAPES", 2)
    model = wrapped(compile=True)
    for count in (1, 2):
        model.purify(IMAGES[:count])
    with pytest.raises(CompileWarning, match="recompile_limit"):  # an error here
        model.purify(IMAGES[:3])
    graphs = counting.graphs
    assert torch.equal(model.purify(IMAGES).images, wrapped().purify(IMAGES).images)
    assert counting.graphs == graphs


def test_a_torch_without_a_compiler_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("torch.compile is not supported on this Python")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.warns(CompileWarning, match="not supported on this Python"):
        wrapped(compile=True).purify(IMAGES)


def test_the_size_of_the_first_call_is_kept(counting: CountingCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([5, 7])
    monkeypatch.setattr(CMAP, "fitting", lambda *_: next(free))
    model = wrapped(compile=True)
    for _ in range(2):
        model.purify(IMAGES)
    assert set(counting.sizes) == {5}
    assert next(free) == 7


def test_replicas_of_data_parallel_are_not_compiled(counting: CountingCompiler) -> None:
    replica = wrapped(compile=True)._replicate_for_data_parallel()
    replica.purify(IMAGES)
    assert counting.graphs == 0


class Recorded(torch.autograd.Function):
    """A function as its CUDA graphs run it: the results of each replay lie where those of the last one lay."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, function: Any, others: Any, memory: dict[str, Tensor]) -> Tensor:
        ctx.function, ctx.others, ctx.memory = function, others, memory
        ctx.save_for_backward(latents)
        return _kept(memory, "value", function(latents, *others)).view_as(latents)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (latents,) = ctx.saved_tensors
        with torch.enable_grad():
            leaf = latents.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(ctx.function(leaf, *ctx.others), leaf, cotangents[0])
        return _kept(ctx.memory, "gradient", gradient).view_as(gradient), None, None, None


def _kept(memory: dict[str, Tensor], name: str, result: Tensor) -> Tensor:
    return memory.setdefault(name, torch.empty_like(result)).copy_(result)


@pytest.mark.parametrize("chunk", [None, 5])
def test_results_of_a_recorded_graph_outlive_its_next_replay(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None
) -> None:
    modes = []

    def compiled(function: Any, *, dynamic: bool, mode: str | None) -> Any:
        modes.append(mode)
        if mode is None:
            return function
        memory: dict[str, Tensor] = {}
        return lambda latents, *others: Recorded.apply(latents, function, others, memory)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "can_record", lambda device: True)
    states: list[Tensor] = []
    model, plain = (wrapped(compile=recorded, max_parallel=chunk) for recorded in (True, False))
    for each in (model, plain):
        with each.register_step_hook(lambda state: states.append(state.generated)):
            result = each.purify(IMAGES)
        states.extend((result.images, *vars(result.history).values()))
    half = len(states) // 2
    for found, expected in zip(states[:half], states[half:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert modes == ["reduce-overhead", None]  # the backbone's graph alone


def test_compile_needs_a_loop_and_copies_start_anew() -> None:
    with pytest.raises(SettingsError, match="compile=True compiles the loop of CMAP, which OneStep lacks"):
        wrapped(settings=None, purifier=OneStep(), compile=True)
    with pytest.raises(SettingsError, match="compile must be True or False"):
        wrapped(compile="yes")
    model = wrapped(compile=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._compiler is not None
        assert other._compiler is not model._compiler
    assert model.variant(compile=False)._compiler is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"},
        {"compile": True},
        {"compile": True, "max_parallel": 5},
        {"dtype": "auto", "compile": True},
    ],
)
def test_on_a_gpu_labels_are_those_of_float32(options: Any) -> None:
    device = "cuda"
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = PurifiedClassifier(
        Linear().to(device), Restoring(SHAPE).requires_grad_(False).to(device), settings=QUICK, seed=3, **options
    )
    exact = wrapped().to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", CompileWarning)
        for images in (IMAGES.to(device), 1 - IMAGES.to(device)):  # the second replays what the first recorded
            result, plain = model.purify(images), exact.purify(images)
            assert torch.equal(result.labels, plain.labels)  # pyright: ignore[reportArgumentType]
            close = {"rtol": 1e-3, "atol": 1e-3} if "dtype" not in options else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(result.images, plain.images, **close)
            torch.testing.assert_close(vars(result.history), vars(plain.history), **close)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    if torch.cuda.get_device_capability()[0] >= 8 and "dtype" in options:
        assert dtype_of(model.backbone) == torch.bfloat16
