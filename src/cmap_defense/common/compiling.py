"""torch.compile for functions of a batch, with one shape each; what cannot be compiled runs as it is."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import CompileWarning

AGREEMENT = 0.1
"""How far values and gradients of a compiled function may be from the function's: in the norm of each row, relative to
that norm or to the rows' mean norm where it is larger. bfloat16 rounds by a hundredth."""

SHAPES = 64
"""How many shapes of one function are compiled. torch.compile stops at 8 by itself, without an error."""

Value = Callable[..., Tensor]
"""Tensors [M, ...] and others to a tensor [M, ...] whose rows each depend on that row alone."""


class StepCompiler:
    """Compiles functions of images that are differentiated once. Copies and pickles of it start anew."""

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Value] = {}
        self._tried: set[Hashable] = set()
        self._sizes: dict[Hashable, int] = {}
        self._failed = False

    def kept_size(self, place: Hashable, measure: Callable[[], int]) -> int:
        """What ``measure`` found when it was first asked for a place: every other size would be compiled anew."""
        if place not in self._sizes:
            self._sizes[place] = measure()
        return self._sizes[place]

    def __call__(self, function: Value, size: int, *, graphs: bool = False) -> Value:
        """The function, compiled for batches of ``size`` at most; smaller ones are padded with their last image.

        Tensors that are given by name are of any shape, and are not padded. With ``graphs`` its forward and backward
        pass are each recorded as a CUDA graph, on a GPU. That is for the function that launches most kernels: what runs
        between its forward and its backward pass need not know of it. Where the first passes of a shape fail in the
        compiler, or have other results than the function, it warns once (``CompileWarning``), and functions are called
        as they are from then on.
        """

        def call(*given: Any, **named: Any) -> Tensor:
            plain = functools.partial(function, **named)
            if self._failed:
                return plain(*given)
            count, device = len(given[0]), given[0].device
            recorded = graphs and can_record(device)
            padded = [_padded(value, count, size) for value in given]
            values = (*padded, *(named[name] for name in sorted(named)))
            autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
            place = (function, recorded, tuple(map(_described, values)), device, autocast)
            if place not in self._tried:
                try:
                    compiled = functools.partial(self._compiled_form(function, recorded), **named)
                    _try(compiled, plain, padded, 3 if recorded else 1)  # a graph is warmed up, recorded and replayed
                except Exception as error:
                    self._give_up()
                    found = plain(*given)  # an error of its own is raised here
                    warnings.warn(_explained(error), CompileWarning, stacklevel=2)
                    return found
                self._tried.add(place)
            compiled = functools.partial(self._compiled_form(function, recorded), **named)
            if recorded and padded[0].requires_grad and torch.is_grad_enabled():
                padded[0] = padded[0].view_as(padded[0])
                padded[0].register_hook(torch.clone)  # the next replay overwrites the graph's own
            found = compiled(*padded)[:count]
            return found.clone() if recorded else found

        return call

    def _compiled_form(self, function: Value, recorded: bool) -> Value:
        if (function, recorded) not in self._compiled:
            mode = "reduce-overhead" if recorded else None
            self._compiled[function, recorded] = torch.compile(function, dynamic=False, mode=mode)
        return self._compiled[function, recorded]

    def _give_up(self) -> None:
        """Compile nothing any more, and let go of the memory of graphs."""
        self._failed = True
        self._compiled.clear()
        self._tried.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCompiler:
        return StepCompiler()

    def __reduce__(self) -> tuple[type[StepCompiler], tuple[()]]:
        return (StepCompiler, ())


class DisagreementError(RuntimeError):
    """A compiled function has other results than the function."""


def can_record(device: torch.device) -> bool:
    """Whether torch.compile can use CUDA graphs there."""
    return device.type == "cuda"


def _described(value: Any) -> Hashable:
    """What a function is compiled anew for."""
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _padded(value: Any, count: int, size: int) -> Any:
    """A tensor [M, ...] as [size, ...]; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape[:1] != (count,) or count >= size:
        return value
    return torch.cat([value, value[-1:].expand(size - count, *value.shape[1:])])


def _try(compiled: Value, function: Value, given: list[Any], times: int) -> None:
    """Forward and backward passes, which compile both; the compiler's own warnings are not the user's.

    Raises:
        DisagreementError: the results differ from the function's.
    """
    with warnings.catch_warnings(), torch.enable_grad(), _limits():
        warnings.simplefilter("ignore")
        expected = _value_and_gradient(function, given)
        for _ in range(times):
            found = _value_and_gradient(compiled, given)
            for ours, theirs, what in zip(found, expected, ("values", "gradients"), strict=True):
                sizes = theirs.flatten(1).norm(dim=1)
                allowed = AGREEMENT * sizes.clamp_min(sizes.mean())
                differing = ((ours - theirs).flatten(1).norm(dim=1) > allowed).sum().item()
                if differing:
                    raise DisagreementError(f"{what} of {differing} of {len(sizes)} images differ")


def _limits() -> Any:
    """torch.compile raises an error at ``SHAPES`` shapes, where this version of it can."""
    import torch._dynamo.config as config  # imported late: it takes a second

    wanted = {"recompile_limit": SHAPES, "fail_on_recompile_limit_hit": True}
    if any(not hasattr(config, name) for name in wanted):
        return contextlib.nullcontext()
    return config.patch(wanted)  # pyright: ignore[reportAttributeAccessIssue]


def _value_and_gradient(function: Value, given: list[Any]) -> tuple[Tensor, Tensor]:
    """The value and its sum's gradient to the first argument, in float32."""
    leaf = given[0].detach().requires_grad_()
    value = function(leaf, *given[1:])
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    return value.detach().float().clone(), gradient.float().clone()


def _explained(error: Exception) -> str:
    reason = (str(error).strip() or "no message").splitlines()[0]
    if isinstance(error, DisagreementError):
        return (
            f"What torch.compile made of the loop has other results ({reason}), so that the loop runs without it. "
            "compile=False avoids this warning; please report the versions of torch and of the backbone."
        )
    memory = isinstance(error, torch.cuda.OutOfMemoryError)
    remedy = "Give a smaller max_parallel." if memory else "It needs a C++ compiler on a CPU and Triton on a GPU."
    return (
        f"torch.compile failed, so that the loop runs without it ({type(error).__name__}: {reason}). {remedy} "
        "compile=False gives the same result without this warning."
    )
