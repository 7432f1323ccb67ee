"""What the tests of FP8 share: the formats, a layer's inputs and results, and a head's."""

from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels import linear_cross_entropy, linear_fp8
from fastgpt2.kernels.quantize_fp8 import E4M3, E5M2
from tests.kernels.budget import DEVICE

# largest number, bits of the significand after the point, smallest normal number
FORMATS = {E4M3: (448.0, 3, 2.0**-6), E5M2: (57344.0, 2, 2.0**-14)}
# a sum's error by its terms: of fp32, or of the 14 bits that a GPU's fast sums may keep
SUMS = 1e-5 if DEVICE.type == "cpu" else 1e-3
LOSS: dict[str, Any] = {"vocab_size": 45, "label_smoothing": 0.1}


def layer_inputs(N: int, C: int, F: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "x": torch.randn(N, C, device=DEVICE).to(dtype),
        "weight": torch.randn(F, C, device=DEVICE) / C**0.5,
        "bias": torch.randn(F, device=DEVICE),
    }


def layer_gradients(inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves: dict[str, Any] = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    y = linear_fp8(**leaves)
    found = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


def head_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    targets = torch.randint(45, (37,), device=DEVICE)
    targets[1::4] = -100
    return {
        "x": torch.randn(37, 32, device=DEVICE).to(dtype),
        # no multiple of 16: the head's rows are padded inside
        "weight": torch.randn(50, 32, device=DEVICE) / 32**0.5,
        "targets": targets,
    }


def head_gradients(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    x, weight = (inputs[name].clone().requires_grad_() for name in ("x", "weight"))
    loss = linear_cross_entropy(x, weight, inputs["targets"], **LOSS, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]
