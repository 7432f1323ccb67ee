"""The rivals: GPTs that a skilled user of PyTorch would write in an afternoon, and transformers'.

They are the same model as ours, made of ``nn`` modules and ``F.scaled_dot_product_attention``, with
fp32 parameters and autocast's activations. Shapes: B batch, T tokens, C width, H heads, D head
size, V vocabulary.
"""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); with nanoGPT's exact GELU or GPT-2's."""

    def __init__(self, config: GPTConfig, *, erf_gelu: bool) -> None:
        super().__init__()
        self.gelu = partial(F.gelu, approximate="none" if erf_gelu else "tanh")
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc1, self.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, C))
        x = x + self.fc2(self.gelu(self.fc1(self.ln_2(x))))
        return x


class PlainGPT(nn.Module):
    """GPT-2 with a padded, tied head, and the mean cross-entropy of its logits.

    ``like_nanogpt`` follows today's nanoGPT where it differs from GPT-2 or from the fastest choice:
    the residual stream stays fp32 under autocast, GELU is exact, and the loss uses the padded
    vocabulary. ``backend`` is SDPA's; None lets PyTorch choose. It is an attribute of the module,
    so that the compiler makes a separate graph for it.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        like_nanogpt: bool = False,
        backend: SDPBackend | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.like_nanogpt = like_nanogpt
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(
            [PlainBlock(config, erf_gelu=like_nanogpt) for _ in range(config.n_layer)]
        )
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.vocab_size = config.vocab_size

    def hidden(self, idx: Tensor) -> Tensor:
        """(B, T) token ids -> the head's input, (B, T, C)."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        if not self.like_nanogpt and torch.is_autocast_enabled(idx.device.type):
            # autocast alone would keep the residual stream in fp32
            x = x.to(torch.get_autocast_dtype(idx.device.type))
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            for block in self.blocks:
                x = block(x)
        out: Tensor = self.ln_f(x)
        return out

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """(B, T) token ids and targets -> the mean loss."""
        logits = F.linear(self.hidden(idx), self.wte.weight)
        if not self.like_nanogpt:
            logits = logits[..., : self.vocab_size]
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def copy_weights(self, model: GPT) -> None:
        """Copy the weights of our model."""
        self.wte.load_state_dict(model.transformer.wte.state_dict())
        self.wpe.load_state_dict(model.transformer.wpe.state_dict())
        _copy(self.ln_f, model.transformer.ln_f)
        for mine, theirs in zip(self.blocks, model.transformer.h, strict=True):
            source: Any = theirs
            for name, module in (
                ("ln_1", source.ln_1),
                ("qkv", source.attn.c_attn),
                ("proj", source.attn.c_proj),
                ("ln_2", source.ln_2),
                ("fc1", source.mlp.c_fc),
                ("fc2", source.mlp.c_proj),
            ):
                _copy(getattr(mine, name), module)


def _copy(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def is_conv1d(name: str) -> bool:
    """Whether transformers stores this weight transposed, as OpenAI does."""
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def transformers_gpt2(model: GPT) -> nn.Module | None:
    """transformers' GPT-2 with the weights of ours; None where transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c = model.config
    rival: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=c.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    tensors = {}
    for name, x in model.state_dict().items():
        tensors[name] = x.t().contiguous() if is_conv1d(name) else x
    rival.load_state_dict(tensors)
    return rival.to(model.lm_head.weight.device)
