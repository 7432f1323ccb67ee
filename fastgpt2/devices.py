"""The device a model runs on: which one, in which dtype, on which kernels, how fast at most."""

import os
import platform
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt2.errors import UserError
from fastgpt2.kernels import explain
from fastgpt2.kernels.gpus import PEAK_TFLOPS
from fastgpt2.kernels.linear_fp8 import fp8_obstacle

DTYPES = ("auto", "fp32", "bf16", "fp16")


class DeviceKind(NamedTuple):
    """What PyTorch can do on one type of device.

    Attributes:
        fused_adamw: its fused AdamW takes ``grad_scale`` and ``found_inf``.
        compiler: the language of the compiler that ``torch.compile`` calls, None: not offered.
        cuda: a GPU of NVIDIA or AMD, for Triton kernels, tensor cores and CUDA's profiler.
        host: the processor itself.
    """

    fused_adamw: bool
    compiler: str | None
    cuda: bool = False
    host: bool = False


# the last two are untested: they get the paths with the fewest requirements
_KINDS = {
    "cpu": DeviceKind(fused_adamw=True, compiler="C++", host=True),
    "cuda": DeviceKind(fused_adamw=True, compiler="C", cuda=True),
    "mps": DeviceKind(fused_adamw=False, compiler=None),
    "xpu": DeviceKind(fused_adamw=False, compiler="C"),
}
DEVICE_TYPES = tuple(_KINDS)
_KNOWN = f"expected auto, {', '.join(DEVICE_TYPES)} or cuda:N"

# a device whose name has one of these contains a table entry's name, but is a slower variant
_OTHER_PRODUCTS = re.compile(r"\b(Laptop|Max-Q|Mobile|MIG|Ti|SUPER|D)\b")


def resolve_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in DEVICE_TYPES:
            raise UserError(f"device {name!r}: {_KNOWN}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r}: {_why_not(name, error)}") from None
    return device


def _why_not(name: str, error: Exception) -> str:
    """Why there is no such device, in plain words where PyTorch speaks of its own insides."""
    kind = name.partition(":")[0]
    if kind not in DEVICE_TYPES:
        return _KNOWN
    if not torch.get_device_module(kind).is_available():
        return "not in this machine, or this PyTorch was built without it"
    return str(error).splitlines()[0]


def device_kind(device: torch.device | str) -> DeviceKind:
    """What the type of a device can do; the one place that tells types apart.

    Args:
        device: a device, or the name of its type; an unknown type can do the least.
    """
    name = device if isinstance(device, str) else device.type
    return _KINDS.get(name, DeviceKind(fused_adamw=False, compiler=None))


def of_this_process(device: torch.device) -> torch.device:
    """The same device; under torchrun, of several GPUs the one that belongs to this process."""
    # a name without a number
    if device_kind(device).cuda and device == torch.device(device.type):
        return torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
    return device


def default_generator(device: torch.device) -> torch.Generator:
    """PyTorch's default generator for ``device``."""
    if device_kind(device).host:
        return torch.default_generator
    if device.type == "mps":
        generator: torch.Generator = torch.mps._get_default_mps_generator()
        return generator
    module, index = torch.get_device_module(device), device.index
    found: torch.Generator = module.default_generators[
        module.current_device() if index is None else index
    ]
    return found


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    if name == "auto":
        if not device_kind(device).cuda:
            return torch.float32
        # PyTorch asks the current device, and counts emulation as support
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def dtype_notice(device: torch.device, dtype: torch.dtype) -> str | None:
    """One line where ``dtype`` is slower than fp32 on this processor, or None.

    Args:
        device: where the model computes.
        dtype: dtype of the computation.
    """
    slow = device_kind(device).host and dtype in (torch.bfloat16, torch.float16)
    if not slow or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    if name == "bf16":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.cpu._is_amx_fp16_supported()
    if native:
        return None
    return f"{name} is slow: this processor has no instructions for it, --dtype fp32 is faster"


def resolve_kernels(
    device: torch.device, dtype: torch.dtype, impl: str, *, fp8: bool = False
) -> str:
    """One line: which kernels will run, and why.

    Raises:
        UserError: ``impl`` was requested by name and cannot run there, or FP8 cannot.
    """
    try:
        line = explain(device, dtype, impl)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if (slow := dtype_notice(device, dtype)) is not None:
        line += f"; {slow}"
    if not fp8:
        return line
    obstacle = fp8_obstacle(device, dtype)
    if obstacle is not None:
        raise UserError(f"--fp8: {obstacle}")
    return f"{line}; FP8{'' if device_kind(device).cuda else ', emulated and slow'}"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast | nullcontext[None]:
    """The context in which a model with fp32 weights computes in ``dtype``."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """States of the random-number generators that training on ``device`` draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    elif not device_kind(device).host:
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restore the generators; one without a saved state, from another machine, does not change."""
    torch.set_rng_state(states["cpu"])
    if device_kind(device).host or device.type not in states:
        return
    if device.type == "mps":
        torch.mps.set_rng_state(states["mps"])
    else:
        torch.get_device_module(device).set_rng_state(states[device.type], device)


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, which later changes of the tensors do not reach.

    Args:
        tensors: by name; all are on one device.
    """
    copies: dict[str, Tensor] = {}
    device: torch.device | None = None
    for name, tensor in tensors.items():
        # pinned, a GPU fills them side by side
        pinned = device_kind(tensor.device).cuda
        copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        copies[name].copy_(tensor.detach(), non_blocking=pinned)
        device = tensor.device if pinned else device
    if device is not None:
        torch.cuda.synchronize(device)
    return copies


class HostCopy:
    """A copy to the host that has begun: only ``wait`` waits for the device.

    Args:
        values: on any device.

    Attributes:
        is_asynchronous: whether the device may still be computing the values.
    """

    def __init__(self, values: Tensor) -> None:
        self.is_asynchronous = device_kind(values.device).cuda
        self._values = values.to("cpu", non_blocking=self.is_asynchronous)
        if self.is_asynchronous:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(values.device))

    def wait(self) -> Tensor:
        """The values, without waiting for what the device has been given since."""
        if self.is_asynchronous:
            self._copied.synchronize()
        return self._values


def spare_gpu_memory(device: torch.device) -> int:
    """Bytes of a CUDA GPU that this process may still use, including its allocator's cache."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def release_gpu_memory() -> None:
    """Free what PyTorch's allocator has cached of CUDA GPUs and does not use."""
    torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """The device's marketing name, or its type where it has none."""
    return torch.cuda.get_device_name(device) if device_kind(device).cuda else device.type


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of half-precision matrix products, or None where the table has no entry."""
    name = device_name(device)
    if _OTHER_PRODUCTS.search(name):
        return None
    for entry, tflops in PEAK_TFLOPS:
        # whole words only: an "RTX A4000" is not an "A40"
        if re.search(rf"\b{entry}\b", name):
            return tflops * 1e12
    return None
