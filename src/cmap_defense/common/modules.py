"""Where a module is and in which precision (also of ``nn.DataParallel``'s replicas, which have no parameters), and how
it is run."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def weights_of(module: object) -> Iterator[Tensor]:
    """The parameters and then the buffers of a module with its parts; nothing for what is no module."""
    if isinstance(module, nn.Module):
        for part in module.modules():
            replica = getattr(part, "_former_parameters", {})  # where DataParallel leaves a replica's
            yield from (tensor for tensor in (*part._parameters.values(), *replica.values()) if tensor is not None)
        for part in module.modules():
            yield from (tensor for tensor in part._buffers.values() if tensor is not None)


def device_of(module: object) -> torch.device | None:
    """The device of the first weight; None when there is none."""
    return next((tensor.device for tensor in weights_of(module)), None)


def dtype_of(module: object) -> torch.dtype | None:
    """The precision of the first floating-point weight; None when there is none."""
    return next((tensor.dtype for tensor in weights_of(module) if tensor.is_floating_point()), None)


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the device multiplies bfloat16 matrices natively, so that they are faster there than float32 ones.

    True for CUDA devices of compute capability 8 and above, and for x86 processors with AMX or AVX-512 BF16. A
    processor without them emulates bfloat16, which is many times slower than float32. False where it is not known.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type == "cpu":
        checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
        return any(check() for check in checks if check is not None)
    return False


def in_fastest_layout(module: Module) -> Module:
    """A module with its weights in the memory layout in which its convolutions are fastest, see docs/performance.md.

    That is channels last in float32, and on CUDA devices in every precision.
    """
    device = device_of(module)
    last = dtype_of(module) == torch.float32 or (device is not None and device.type == "cuda")
    return module.to(memory_format=torch.channels_last if last else torch.contiguous_format)  # pyright: ignore[reportCallIssue] - not in torch's signature


@contextlib.contextmanager
def building(device: str = "cpu") -> Iterator[None]:
    """Networks made in here are float32, on the CPU, ordinary tensors, and leave the random generators alone. On the
    device "meta" they are shapes without values, which cost nothing.

    That is so whatever default dtype, default device or inference mode the caller works under.
    """
    default = torch.get_default_dtype()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.inference_mode(False), torch.random.fork_rng(devices=devices), torch.device(device):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def copied_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights and buffers by name."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@contextlib.contextmanager
def restoring(module: nn.Module) -> Iterator[None]:
    """A module's weights and buffers as they were, afterwards."""
    own = copied_state(module)
    try:
        yield
    finally:
        module.load_state_dict(own)


def module_behind(model: object) -> nn.Module | None:
    """The module that a callable runs, where that can be seen: a module, its bound method, a partial of either."""
    while not isinstance(model, nn.Module):
        if isinstance(model, types.MethodType):
            model = model.__self__
        elif isinstance(model, functools.partial):
            model = model.func
        else:
            return None
    return model


@contextlib.contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """The modules behind models in eval mode, each of their parts back in its own mode afterwards."""
    modules = [part for model in models if (module := module_behind(model)) is not None for part in module.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextlib.contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """So many threads of the CPU inside; None leaves their number to torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
