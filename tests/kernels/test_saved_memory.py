"""What a block keeps between forward and backward, in bytes a token, counted tensor by tensor."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.kernels.dropout_bits import bits_size
from fastgpt2.model import GPT
from tests.kernels.budget import DEVICE
from tests.kernels.processors import ALWAYS, NEVER, give_onednn

B, T, C, H = 2, 16, 48, 4
CONFIG = GPTConfig(n_embd=C, n_head=H, block_size=T, vocab_size=61, n_layer=1)


def _saved(config: GPTConfig, *, frozen: bool = False) -> int:
    """Bytes of the activations that a training forward pass saves, each storage once.

    If ``frozen``, no matrix of a block is trained, as with adapters.
    """
    torch.manual_seed(0)
    model = GPT(config).to(DEVICE)
    for p in model.transformer.h.parameters():
        p.requires_grad_(p.dim() == 1 or not frozen)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    # alive until all are counted, so that no storage is where another was
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    idx = torch.randint(config.vocab_size, (B, config.block_size), device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _, loss = model(idx, targets=idx)
    assert loss.requires_grad
    return sum(sizes.values())


def _bytes_a_token(
    impl: str, dropout: float, config: GPTConfig = CONFIG, *, frozen: bool = False
) -> float:
    """What one more layer adds."""
    config = replace(config, impl=impl, dropout=dropout)
    two, three = (_saved(replace(config, n_layer=n), frozen=frozen) for n in (2, 3))
    return (three - two) / (B * config.block_size)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_saves_three_quarters_of_what_pytorch_does(dropout: float) -> None:
    # in fp32: the stream twice, two norms, qkv, attention's output, the pre-activation
    activations = 12 * C * 4
    lse, statistics = H * 4, 2 * 2 * 4
    # attention's mask in packed bits; a seed for each of the other two masks
    masks = (bits_size(B, H, T) * 4 + 2 * 8) / (B * T) if dropout else 0.0
    triton = _bytes_a_token("triton", dropout)
    assert triton == pytest.approx(activations + lse + statistics + masks)
    torch_path = _bytes_a_token("torch", dropout)
    if dropout:
        # masks too
        assert triton < 0.6 * torch_path
    else:
        # the GELU's output too, and the statistics are the same: three quarters of all else
        assert torch_path == 16 * C * 4 + lse + statistics


@pytest.mark.parametrize("share", [ALWAYS, NEVER])
def test_frozen_layers_keep_nothing_of_their_input(
    share: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every processor; attention keeps its output for itself."""
    give_onednn(monkeypatch, share)
    # two norms fewer; with PyTorch's GELU its output, too
    for impl, fewer in (("triton", 2 * C), ("torch", 6 * C)):
        trained = _bytes_a_token(impl, 0.0)
        assert _bytes_a_token(impl, 0.0, frozen=True) == trained - fewer * 4


def test_at_the_width_of_gpt2_the_statistics_hardly_count() -> None:
    config = replace(CONFIG, n_embd=768, n_head=12, block_size=4)
    ratio = _bytes_a_token("triton", 0.0, config) / _bytes_a_token("torch", 0.0, config)
    # 0.75 of the activations, and all of the statistics: 64 bytes of 49,216
    assert 0.75 < ratio < 0.7504
