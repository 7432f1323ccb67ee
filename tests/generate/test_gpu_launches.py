"""What a decoding step on a GPU launches, per layer and per token."""

from collections import Counter

import pytest
import torch

from fastgpt2.generate.gpu_step import gpu_greedy_after, gpu_logits_after, gpu_weights_of
from fastgpt2.kernels.decode_linear import MAX_ROWS
from tests.generate.played_graph import Recorder
from tests.tiny_gpt import tiny_gpt


@torch.no_grad()
def _launches(n_layer: int, rows: int, *, greedy: bool) -> Counter[str]:
    model = tiny_gpt(impl="triton", n_layer=n_layer).eval()
    weights = gpu_weights_of(model)
    assert weights is not None
    kv = [layer.kv for layer in model.make_cache(rows, 4).layers]
    tokens, lengths, steps = torch.zeros(3, rows, dtype=torch.int64)
    recent = torch.zeros(2, 1, rows, dtype=torch.float64)
    with Recorder() as recorder:
        if greedy:
            gpu_greedy_after(weights, tokens, lengths, kv, steps, recent, "triton")
        else:
            gpu_logits_after(weights, tokens, lengths, kv, "triton")
    return Counter(recorder.names)


@pytest.mark.parametrize("greedy", [False, True])
def test_interpreted_launches_of_few_rows(greedy: bool) -> None:
    layers = 2
    ends = {"fastgpt2::decode_head": 1, "fastgpt2::decode_greedy": 1}
    assert _launches(layers, 1, greedy=greedy) == (ends if greedy else {}) | {
        # a row that is full has no position left
        "aten::clamp": 1,
        "fastgpt2::embedding_fwd": 1,
        "fastgpt2::decode_qkv": layers,
        "fastgpt2::decode_linear": 3 * layers + (not greedy),
        "fastgpt2::decode_attention": layers,
    }


def test_interpreted_launches_of_many_rows() -> None:
    one, two = (_launches(n_layer, MAX_ROWS + 1, greedy=True) for n_layer in (1, 2))
    assert two - one == {
        "aten::addmm": 4,
        "aten::gelu": 1,
        # each with the addition before it
        "fastgpt2::layer_norm_fwd": 2,
        "fastgpt2::append_kv": 1,
        "fastgpt2::decode_attention": 1,
    }
    assert one + one - two == {
        "aten::clamp": 1,
        "fastgpt2::embedding_fwd": 1,
        "fastgpt2::layer_norm_fwd": 1,
        "aten::mm": 1,
        "fastgpt2::decode_greedy": 1,
    }
