import pytest
import torch

from fastgpt2.devices import (
    autocast,
    dtype_notice,
    peak_flops,
    resolve_device,
    resolve_dtype,
    resolve_kernels,
    rng_states,
    set_rng_states,
)
from fastgpt2.errors import UserError
from tests.played_gpus import PlayedGPUs

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", 70.0),
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        # other products, whose names hold one of the above
        ("NVIDIA RTX A4000", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("Some GPU", None),
    ],
)
def test_peak_is_that_of_the_very_device(
    monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if tflops is None else pytest.approx(tflops * 1e12)
    assert peak_flops(torch.device("cuda")) == expected


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(CPU) is None


def test_device_by_name() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu0", "meta", "vulkan", "", "cpu:x"])
def test_a_device_that_is_not_here_is_one_line(name: str) -> None:
    with pytest.raises(UserError) as error:
        resolve_device(name)
    assert str(error.value).startswith(f"device {name!r}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CPU", "expected auto, cpu, cuda, mps, xpu or cuda:N"),
        ("tpu:0", "expected auto, cpu, cuda, mps, xpu or cuda:N"),
        ("mps", "not in this machine, or this PyTorch was built without it"),
        ("xpu:1", "not in this machine, or this PyTorch was built without it"),
    ],
)
def test_a_device_that_is_not_here_is_said_in_plain_words(name: str, message: str) -> None:
    kind = name.partition(":")[0]
    if kind in ("mps", "xpu") and torch.get_device_module(kind).is_available():
        pytest.skip(f"{kind} is here")
    with pytest.raises(UserError) as error:
        resolve_device(name)
    assert str(error.value) == f"device {name!r}: {message}"


def test_dtype_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("bf16", CPU) == torch.bfloat16
    # of two GPUs only the second has bf16 instructions; PyTorch asks the current one
    gpus = PlayedGPUs(monkeypatch)

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or gpus.current == 1

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve_dtype("auto", torch.device("cuda:0")) == torch.float16
    assert resolve_dtype("auto", torch.device("cuda:1")) == torch.bfloat16
    assert gpus.current == 0


def test_autocast_only_where_it_is_needed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            assert torch.is_autocast_enabled("cpu") is (dtype != torch.float32)


def test_kernels_that_cannot_run_are_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.kernels.backend.INTERPRETED", False)
    assert resolve_kernels(CPU, torch.float32, "torch") == "torch, as asked for"
    with pytest.raises(UserError, match="impl='triton' cannot run"):
        resolve_kernels(CPU, torch.float32, "triton")


@pytest.mark.parametrize("native", [False, True])
def test_a_processor_without_bf16_says_so(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name in ("avx512_bf16", "amx_tile", "amx_fp16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: native)
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        said = f"; {name} is slow: this processor has no instructions for it"
        assert (said in resolve_kernels(CPU, dtype, "torch")) is not native
    assert dtype_notice(CPU, torch.float32) is None
    assert dtype_notice(torch.device("cuda"), torch.bfloat16) is None


def test_random_states_go_back() -> None:
    states = rng_states(CPU)
    first = torch.rand(3)
    set_rng_states(states, CPU)
    assert torch.rand(3).equal(first)
    # of a machine with another device
    set_rng_states(states | {"cuda": torch.zeros(16, dtype=torch.uint8)}, CPU)
    assert torch.rand(3).equal(first)
