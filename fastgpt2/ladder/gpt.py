"""Rung 10: the whole model, first with placeholders where the blocks belong."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastgpt2.errors import UserError
from fastgpt2.ladder.block import LayerNorm, TransformerBlock
from fastgpt2.ladder.embeddings import add_positions

GPT_CONFIG_124M: dict[str, Any] = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


class DummyGPTModel(nn.Module):
    """Embeddings and head of a GPT with nothing between them: shapes are right, words are not.

    Args:
        cfg: ``vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias``.

    Raises:
        UserError: a key is missing.
    """

    def __init__(self, cfg: Mapping[str, Any]) -> None:
        super().__init__()
        missing = [key for key in GPT_CONFIG_124M if key not in cfg]
        if missing:
            raise UserError(f"{type(self).__name__}: the configuration lacks {', '.join(missing)}")
        self.cfg = dict(cfg)
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*(self._block() for _ in range(cfg["n_layers"])))
        self.final_norm = self._norm()
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def _block(self) -> nn.Module:
        return nn.Identity()

    def _norm(self) -> nn.Module:
        return nn.Identity()

    def forward(self, in_idx: Tensor) -> Tensor:
        """(B, T) token ids -> logits (B, T, V)."""
        x = self.drop_emb(add_positions(self.tok_emb(in_idx), self.pos_emb))
        logits: Tensor = self.out_head(self.final_norm(self.trf_blocks(x)))
        return logits


class GPTModel(DummyGPTModel):
    """GPT-2: the placeholders filled in.

    The head ``out_head`` has a matrix of its own; OpenAI's GPT-2 uses the token embedding's
    (``model.out_head.weight = model.tok_emb.weight`` ties them, which saves V * C parameters).
    """

    def _block(self) -> nn.Module:
        return TransformerBlock(self.cfg)

    def _norm(self) -> nn.Module:
        return LayerNorm(self.cfg["emb_dim"])
