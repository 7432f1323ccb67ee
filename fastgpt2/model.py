"""GPT: embeddings, blocks, final LayerNorm, tied head, loss.

OpenAI's graph exactly (Radford et al., "Language Models are Unsupervised Multitask Learners",
2019): learned positions, pre-LayerNorm, GELU, head tied to the token embedding. The surface
is nanoGPT's, so programs written for its ``model.py`` run on this class; state-dict keys are those
of nanoGPT and Hugging Face. Shapes: B batch, T tokens, C width, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastgpt2.cache import KVCache
from fastgpt2.config import GPTConfig
from fastgpt2.devices import device_kind, peak_flops
from fastgpt2.errors import UserError
from fastgpt2.explanation import explain_gpt
from fastgpt2.generative import Generative
from fastgpt2.kernels import cross_entropy, linear_cross_entropy
from fastgpt2.layers import project
from fastgpt2.lora import LoRASettings
from fastgpt2.plain import execution_device, is_plain
from fastgpt2.precision import compute_dtype, no_autocast
from fastgpt2.quantize import Quantizable
from fastgpt2.state_dict import head_is_tied, register_hooks
from fastgpt2.transformer import Transformer

# nanoGPT ignores targets of -1, Hugging Face those of -100
_NANOGPT_IGNORE, _IGNORE = -1, -100


class GPT(Quantizable, Generative):
    """A GPT-2 language model.

    >>> model = GPT(GPTConfig.preset("gpt2-nano", vocab_size=65))
    >>> logits, loss = model(idx, targets)   # in training mode logits is None: the fused loss
    >>> logits, _ = model(idx)               # the last position's, (B, 1, V)
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.lora: LoRASettings | None = None
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.tie_weights()
        self._init_weights()
        self._loads_strictly = True
        register_hooks(self)

    def tie_weights(self) -> None:
        """The head is the token embedding: one parameter under two names."""
        self.lm_head.weight = self.transformer.wte.weight

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Any module's ``state_dict``, ``strict``, ``assign``; a tied head needs only one name."""
        # PyTorch does not pass ``strict`` to its hooks
        self._loads_strictly = strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self._loads_strictly = True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # some conversions, like to_empty, make a parameter for each of the two names
        tied = head_is_tied(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if tied:
            self.tie_weights()
        return self

    def _init_weights(self) -> None:
        if self.transformer.wte.weight.is_meta:
            return
        # as in GPT-2: a standard deviation of 0.02, smaller for the residual projections
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
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        fused_loss: bool | None = None,
        segment_ids: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and loss.

        Args:
            idx: (B, T) token ids, T <= block_size.
            targets: (B, T) token ids; -1 and -100 are ignored.
            fused_loss: compute the loss without the full logits; None means ``self.training``.
            segment_ids: (B, T) integers, the document of each token, for rows with several
                documents: attention stays within a document, and positions begin at 0 in each. The
                caller must mask the target of a document's last token, which is in the next one.

        Returns:
            Without targets: the last position's logits (B, 1, V), and None.
            With targets: None if fused, else the logits (B, T, V); the mean loss in nats, fp32.

        Raises:
            ValueError: the sequence is longer than block_size, or shapes do not match.
        """
        fused = self.training if fused_loss is None else fused_loss
        if targets is None:
            return self.head(self.hidden_states(idx, segment_ids=segment_ids)[:, -1:]), None
        targets = targets.masked_fill(targets == _NANOGPT_IGNORE, _IGNORE)
        if fused and is_plain(self.lm_head, nn.Linear) and self.lm_head._parameters["bias"] is None:
            return None, self._fused_loss(idx, targets, segment_ids)
        logits = self.head(self.hidden_states(idx, segment_ids=segment_ids))
        loss = cross_entropy(logits, targets, impl=self.config.impl)
        return None if fused else logits, loss

    def _fused_loss(self, idx: Tensor, targets: Tensor, segment_ids: Tensor | None) -> Tensor:
        transformer, head = self.transformer, self.lm_head.weight
        plain = is_plain(transformer, Transformer) and transformer.has_plain_embeddings
        if plain and head_is_tied(self):
            dtype = self._check_tokens(idx)
            with no_autocast(idx):
                x, head = transformer.embed(idx, dtype, segment_ids)
                hidden = transformer.run_blocks(x, dtype, segment_ids=segment_ids)
        else:
            hidden = self.hidden_states(idx, segment_ids=segment_ids)
        with no_autocast(hidden):
            return linear_cross_entropy(
                hidden,
                head,
                targets,
                vocab_size=self.config.vocab_size,
                fp8=self.config.fp8 and self.training,
                impl=self.config.impl,
            )

    def logits(self, idx: Tensor) -> Tensor:
        """Token ids ``idx`` (B, T) -> the logits of every position, (B, T, V)."""
        return self.head(self.hidden_states(idx))

    def hidden_states(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        segment_ids: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """(B, T) token ids -> what the head reads, (B, T, C) in the compute dtype.

        The compute dtype is autocast's where autocast is on, else that of the parameters. With an
        empty cache ``idx`` is a prompt, else one new token per row; the caller advances the cache.
        ``segment_ids`` are those of ``forward``. With ``wanted`` (B,), which needs a cache and
        a plain model, only that token of each row is computed to the end: (B, 1, C).
        """
        dtype = self._check_tokens(idx)
        given = {"segment_ids": segment_ids, "wanted": wanted}
        with no_autocast(idx):
            # a replaced transformer need not know what is not given
            given = {name: x for name, x in given.items() if x is not None}
            hidden: Tensor = self.transformer(idx, dtype, cache, **given)
        return hidden

    def _check_tokens(self, idx: Tensor) -> torch.dtype:
        """The compute dtype for these tokens."""
        if idx.dim() != 2:
            raise ValueError(f"GPT: idx must be (B, T), got shape {tuple(idx.shape)}")
        if idx.shape[1] > self.config.block_size:
            raise ValueError(
                f"GPT: {idx.shape[1]} tokens, but block_size is {self.config.block_size}"
            )
        return compute_dtype(self.transformer.wpe.weight, idx.device)

    def head(self, hidden: Tensor) -> Tensor:
        """The result of ``hidden_states``, (..., C) -> the logits, (..., V)."""
        with no_autocast(hidden):
            logits = project(self.lm_head, hidden)
        return logits[..., : self.config.vocab_size]

    def make_cache(self, batch_size: int, size: int) -> KVCache:
        """An empty cache in the compute dtype: ``batch_size`` rows of ``size`` tokens."""
        weight = self.transformer.wpe.weight
        device = execution_device(self.transformer.wpe)
        return KVCache(self.config, batch_size, size, device, compute_dtype(weight, device))

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters without padding; ``non_embedding`` leaves the positions out."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        count = sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd
        return count - self.transformer.wpe.weight.numel() * non_embedding

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context: drop the positions beyond ``block_size``."""
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
        """Fused AdamW; matrices (embeddings too, the tied one once) decay, vectors do not.

        Args:
            weight_decay: decay of the matrices, per step and unit of learning rate.
            learning_rate: rate of all parameters.
            betas: decay rates of the two moments.
            device_type: ``cpu`` and ``cuda`` have a fused step.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = device_kind(device_type).fused_adamw
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self, T: int | None = None) -> int:
        """Training FLOPs per token: 6 N + 12 L C T (Chowdhery et al., "PaLM", 2022, appendix B).

        The 6 N are 2 N for the forward pass, 2 N for the gradients of activations, and 2 for the
        gradient of each trained parameter: frozen ones (``--freeze``, LoRA's base) have none. N
        excludes the positions. Attention is counted in full, as in nanoGPT, though half of it is
        masked.

        Args:
            T: tokens per sequence; None means block_size.
        """
        T = self.config.block_size if T is None else T
        N, wpe = self.get_num_params(), self.transformer.wpe.weight
        frozen = sum(p.numel() for p in self.parameters() if not p.requires_grad and p is not wpe)
        if not self.transformer.wte.weight.requires_grad:
            # N excludes the head's padding
            frozen -= (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return 6 * N - 2 * frozen + 12 * self.config.n_layer * self.config.n_embd * T

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Model FLOPs utilisation of ``fwdbwd_per_iter`` sequences in ``dt`` seconds, 0 to 1.

        It is relative to the data-sheet peak of the model's device; NaN where that is not known.
        """
        peak = peak_flops(self.lm_head.weight.device) or math.nan
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / dt / peak

    def explain(self) -> str:
        """Which kernels run, which modules are called instead, and why: one line each."""
        return explain_gpt(self)

    def save_pretrained(self, save_directory: str | Path, *, format: str = "fastgpt2") -> None:
        """Write the model into a new folder, which ``from_pretrained`` reads.

        A quantized model stays so in the format ``fastgpt2``; other formats get the weights that
        its integers stand for.

        Args:
            save_directory: a folder that does not exist yet or is empty.
            format: ``fastgpt2``, which stores every field of the configuration, or another one of
                ``python -m fastgpt2.convert``, such as ``hf`` for Hugging Face's programs.

        Raises:
            UserError: the folder is taken or cannot be written, or the head is not tied.
        """
        from fastgpt2.weights import save_model

        if not head_is_tied(self):
            raise UserError("save_pretrained: the head is not tied; save its state_dict instead")
        if self.lora is not None:
            raise UserError("save_pretrained: the model has adapters; merge_lora or save_adapter")
        save_model(self.config, self.state_dict(), save_directory, format)

    @classmethod
    def from_pretrained(
        cls, model_type: str | Path, override_args: Mapping[str, Any] | None = None
    ) -> Self:
        """A model with weights from a release's name, a folder or a file, in any known format.

        Args:
            model_type: ``gpt2``, ``gpt2-medium``, ``gpt2-large``, ``gpt2-xl``, or a path.
            override_args: fields of ``GPTConfig`` that the weights do not fix, such as ``gelu``.
        """
        from fastgpt2.weights import load_pretrained

        config, tensors = load_pretrained(model_type)
        shape_fields = {"vocab_size", "n_layer", "n_head", "n_embd", "block_size", "bias"}
        fixed = shape_fields & set(override_args or {})
        if fixed:
            raise UserError(f"from_pretrained: the weights fix {', '.join(sorted(fixed))}")
        # skip an initialisation that would be overwritten at once
        with torch.device("meta"):
            model = cls(replace(config, **(override_args or {})))
        model.load_state_dict(dict(tensors), assign=True)
        kind = getattr(tensors, "quantization", None)
        return model if kind is None else model.quantize(kind)
