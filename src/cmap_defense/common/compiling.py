"""torch.compile for functions of a batch, with one shape each; what cannot be compiled runs as it is."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import CompileWarning

AGREEMENT = 0.1
"""How far, in norm and relative to it, values and gradients of what is compiled may be from those of the function: more
than bfloat16 rounds, and less than what a wrong one would have."""


class StepCompiler:
    """Compiles functions of images that are differentiated once. Copies and pickles of it start anew."""

    def __init__(self) -> None:
        self._compiled: dict[Any, Callable[..., Tensor]] = {}
        self._tried: set[Any] = set()
        self._failed = False

    def __call__(self, function: Callable[..., Tensor], size: int, *, graphs: bool = True) -> Callable[..., Tensor]:
        """The function, compiled for batches of ``size`` at most; smaller ones are padded with their last image.

        It is one of tensors [M, ...] and others, to a tensor [M, ...] whose rows each depend on that row alone; tensors
        that are given by name are of any shape, and not padded. On CUDA the forward and the backward pass are a CUDA
        graph each where ``graphs`` says so; at most one function of a step can be. Where the first passes of a shape
        fail in the compiler, or have other results than the function, it warns once (``CompileWarning``), and the
        function is called as it is from then on.
        """

        def call(*given: Any, **named: Any) -> Tensor:
            if self._failed:
                return function(*given, **named)
            count, device = len(given[0]), given[0].device
            recorded = graphs and has_graphs(device)
            compiled = functools.partial(self._of(function, recorded), **named)
            padded = [_padded(value, count, size) for value in given]
            values = (*padded, *(named[name] for name in sorted(named)))
            shapes = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in values)
            place = (function, shapes, str(device), torch.is_autocast_enabled(device.type))
            if place not in self._tried:
                try:
                    for _ in range(3 if recorded else 1):  # a graph is warmed up, recorded and replayed
                        _try(compiled, functools.partial(function, **named), padded)
                except Exception as error:
                    found = function(*given, **named)  # an error of its own is raised here
                    self._failed = True
                    reason = (str(error).strip() or "no message").splitlines()[0]
                    warnings.warn(
                        f"torch.compile failed, so that the loop runs without it ({type(error).__name__}: {reason}). "
                        "It needs a C++ compiler on a CPU and Triton on a GPU. compile=False gives the same result "
                        "without this warning.",
                        CompileWarning,
                        stacklevel=2,
                    )
                    return found
                self._tried.add(place)
            if recorded and padded[0].requires_grad:
                padded[0] = padded[0].view_as(padded[0])
                padded[0].register_hook(torch.clone)  # the next replay overwrites the graph's own
            found = compiled(*padded)[:count]
            return found.clone() if recorded else found

        return call

    def _of(self, function: Callable[..., Tensor], recorded: bool) -> Callable[..., Tensor]:
        """The compiled function; its CUDA graphs are the compiler's."""
        if (function, recorded) not in self._compiled:
            mode = "reduce-overhead" if recorded else None
            self._compiled[function, recorded] = torch.compile(function, dynamic=False, mode=mode)
        return self._compiled[function, recorded]

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCompiler:
        return StepCompiler()

    def __reduce__(self) -> tuple[type[StepCompiler], tuple[()]]:
        return (StepCompiler, ())


def has_graphs(device: torch.device) -> bool:
    """Whether a device launches recorded graphs of its work."""
    return device.type == "cuda"


def _padded(value: Any, count: int, size: int) -> Any:
    """A tensor [M, ...] as [size, ...]; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape[:1] != (count,) or count >= size:
        return value
    return torch.cat([value, value[-1:].expand(size - count, *value.shape[1:])])


def _try(compiled: Callable[..., Tensor], function: Callable[..., Tensor], given: list[Any]) -> None:
    """A forward and a backward pass of both, which compiles them; the compiler's own warnings are not the user's.

    Raises:
        RuntimeError: their results differ.
    """
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        found, expected = (_value_and_gradient(called, given) for called in (compiled, function))
        for ours, theirs, what in zip(found, expected, ("values", "gradients"), strict=True):
            difference, size = (ours.float() - theirs.float()).norm(), theirs.float().norm()
            if size.isfinite() and not difference <= AGREEMENT * size:
                raise RuntimeError(f"its {what} differ by {difference / size:.2g} of their norm")


def _value_and_gradient(function: Callable[..., Tensor], given: list[Any]) -> tuple[Tensor, Tensor]:
    """The value and its sum's gradient to the first argument."""
    leaf = given[0].detach().requires_grad_()
    value = function(leaf, *given[1:])
    (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True, materialize_grads=True)
    return value.detach().clone(), gradient.clone()
