"""GPT: embeddings, blocks, final LayerNorm, tied head, loss.

OpenAI's graph exactly (Radford et al., "Language Models are Unsupervised Multitask Learners",
2019): learned positions, pre-LayerNorm, tanh GELU, head tied to the token embedding. The surface
is nanoGPT's, so programs written for its ``model.py`` run on this class; state-dict keys are those
of nanoGPT and Hugging Face. Shapes: B batch, T tokens, C width, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt2.cache import KVCache
from fastgpt2.config import GPTConfig
from fastgpt2.devices import peak_flops
from fastgpt2.errors import UserError
from fastgpt2.kernels import cross_entropy, linear_cross_entropy, tied_embedding
from fastgpt2.layers import Block, normalize, project
from fastgpt2.plain import is_plain
from fastgpt2.tied_head import add_padding, cut_padding, tie

# nanoGPT ignores targets of -1, Hugging Face those of -100
_NANOGPT_IGNORE, _IGNORE = -1, -100


class Embedded(NamedTuple):
    """The embeddings of some tokens.

    Attributes:
        x: (B, T, C), the residual stream before the first block.
        head: (V, C), the token embedding for the head that is tied to it: the gradient of the
            embedding is added in place to the one that the head computes.
    """

    x: Tensor
    head: Tensor


class Transformer(nn.Module):
    """Everything before the head: token and position embeddings, blocks, final LayerNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.dropout_p = config.embd_p
        self.fp32_residual = config.fp32_residual
        self.impl = config.impl

    def forward(
        self, idx: Tensor, dtype: torch.dtype | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """(B, T) token ids -> (B, T, C) in ``dtype``, what the head reads.

        Args:
            idx: (B, T), token ids.
            dtype: what the blocks compute in; None is the token embedding's.
            cache: for generation; its lengths are the positions.
        """
        dtype = self.wte.weight.dtype if dtype is None else dtype
        return self.run_blocks(self.embed(idx, dtype, cache).x, dtype, cache)

    def embed(self, idx: Tensor, dtype: torch.dtype, cache: KVCache | None = None) -> Embedded:
        """(B, T) token ids -> the sum of their two embeddings, after its dropout."""
        has_past = cache is not None and not cache.is_empty
        positions = None
        if cache is not None and has_past:
            new = torch.arange(idx.shape[1], device=idx.device)
            # padding after a row's own tokens may stand past the last position
            positions = (cache.lengths[:, None] + new).clamp(max=self.wpe.num_embeddings - 1)
        dropout_p = self.dropout_p if self.training else 0.0
        stream_dtype = torch.float32 if self.fp32_residual else dtype
        if is_plain(self.wte, nn.Embedding) and is_plain(self.wpe, nn.Embedding):
            return Embedded(
                *tied_embedding(
                    idx,
                    self.wte.weight,
                    self.wpe.weight,
                    positions=positions,
                    dropout_p=dropout_p,
                    dtype=stream_dtype,
                    impl=self.impl,
                )
            )
        if positions is None:
            positions = torch.arange(idx.shape[1], device=idx.device)
        x = F.dropout(self.wte(idx) + self.wpe(positions), dropout_p)
        return Embedded(x.to(stream_dtype), self.wte.weight)

    def run_blocks(self, x: Tensor, dtype: torch.dtype, cache: KVCache | None = None) -> Tensor:
        """(B, T, C), the residual stream -> (B, T, C) in ``dtype``, after the final LayerNorm."""
        for i, block in enumerate(self.h):
            x = block(x, dtype, None if cache is None else cache.layers[i])
        return normalize(self.ln_f, x, dtype, impl=self.impl)


class GPT(nn.Module):
    """A GPT-2 language model.

    >>> model = GPT(GPTConfig.preset("gpt2-nano", vocab_size=65))
    >>> logits, loss = model(idx, targets)   # in training mode logits is None: the fused loss
    >>> logits, _ = model(idx)               # the last position's, (B, 1, V)
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.tie_weights()
        self._init_weights()
        self.register_state_dict_post_hook(cut_padding)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(add_padding)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(tie)  # type: ignore[no-untyped-call]

    def tie_weights(self) -> None:
        """The head is the token embedding: one parameter under two names."""
        self.lm_head.weight = self.transformer.wte.weight

    def _init_weights(self) -> None:
        # GPT-2's: normal of 0.02, residual projections shrunk by the number of additions
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, mean=0.0, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, *, fused_loss: bool | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss.

        Args:
            idx: (B, T) token ids, T <= block_size.
            targets: (B, T) token ids; -1 and -100 are ignored.
            fused_loss: compute the loss without the full logits; None is ``self.training``.

        Returns:
            Without targets: the last position's logits (B, 1, V), and None.
            With targets: None if fused, else the logits (B, T, V); the mean loss in nats, fp32.

        Raises:
            ValueError: the sequence is longer than block_size, or shapes do not match.
        """
        fused = self.training if fused_loss is None else fused_loss
        if targets is None:
            return self.head(self.hidden_states(idx)[:, -1:]), None
        targets = targets.masked_fill(targets == _NANOGPT_IGNORE, _IGNORE)
        if fused and is_plain(self.lm_head, nn.Linear) and not _has_bias(self.lm_head):
            return None, self._fused_loss(idx, targets)
        logits = self.logits(idx)
        loss = cross_entropy(logits, targets, impl=self.config.impl)
        return None if fused else logits, loss

    def _fused_loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        transformer, head = self.transformer, self.lm_head.weight
        if head is transformer.wte.weight and is_plain(transformer, Transformer):
            dtype = self._check_tokens(idx)
            with _no_autocast(idx):
                x, head = transformer.embed(idx, dtype)
                hidden = transformer.run_blocks(x, dtype)
        else:
            hidden = self.hidden_states(idx)
        with _no_autocast(hidden):
            return linear_cross_entropy(
                hidden,
                head,
                targets,
                vocab_size=self.config.vocab_size,
                fp8=self.config.fp8 and self.training,
                impl=self.config.impl,
            )

    def logits(self, idx: Tensor) -> Tensor:
        """(B, T) token ids -> the logits of every position, (B, T, V)."""
        return self.head(self.hidden_states(idx))

    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids -> what the head reads, (B, T, C) in the compute dtype.

        The compute dtype is autocast's where autocast is on, else that of the parameters. With a
        cache, ``idx`` is a prompt for an empty one, or one new token a row; the caller advances it.
        """
        dtype = self._check_tokens(idx)
        with _no_autocast(idx):
            hidden: Tensor = self.transformer(idx, dtype, cache)
        return hidden

    def _check_tokens(self, idx: Tensor) -> torch.dtype:
        """The compute dtype for these tokens."""
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: {idx.shape[1]} tokens, but block_size is {self.config.block_size}"
            )
        return _compute_dtype(self.transformer.wte.weight)

    def head(self, hidden: Tensor) -> Tensor:
        """What ``hidden_states`` gives, (..., C) -> the logits, (..., V)."""
        with _no_autocast(hidden):
            logits = project(self.lm_head, hidden)
        return logits[..., : self.config.vocab_size]

    def make_cache(self, batch_size: int, size: int) -> KVCache:
        """An empty cache in the compute dtype: ``batch_size`` rows of ``size`` tokens."""
        weight = self.transformer.wte.weight
        return KVCache(self.config, batch_size, size, weight.device, _compute_dtype(weight))

    def generate(
        self,
        idx: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """Append sampled tokens to ``idx``: (B, T) -> (B, T + max_new_tokens), as nanoGPT does.

        Each row becomes what it would be alone, whatever the lengths of the others.

        Args:
            idx: (B, T) token ids; or a list of lists of ids, which gives a list of lists.
            max_new_tokens: the most that follow each row.
            temperature: below 1 sharper, above 1 flatter; 0 is greedy.
            top_k: draw from the k most likely tokens only.
            generator: source of randomness; None is PyTorch's default one. The rows of a tensor
                share it, as in nanoGPT; those of a list have one each, seeded from it.
            options: by name:
                ``processors``, callables ``(ids, logits) -> logits`` (see ``fastgpt2.generate``);
                ``stop``, an id or several that end a row and are not part of it (a tensor's rows
                are filled up with the first of them);
                ``seed``, of every row's own random numbers, in place of ``generator``: the same
                seed gives a prompt the same text in whatever batch;
                ``attention_mask`` (B, T), 0 for padding at the left or at the right;
                ``window``, past block_size: ``crop`` (nanoGPT's way: every token sees the last
                block_size, recomputed), ``slide`` (go on with the last half) or ``stop``;
                ``num_beams``, ``length_penalty``, ``early_stopping``: beam search;
                ``draft``, a smaller model that proposes tokens, or ``prompt_lookup``, how many to
                propose from the text itself: the same greedy tokens, the same distribution.

        Returns:
            A tensor for a tensor, with as many new columns as the longest row has new tokens; a
            list of lists for lists.

        Raises:
            UserError: an argument is out of its range, or a prompt is empty.
        """
        from fastgpt2.generate.batch import generate

        draws = {"temperature": temperature, "top_k": top_k, "generator": generator}
        return generate(self, idx, max_new_tokens, **draws, **options)

    def log_probs(self, ids: Tensor | Sequence[Sequence[int]]) -> Any:
        """log p(token | the tokens before it) of every token but the first, in nats.

        Texts longer than block_size are read in windows that overlap by half. Log-softmax is in
        fp32; no gradient.

        Args:
            ids: (B, T) token ids, or a list of lists of ids.

        Returns:
            (B, T - 1) fp32, or a list of lists of floats; a text's total is their sum.

        Raises:
            UserError: a text is empty, or an id is not in the vocabulary.
        """
        from fastgpt2.generate.batch import log_probs

        return log_probs(self, ids)

    @torch.no_grad()
    def next_logits(
        self, idx: Tensor, cache: KVCache | None, room: int
    ) -> tuple[Tensor, KVCache | None]:
        """Logits of the token after ``idx`` (B, V), and the cache to hand in with the next call.

        Call it with None first, then, each time with ``idx`` one token longer, with what it gave.
        ``room`` bounds the tokens still to come; at most block_size are ever cached.
        """
        T, block_size = idx.shape[1], self.config.block_size
        if T > block_size:
            return self.head(self.hidden_states(idx[:, -block_size:])[:, -1]), None
        if cache is None:
            size = min(block_size, T + room)
            cache = self.make_cache(idx.shape[0], size)
            hidden = self.hidden_states(idx, cache)
            cache.advance(T)
        else:
            hidden = self.hidden_states(idx[:, -1:], cache)
            cache.advance(1)
        return self.head(hidden[:, -1]), cache

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, padding not counted; without the positions unless asked for."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        count = sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd
        return count - self.transformer.wpe.weight.numel() * non_embedding

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context: drop the positions behind ``block_size``."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"crop_block_size: must be in [1, {self.config.block_size}], got {block_size}"
            )
        self.config = replace(self.config, block_size=block_size)
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = block_size

    def configure_optimizers(
        self,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        device_type: str,
    ) -> torch.optim.AdamW:
        """Fused AdamW; matrices (embeddings too, the tied one once) decay, vectors do not."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_type in ("cuda", "cpu")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self, T: int | None = None) -> int:
        """Training FLOPs a token: 6 N + 12 L C T (Chowdhery et al., "PaLM", 2022, appendix B).

        N leaves the positions out; attention is counted in full, as nanoGPT does, though half of
        it is masked away.
        """
        config = self.config
        T = config.block_size if T is None else T
        return 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * T

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Model FLOPs utilisation of ``fwdbwd_per_iter`` sequences in ``dt`` seconds, 0 to 1.

        Of the data-sheet peak of the device that holds the model; NaN where that is not known.
        """
        peak = peak_flops(self.lm_head.weight.device)
        if peak is None:
            return math.nan
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    @classmethod
    def from_pretrained(
        cls, model_type: str, override_args: Mapping[str, Any] | None = None
    ) -> Self:
        """A model with weights from a release's name, a folder or a file, in any known format.

        Args:
            model_type: ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, or a path.
            override_args: fields of ``GPTConfig`` that do not change the weights, such as dropout.
        """
        from fastgpt2.weights import load_pretrained

        config, tensors = load_pretrained(model_type)
        shape_fields = {"vocab_size", "n_layer", "n_head", "n_embd", "block_size", "bias"}
        fixed = shape_fields & set(override_args or {})
        if fixed:
            raise UserError(f"from_pretrained: the weights fix {', '.join(sorted(fixed))}")
        # no memory and no time for an initialisation that is overwritten at once
        with torch.device("meta"):
            model = cls(replace(config, **(override_args or {})))
        model.load_state_dict(dict(tensors), assign=True)
        return model


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device_type = weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _has_bias(layer: nn.Module) -> bool:
    return layer._parameters["bias"] is not None


def _no_autocast(x: Tensor) -> torch.autocast:
    """Every dtype is explicit in here: autocast's own casts would only add to them."""
    return torch.autocast(x.device.type, enabled=False)
