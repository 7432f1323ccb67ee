"""Which GPU gets which tiles, and which is refused: played, so that no GPU is needed."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt2.kernels import backend, tuning
from fastgpt2.kernels.gpus import ARCHITECTURES, GPUS
from fastgpt2.kernels.jit.primitives import allows_tf32
from tests.played_gpus import play_architecture

# the package's attribute of that name is the op
contract = sys.modules["fastgpt2.kernels.attention"]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """The GPU's architecture is asked for again, before and after."""
    tuning._architecture.cache_clear()
    yield
    tuning._architecture.cache_clear()


def _resolve(impl: str, own_obstacle: Any = None) -> backend.Impl:
    with FakeTensorMode():
        x = torch.empty(4, device="cuda:0")
    return backend.resolve("gelu", impl, x, own_obstacle)


@pytest.mark.parametrize(
    ("gpu", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        # of the same generation, and not newer
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        # of a generation that is not listed
        ((11, 0), "sm_80"),
        ((13, 0), "sm_80"),
        ("gfx90a:sramecc+:xnack-", "gfx90a"),
        ("gfx942:sramecc+:xnack-", "gfx942"),
        ("gfx950:sramecc+:xnack-", "gfx950"),
        ("gfx1100", "gfx1100"),
    ],
)
def test_whose_tiles_a_gpu_gets(
    gpu: tuple[int, int] | str, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_architecture(monkeypatch, gpu)
    assert tuning.arch_of(torch.device("cuda", 0)) == arch
    assert _resolve("auto") is _resolve("triton") is backend.Impl.TRITON


@pytest.mark.parametrize(
    ("gpu", "has_it"),
    [((8, 0), True), ((9, 0), True), ("gfx942:xnack-", True)]
    # Triton refuses to compile such a product there
    + [(gpu, False) for gpu in ("gfx90a:xnack-", "gfx950:xnack-", "gfx1100")],
)
def test_tf32_is_for_gpus_that_have_it(
    gpu: tuple[int, int] | str, has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_architecture(monkeypatch, gpu)
    with FakeTensorMode():
        x = torch.empty(4, device="cuda:0")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert allows_tf32(x) is has_it
        assert not allows_tf32(x.bfloat16())
        torch.set_float32_matmul_precision("highest")
        assert not allows_tf32(x)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("gpu", "reason"),
    [
        ((7, 5), "the GPU is older than compute capability 8.0"),
        ((7, 0), "the GPU is older than compute capability 8.0"),
        ("gfx906:sramecc-:xnack-", "kernels have tiles for gfx90a, gfx942, gfx950, gfx1100, not"),
        ("gfx1030", "not for gfx1030"),
        ("gfx1201", "not for gfx1201"),
    ],
)
def test_a_gpu_without_tiles_is_refused_with_a_reason(
    gpu: tuple[int, int] | str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_architecture(monkeypatch, gpu)
    assert _resolve("auto") is backend.Impl.TORCH
    with pytest.raises(RuntimeError, match=f"gelu: impl='triton' cannot run: .*{reason}"):
        _resolve("triton")


@pytest.mark.parametrize("dropout", [False, True])
def test_what_spills_with_every_tile_is_refused(
    dropout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_architecture(monkeypatch, "gfx942")
    limits = {"bytes": 2, "D": 128, "dropout": int(dropout)}
    (rule,) = (r for r in tuning.TABLE["attention_bwd_dkv"] if r.limits == limits)
    monkeypatch.setitem(rule.configs, "gfx942", None)
    for D, masked, refused in ((64, False, False), (128, False, True), (80, True, True)):
        with FakeTensorMode():
            qkv = torch.empty(2, 8, 3 * 2 * D, dtype=torch.bfloat16, device="cuda:0")
            ids = torch.zeros(2, 8, dtype=torch.int64, device="cuda:0") if masked else None

        def obstacle(qkv: Any = qkv, ids: Any = ids) -> str | None:
            found: str | None = contract._obstacle(qkv, 2, ids, None, dropout)
            return found

        monkeypatch.setattr(contract, "INTERPRETED", False)
        assert _resolve("auto", obstacle) is (
            backend.Impl.TORCH if refused else backend.Impl.TRITON
        )
        if refused:
            with pytest.raises(
                RuntimeError, match="every tile of attention_bwd_dkv needs more reg"
            ):
                _resolve("triton", obstacle)
        else:
            assert _resolve("triton", obstacle) is backend.Impl.TRITON


@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("size", [2, 4])
def test_attention_on_rdna_3(D: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play_architecture(monkeypatch, "gfx1100")
    reason = contract._refused(0, D, size, False, False)
    assert reason == "every tile of attention_fwd needs more registers than gfx1100 has"
    # everything else runs
    assert _resolve("auto") is backend.Impl.TRITON


def test_every_architecture_ends_at_tiles_that_every_kernel_has() -> None:
    for rules in tuning.TABLE.values():
        for rule in rules:
            assert rule.on("sm_80") is not None
            assert all(rule.compiled(arch) or arch in rule.configs for arch in ARCHITECTURES)


def test_every_architecture_has_a_product_that_stands_for_it() -> None:
    assert {gpu.arch for gpu in GPUS.values()} == set(ARCHITECTURES)
    assert all(gpu.tflops > 0 for gpu in GPUS.values())
