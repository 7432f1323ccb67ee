"""What the devices people train on can do at most."""

import torch

# dense peak in TFLOP/s for bf16/fp16 matrix products with fp32 accumulation, from each vendor's
# data sheet; looked up by substring of the device's name, first match wins
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A40", 149.7),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 383.0),
)


def device_name(device: torch.device) -> str:
    """The device's marketing name, or its type where it has none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of half-precision matrix products, or None where the table has no entry."""
    name = device_name(device)
    for part, tflops in PEAK_TFLOPS:
        if part in name:
            return tflops * 1e12
    return None
