import pytest
import torch
from torch import Tensor, nn

from fastgpt2.errors import UserError
from fastgpt2.kernels.backend import INTERPRETED
from fastgpt2.ladder import (
    CausalAttention,
    KernelMultiHeadAttention,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    PackedMultiHeadAttention,
    SDPAMultiHeadAttention,
    SelfAttentionV1,
    SelfAttentionV2,
    attention_rungs,
    same_weights,
    simple_attention,
)
from tests.ladder import published

DTYPES = [torch.float64, torch.float32]
T, D_IN, D_OUT, HEADS = 13, 10, 12, 3


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of additions."""
    eps = torch.finfo(expected.dtype).eps
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=50 * eps, atol=50 * eps)


def random_multi_head(dtype: torch.dtype, qkv_bias: bool = True) -> MultiHeadAttention:
    torch.manual_seed(2)
    return MultiHeadAttention(D_IN, D_OUT, T, 0.0, HEADS, qkv_bias=qkv_bias).to(dtype)


def assert_same_function(rung: nn.Module, above: nn.Module, x: Tensor) -> None:
    """Same outputs, and the same gradient for the tokens."""
    x, y = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = rung(x), above(y)
    assert_same(actual, expected)
    dy = torch.linspace(-1, 1, actual.numel(), dtype=x.dtype).view(actual.shape)
    (dx,) = torch.autograd.grad(actual, x, dy)
    (dx_above,) = torch.autograd.grad(expected, y, dy)
    assert_same(dx, dx_above)


def test_simple_attention_is_a_mean_weighted_by_dot_products() -> None:
    x = tokens(torch.float64, 5, 4)
    weights = [torch.tensor([(x[t] @ x[s]).exp() for s in range(5)]) for t in range(5)]
    expected = torch.stack([(w[:, None] * x).sum(0) / w.sum() for w in weights])
    assert_same(simple_attention(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_v1_equals_simple_attention(dtype: torch.dtype) -> None:
    x = tokens(dtype, 2, T, D_IN)
    assert_same(same_weights.simple_to_v1(D_IN, dtype)(x), simple_attention(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_v2_equals_v1(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    v1 = SelfAttentionV1(D_IN, D_OUT).to(dtype)
    assert_same_function(same_weights.v1_to_v2(v1), v1, tokens(dtype, 2, T, D_IN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_each_row_of_causal_is_v2_on_the_tokens_up_to_it(
    dtype: torch.dtype, qkv_bias: bool
) -> None:
    torch.manual_seed(4)
    v2 = SelfAttentionV2(D_IN, D_OUT, qkv_bias=qkv_bias).to(dtype)
    causal = same_weights.v2_to_causal(v2, context_length=T + 3)
    x = tokens(dtype, 2, T, D_IN)
    out = causal(x)
    for t in range(T):
        assert_same(out[:, t], v2(x[:, : t + 1])[:, -1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrapper_with_one_head_is_causal_attention(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    causal = CausalAttention(D_IN, D_OUT, T, 0.0, qkv_bias=True).to(dtype)
    wrapper = same_weights.causal_to_wrapper(causal)
    assert_same_function(wrapper, causal, tokens(dtype, 2, T, D_IN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_multi_head_equals_the_wrapper(dtype: torch.dtype, qkv_bias: bool) -> None:
    torch.manual_seed(6)
    wrapper = MultiHeadAttentionWrapper(D_IN, D_OUT // HEADS, T, 0.0, HEADS, qkv_bias).to(dtype)
    multi_head = same_weights.wrapper_to_multi_head(wrapper)
    assert_same_function(multi_head, wrapper, tokens(dtype, 2, T, D_IN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("length", [1, T])
def test_packed_equals_multi_head(dtype: torch.dtype, qkv_bias: bool, length: int) -> None:
    multi_head = random_multi_head(dtype, qkv_bias)
    packed = same_weights.multi_head_to_packed(multi_head)
    assert_same_function(packed, multi_head, tokens(dtype, 2, length, D_IN))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fused", [SDPAMultiHeadAttention, KernelMultiHeadAttention])
def test_fused_equals_packed(dtype: torch.dtype, fused: type[PackedMultiHeadAttention]) -> None:
    packed = same_weights.multi_head_to_packed(random_multi_head(dtype))
    assert_same_function(same_weights.packed_to(fused, packed), packed, tokens(dtype, 2, T, D_IN))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_op_is_selectable(impl: str) -> None:
    torch.manual_seed(7)
    ours = KernelMultiHeadAttention(D_IN, D_OUT, T, 0.0, HEADS, impl=impl)
    sdpa = SDPAMultiHeadAttention(D_IN, D_OUT, T, 0.0, HEADS)
    sdpa.load_state_dict(ours.state_dict())
    assert_same_function(ours, sdpa, tokens(torch.float32, 2, T, D_IN))


def test_triton_equals_packed() -> None:
    # without a GPU the kernels are interpreted
    device = "cpu" if INTERPRETED else "cuda"
    torch.manual_seed(8)
    packed = PackedMultiHeadAttention(64, 64, 40, 0.0, 2).to(device)
    ours = KernelMultiHeadAttention(64, 64, 40, 0.0, 2, impl="triton").to(device)
    ours.load_state_dict(packed.state_dict())
    x = torch.randn(2, 33, 64, device=device)
    # on a GPU, fp32 products run on tensor cores in TF32
    tolerance = 1e-5 if INTERPRETED else 5e-3
    torch.testing.assert_close(ours(x), packed(x), rtol=tolerance, atol=tolerance)


def test_all_rungs_share_their_weights() -> None:
    torch.manual_seed(9)
    x = tokens(torch.float64, 2, T, D_OUT)
    v1, v2, causal, wrapper, *multi = [r.double() for r in attention_rungs(D_OUT, T, HEADS)]
    assert_same(v2(x), v1(x))
    assert_same(causal(x)[:, -1], v2(x)[:, -1])
    for rung in multi:
        assert_same(rung(x), wrapper(x))
    assert len(multi) == 4


CAUSAL: list[type[nn.Module]] = [
    MultiHeadAttention,
    PackedMultiHeadAttention,
    SDPAMultiHeadAttention,
    KernelMultiHeadAttention,
]


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_changed_token_changes_nothing_before_it(kind: type[nn.Module]) -> None:
    module = kind(D_IN, D_OUT, T, 0.0, HEADS)
    x = tokens(torch.float32, 1, T, D_IN)
    changed = x.clone()
    changed[:, 6] += 1.0
    before, after = module(x), module(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("kind", CAUSAL)
def test_dropout_only_while_training(kind: type[nn.Module]) -> None:
    torch.manual_seed(10)
    module = kind(D_IN, D_OUT, T, 0.5, HEADS)
    x = tokens(torch.float32, 1, T, D_IN)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_dropout_scales_what_it_keeps() -> None:
    torch.manual_seed(11)
    causal = CausalAttention(3, 3, 400, 0.25)
    nn.init.zeros_(causal.W_query.weight)
    # queries of zero attend evenly: the last row is the mean of the values, on average
    x = torch.ones(400, 3)
    torch.testing.assert_close(causal(x)[-1], causal.W_value(x)[-1], rtol=0.15, atol=0)


def test_weights_are_what_forward_uses() -> None:
    multi_head = random_multi_head(torch.float64)
    x = tokens(torch.float64, 2, T, D_IN)
    weights = multi_head.weights(x)
    assert weights.shape == (2, HEADS, T, T)
    assert_same(weights.sum(-1), torch.ones(2, HEADS, T, dtype=torch.float64))
    assert weights.triu(1).count_nonzero() == 0
    v = multi_head.W_value(x).view(2, T, HEADS, -1).transpose(1, 2)
    assert_same(multi_head.out_proj((weights @ v).transpose(1, 2).flatten(2)), multi_head(x))


def test_mistakes() -> None:
    x = tokens(torch.float32, 1, T, D_IN)
    for kind in CAUSAL:
        with pytest.raises(UserError, match="d_out must be a multiple of num_heads, got 12, 5"):
            kind(D_IN, D_OUT, T, 0.0, 5)
        with pytest.raises(UserError, match="13 tokens, but context_length is 12"):
            kind(D_IN, D_OUT, T - 1, 0.0, HEADS)(x)
    with pytest.raises(UserError, match="13 tokens, but context_length is 12"):
        CausalAttention(D_IN, D_OUT, T - 1, 0.0)(x)


def test_the_published_numbers() -> None:
    x = published.JOURNEY
    batch = torch.stack([x, x])

    def assert_printed(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=6e-5)

    assert_printed(simple_attention(x), published.SIMPLE_ATTENTION)
    torch.manual_seed(123)
    assert_printed(SelfAttentionV1(3, 2)(x), published.SELF_ATTENTION_V1)
    torch.manual_seed(789)
    assert_printed(SelfAttentionV2(3, 2)(x), published.SELF_ATTENTION_V2)
    torch.manual_seed(123)
    assert_printed(CausalAttention(3, 2, 6, 0.0)(batch)[1], published.WRAPPER[:, :2])
    torch.manual_seed(123)
    assert_printed(MultiHeadAttentionWrapper(3, 2, 6, 0.0, 2)(batch)[1], published.WRAPPER)
    torch.manual_seed(123)
    assert_printed(MultiHeadAttention(3, 2, 6, 0.0, 2)(batch)[1], published.MULTI_HEAD)
