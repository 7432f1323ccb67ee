"""Rung 7: the numbers of rung 6, faster: one matmul for q, k and v, then one kernel for the rest.

The (T, T) weights of rung 6 go to memory and come back several times. A fused kernel keeps a tile
of them on the chip and never stores them: Dao et al., "FlashAttention", 2022.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.kernels import attention
from fastgpt2.ladder.multi_head import head_size
from fastgpt2.ladder.self_attention import attend, check_context, future


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T, 3 * d_out) -> q, k, v of (B, H, T, D) each."""
    B, T, width = qkv.shape
    # (B, T, 3 * d_out) -> (B, T, 3, H, D) -> (3, B, H, T, D)
    parts = qkv.view(B, T, 3, num_heads, width // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    q, k, v = parts
    return q, k, v


class PackedMultiHeadAttention(nn.Module):
    """``MultiHeadAttention`` with its three projections packed into one, which reads x once.

    Arguments and errors are those of ``MultiHeadAttention``; ``qkv.weight`` is W_query, W_key and
    W_value stacked, (3 * d_out, d_in).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_size(d_out, num_heads)
        self.context_length = context_length
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_in) -> (B, T, d_out)."""
        check_context(x.shape[1], self.context_length)
        result: Tensor = self.out_proj(self._attention(self.qkv(x)))
        return result

    def _attention(self, qkv: Tensor) -> Tensor:
        """(B, T, 3 * d_out) -> (B, T, d_out), heads side by side."""
        q, k, v = self._heads(qkv)
        hidden = future(qkv.shape[1]).to(qkv.device)
        return attend(q, k, v, hidden, self.dropout).transpose(1, 2).flatten(2)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _split_heads(qkv, self.num_heads)

    @property
    def dropout_p(self) -> float:
        """Rate of the dropout at the moment: 0 when the module is not training."""
        return self.dropout.p if self.training else 0.0


class SDPAMultiHeadAttention(PackedMultiHeadAttention):
    """The same through PyTorch's ``scaled_dot_product_attention``, which picks a fused kernel."""

    def _attention(self, qkv: Tensor) -> Tensor:
        q, k, v = self._heads(qkv)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout_p, is_causal=True)
        return out.transpose(1, 2).flatten(2)


class KernelMultiHeadAttention(PackedMultiHeadAttention):
    """The same through this package's op, which reads q, k and v where the projection left them.

    Args:
        impl: ``auto`` (Triton on a GPU), ``triton``, ``torch`` or ``reference``; the others are
            those of ``MultiHeadAttention``.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        context_length: int,
        dropout: float,
        num_heads: int,
        qkv_bias: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(d_in, d_out, context_length, dropout, num_heads, qkv_bias)
        self.impl = impl

    def _attention(self, qkv: Tensor) -> Tensor:
        return attention(qkv, n_head=self.num_heads, dropout_p=self.dropout_p, impl=self.impl)


class PyTorchMultiHeadAttention(nn.Module):
    """``SDPAMultiHeadAttention`` under the name and with the arguments of the book's bonus code.

    It has no context length: the causal mask is made inside PyTorch's op.

    Args:
        d_in, d_out: width of the tokens before and after.
        num_heads: H; divides d_out.
        dropout: rate of the dropout on the attention weights.
        qkv_bias: whether the packed projection ``qkv`` has a bias; ``proj`` has one.

    Raises:
        UserError: d_out is not a multiple of num_heads.
    """

    def __init__(
        self, d_in: int, d_out: int, num_heads: int, dropout: float = 0.0, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_size(d_out, num_heads)
        self.d_out = d_out
        self.qkv = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.proj = nn.Linear(d_out, d_out)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d_in) -> (B, T, d_out)."""
        q, k, v = _split_heads(self.qkv(x), self.num_heads)
        dropout_p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result
