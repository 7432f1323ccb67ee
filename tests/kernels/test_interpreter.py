"""The quickened interpreter computes what Triton's own does."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import random

from tests.kernels import interpreter
from tests.kernels.budget import DEVICE, INTERPRETED


@triton.jit
def _words_kernel(out_ptr: Any, seed: Any, counters_ptr: Any) -> None:
    offs = tl.arange(0, 4)
    a, b, c, d = tl.randint4x(seed, tl.load(counters_ptr + offs))
    tl.store(out_ptr + offs, a)
    tl.store(out_ptr + 4 + offs, b)
    tl.store(out_ptr + 8 + offs, c)
    tl.store(out_ptr + 12 + offs, d)


def _words(seed: int) -> Tensor:
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    counters = torch.tensor([0, 7, 2**32 - 1, 2**33 + 5], device=DEVICE)
    _words_kernel[(1,)](out, seed, counters)
    return out


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled")
@pytest.mark.parametrize("seed", [0, 2**40 + 7, 2**62 - 1])
def test_philox_in_numpy(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert random.philox_impl is interpreter.philox_rounds
    ours = _words(seed)
    monkeypatch.setattr(random, "philox_impl", interpreter.PHILOX)
    assert torch.equal(_words(seed), ours)
