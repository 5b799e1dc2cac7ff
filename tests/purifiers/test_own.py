"""A purifier of a user's own: what it returns is checked, its gradient is the exact one, and its code is recorded."""

import importlib
import linecache
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attack_toys import Denoiser, Linear, labelled
from cmap_defense import CMAP, PurifiedClassifier
from cmap_defense.common.describe import own_code
from cmap_defense.errors import GradientError, NoLatentsError, PurifierError
from cmap_defense.evaluation.describe import describe_model
from cmap_defense.gradients import StraightThrough, Unrolled
from cmap_defense.purifiers import Chain, Identity, OneStep, Purifier
from cmap_defense.results import PurificationResult
from toys import noise

IMAGES = labelled(3)[0]


class Own(Purifier):
    """Two versions by some function of the images."""

    needs, n_latents, passes = None, 2, 0

    def __init__(self, returns: Callable[[Tensor], Any]) -> None:
        self.returns = returns

    def __call__(self, backbone: nn.Module, images: Tensor, *, seeds: Tensor, **options: Any) -> Any:
        found = self.returns(images)
        return PurificationResult(found, found, seeds=seeds) if isinstance(found, Tensor) else found


def wrapped(returns: Callable[[Tensor], Any], **options: Any) -> PurifiedClassifier:
    return PurifiedClassifier(Linear(), Denoiser(), purifier=Own(returns), **options).eval()


def twice(images: Tensor) -> Tensor:
    return images[:, None].repeat(1, 2, 1, 1, 1)


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "no result": (lambda images: None, "must return a PurificationResult, but returned NoneType"),
    "no versions": (lambda images: images, r"here \[3, 2, 3, 8, 6\].*returned \[3, 3, 8, 6\]"),
    "other batch": (lambda images: twice(images)[:2], r"returned \[2, 2, 3, 8, 6\]"),
    "one version": (lambda images: images[:, None], "K is 2"),
    "other size": (lambda images: twice(images)[..., :4], r"returned \[3, 2, 3, 8, 4\]"),
    "NaN": (lambda images: twice(images) * torch.nan, "NaN or infinite"),
    "signed": (lambda images: 2 * twice(images) - 1, r"\(images \+ 1\) / 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_purification_is_refused_by_the_purifiers_name(name: str) -> None:
    returns, said = WRONG[name]
    with pytest.raises(PurifierError, match=f"^Own .*{said}"):
        wrapped(returns)(IMAGES)


def gradient_of(model: PurifiedClassifier) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images, seeds=range(3)).square().sum(), images)
    return gradient


def test_the_default_gradient_is_the_exact_one() -> None:
    """Of images squared; the straight-through one leaves out the factor 2 x."""
    square = wrapped(lambda images: twice(images.square()))
    assert square.gradient == Unrolled()
    exact = gradient_of(square)
    torch.testing.assert_close(exact, 2 * IMAGES * gradient_of(square.variant(gradient=StraightThrough())))


def test_images_that_do_not_depend_on_the_input_are_an_error_where_a_gradient_is_wanted() -> None:
    detached = wrapped(lambda images: twice(images).detach())
    detached(IMAGES)
    with pytest.raises(GradientError, match=r"gradient=StraightThrough\(\)"):
        detached(IMAGES.clone().requires_grad_())
    torch.testing.assert_close(gradient_of(detached.variant(gradient=StraightThrough())), gradient_of(wrapped(twice)))


@pytest.mark.parametrize(
    ("purifier", "exact"),
    [
        (OneStep(), True),
        (Identity(), True),
        (Chain(OneStep(), OneStep()), True),
        (CMAP(), False),
        (Chain(OneStep(), CMAP()), False),
        (Chain(Chain(CMAP()), OneStep()), False),
    ],
    ids=repr,
)
def test_the_default_gradient_by_purifier(purifier: Purifier, exact: bool) -> None:
    model = PurifiedClassifier(Linear(), Denoiser(), purifier=purifier)
    assert model.gradient == (Unrolled() if exact else StraightThrough())
    assert model.variant(purifier=OneStep()).gradient == Unrolled()
    chosen = model.variant(gradient=StraightThrough())
    assert chosen.variant(purifier=OneStep()).gradient == StraightThrough()


def test_a_model_without_latents_has_no_settings() -> None:
    model = PurifiedClassifier(Linear(), Denoiser(), purifier=OneStep())
    assert not hasattr(model, "settings")
    with pytest.raises(NoLatentsError, match="settings belongs to the optimisation over latents"):
        _ = model.settings
    with pytest.raises(AttributeError, match="no attribute 'setting'"):
        _ = model.setting


BODY = """
from cmap_defense.purifiers import Purifier


class Edited(Purifier):
    needs, n_latents, passes = None, 1, 0

    def __call__(self, backbone, images, **options):
        return images * {factor}
"""


def edited(folder: Path, factor: float) -> Any:
    """A purifier of one class in one module, whose code is another each time."""
    (folder / "edited.py").write_text(BODY.format(factor=factor))
    sys.modules.pop("edited", None)
    importlib.invalidate_caches()
    linecache.clearcache()
    return importlib.import_module("edited").Edited()


def test_another_code_of_the_same_class_is_another_purifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def described(factor: float, *others: Purifier) -> Any:
        purifier = edited(tmp_path, factor)
        purifier = Chain(purifier, *others) if others else purifier
        return describe_model(PurifiedClassifier(Linear(), Denoiser(), purifier=purifier))["purifier"]

    first = described(1.0)
    assert first["class"] == "edited.Edited"
    assert described(0.5) != first == described(1.0)
    assert described(0.5, OneStep()) != described(1.0, OneStep())


def unsourced(body: str) -> Any:
    """A purifier that was defined where Python finds no source, as in a program from standard input."""
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(body, names)
    return names["Edited"]()


def test_the_compiled_code_of_a_class_stands_for_one_whose_source_is_not_found() -> None:
    def described(body: str) -> Any:
        return describe_model(PurifiedClassifier(Linear(), Denoiser(), purifier=unsourced(body)))["purifier"]

    first = described(BODY.format(factor=1.0))
    assert "code" in first
    assert described("# moved by a line\n" + BODY.format(factor=1.0)) == first
    assert described(BODY.format(factor=0.5)) != first
    assert described(BODY.format(factor=1.0).replace("1, 0", "1, 2")) != first
    for one, other in (("images, **", "images, a=1, **"), ("**options):", "*, a=1, **options):")):
        changed = BODY.format(factor="a").replace(one, other)
        assert described(changed) != described(changed.replace("a=1", "a=2"))
    wrapped_call = BODY.format(factor=1.0).replace("    def", "    @torch.no_grad()\n    def")
    assert described("import torch\n" + wrapped_call) != described(
        "import torch\n" + wrapped_call.replace("1.0", "0.5")
    )


MADE = """
import functools

def times(factor):
    def decorator(function):
        @functools.wraps(function)
        def call(*given):
            return function(*given) * factor
        return call
    return decorator

class Found:
    {}
"""

DIFFERENT = {
    "list": ("sizes = [1]", "sizes = [2]"),
    "dictionary": ("sizes = {'a': 1}", "sizes = {'a': 2}"),
    "set": ("sizes = {'a', 'b'}", "sizes = {'a', 'c'}"),
    "None": ("size = None", "size = 1"),
    "class inside": ("class Inner: size = 1", "class Inner: size = 2"),
    "default": ("def size(self, by={'a': 1}): return by", "def size(self, by={'a': 2}): return by"),
    "class method": ("size = classmethod(lambda kind: 1)", "size = classmethod(lambda kind: 2)"),
    "setter": ("size = property(None, lambda self, x: 1)", "size = property(None, lambda self, x: 2)"),
    "partial": ("size = functools.partialmethod(int, base=2)", "size = functools.partialmethod(int, base=3)"),
    "nested constant": ("size = (1, frozenset({1}))", "size = (1, frozenset({2}))"),
    "decorator": ("@times(2)\n    def size(self): return 1", "@times(3)\n    def size(self): return 1"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_class_without_source_is_made_of_shows(name: str) -> None:
    def code(body: str) -> dict[str, str]:
        names: dict[str, Any] = {"__name__": "nowhere"}
        exec(MADE.format(body), names)
        return own_code(names["Found"])

    one, other = DIFFERENT[name]
    assert code(one) == code(one) != code(other) != {}


def test_a_bound_method_without_source_has_the_code_of_its_function() -> None:
    def code(value: int) -> dict[str, str]:
        names: dict[str, Any] = {"__name__": "nowhere"}
        exec(MADE.format(f"def size(self): return {value}"), names)
        return own_code(names["Found"]().size)

    assert code(1) == code(1) != code(2) != {}


REMEMBERING = """
def counted(function):
    calls, seen = 0, {}
    def call(self, x):
        nonlocal calls
        calls, seen[x] = calls + 1, True
        return function(self, x)
    return call

class Found:
    _cache = {}

    @counted
    def size(self, x):
        self._cache[x] = True
"""


def test_what_code_without_source_remembers_is_no_part_of_it() -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(REMEMBERING, names)
    before = own_code(names["Found"])
    names["Found"]().size(3)
    assert own_code(names["Found"]) == before != {}


PROGRAM = """
from cmap_defense.common.describe import own_code

names = {"__name__": "nowhere"}
exec("def found(x): return x in {'one', 'two', 'three', 'four'} and sorted(len(y) for y in x)", names)
exec("def other(x, sizes={'one', 'two', 'three'}): return x in sizes", names)
exec("class Third: sizes = (frozenset({'one', 'two', 'three'}), 1)", names)
print([own_code(names[name])["code"] for name in ("found", "other", "Third")])
"""


def test_compiled_code_is_the_same_in_every_process() -> None:
    """Whatever the order of a set of texts is there."""
    found = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in "123"
    }
    assert len(found) == 1


def test_a_call_that_lacks_an_argument_is_refused_when_the_model_is_made() -> None:
    class Short(Own):
        def __call__(self, backbone: nn.Module, images: Tensor, *, seeds: Tensor, latents: Any = None) -> Any: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    with pytest.raises(PurifierError, match=r"^Short must be called as .*seeds, latents.*'class_labels'"):
        PurifiedClassifier(Linear(), Denoiser(), purifier=Short(twice))


@pytest.mark.parametrize("name", WRONG)
def test_the_same_where_a_gradient_is_wanted_and_in_a_chain(name: str) -> None:
    returns, said = WRONG[name]
    for model in (wrapped(returns), PurifiedClassifier(Linear(), Denoiser(), purifier=Chain(Own(returns), OneStep()))):
        for images in (IMAGES, IMAGES.clone().requires_grad_()):
            with pytest.raises(PurifierError, match=f"^Own .*{said}"):
                model(images)


def test_an_image_in_place_of_a_result_is_named_in_each_gradient_mode() -> None:
    class Plain(Own):
        def __call__(self, backbone: nn.Module, images: Tensor, **options: Any) -> Any:
            return twice(images)

    for gradient in (Unrolled(), StraightThrough()):
        model = PurifiedClassifier(Linear(), Denoiser(), purifier=Plain(twice), gradient=gradient)
        with pytest.raises(PurifierError, match="Plain must return a PurificationResult, but returned Tensor"):
            model(IMAGES.clone().requires_grad_())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"needs": "denoize"}, "needs must be 'generate', 'denoise' or None, but is 'denoize'"),
        ({"kind": "denoizer"}, "kind must be 'consistency', 'denoiser' or None, but is 'denoizer'"),
        ({"n_latents": 0}, "n_latents must be at least 1, but is 0"),
        ({"n_latents": "3"}, "n_latents must be an integer, but is '3'"),
        ({"passes": None}, "passes must be an integer, but is None"),
        ({"level": "a"}, "level must be a number, but is 'a'"),
        ({"level": -1.0}, "level must be at least 0"),
    ],
)
def test_what_a_purifier_declares_is_checked_when_the_model_is_made(changed: dict[str, Any], message: str) -> None:
    purifier = type("Declared", (Own,), changed)(twice)
    for wanted in (lambda: PurifiedClassifier(Linear(), Denoiser(), purifier=purifier), lambda: Chain(purifier)):
        with pytest.raises(PurifierError, match=f"^Declared.{message}"):
            wanted()


@pytest.mark.parametrize("grad", [False, True])
def test_what_works_in_place_changes_nothing_of_the_caller(grad: bool) -> None:
    """Neither a purifier nor a classifier; predictions, gradients and the result's images are those without."""

    class InPlace(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.mul_(0.5))

    class Scaled(Linear):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images * 0.5)

    models = [
        PurifiedClassifier(InPlace(), Denoiser(), purifier=Own(lambda images: twice(images.mul_(0.5)))),
        PurifiedClassifier(Scaled(), Denoiser(), purifier=Own(lambda images: twice(images * 0.5))),
    ]
    found = []
    for model in (made.eval() for made in models):
        images = IMAGES.clone().requires_grad_(grad)
        result = model.purify(images, seeds=range(3))
        bare = model.undefended(images)
        total = model(images, seeds=range(3)).square().sum() + bare.square().sum()
        gradient = torch.autograd.grad(total, images)[0] if grad else torch.zeros(0)
        assert torch.equal(images, IMAGES)
        found.append([result.images, result.logits, bare, gradient])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("purifier", [OneStep(n_latents=2), Identity(), CMAP()], ids=repr)
def test_given_latents_decide_about_k(purifier: Purifier) -> None:
    model = PurifiedClassifier(Linear(), Denoiser(), purifier=purifier)
    latents = noise(3, 5, *IMAGES.shape[1:], seed=1)
    assert model.purify(IMAGES, latents=latents).images.shape == (3, 5, *IMAGES.shape[1:])


def test_the_packages_purifiers_have_a_version_in_place_of_code() -> None:
    model = PurifiedClassifier(Linear(), Denoiser(), purifier=OneStep())
    assert "code" not in describe_model(model)["purifier"]
