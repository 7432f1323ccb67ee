"""GPTConfig, the shape of a GPT-2, and the presets people know by name."""

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Self

from fastgpt2.errors import UserError

# fastgpt2.kernels.linear_fp8 needs widths that are multiples of this
FP8_MULTIPLE = 16
IMPLS = ("auto", "triton", "torch", "reference")
# more blocks would only fill the memory; GPT-2 XL has 48
MAX_LAYERS = 16_384
# forms of fastgpt2.kernels.gelu
GELUS = ("tanh", "erf")

GPT2_VOCAB = 50257
# a vocabulary of at least this size is padded in memory; a smaller head gains nothing from it
PAD_VOCAB_FROM = 4096
# 50257 -> 50304: rows of the head's matmul divide into 128-wide tiles and 16-byte loads
PAD_VOCAB_MULTIPLE = 128


def padded(vocab_size: int) -> int:
    """Rows that a vocabulary of ``vocab_size`` ids has in memory, and in some programs' files."""
    if vocab_size < PAD_VOCAB_FROM:
        return vocab_size
    return -(-vocab_size // PAD_VOCAB_MULTIPLE) * PAD_VOCAB_MULTIPLE


def unknown_key(key: str, known: list[str], where: str) -> UserError:
    """The error for a misspelt key, naming the nearest known one."""
    near = get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
    return UserError(f"{where}: unknown key {key!r:.80}{hint}")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT-2, frozen and validated.

    The first seven fields are nanoGPT's, with its defaults (a vocabulary padded to 50304; GPT-2's
    own, and that of the presets, is 50257). ``dropout`` is the rate of all three dropouts of GPT-2;
    ``attn_dropout``, ``embd_dropout`` and ``resid_dropout`` override it one by one. ``impl``
    chooses the kernels (see ``fastgpt2.kernels.use_impl``), ``fp32_residual`` keeps the residual
    stream in fp32 when the model computes in bf16 or fp16 (default: compute dtype), ``fp8`` makes
    the products of the linear layers and the head run in FP8 in training mode. ``pad_vocab`` rounds
    the rows of a vocabulary of 4096 or more up in memory (50257 -> 50304): ``named_parameters``
    shows the padded rows, the state dict does not; llm.c's ``write_model`` and a device map of
    accelerate need them equal: ``pad_vocab=False``. ``gelu`` is the form of the activation, part of
    the function that the weights were trained for: ``tanh`` is OpenAI's, ``erf`` nanoGPT's.

    Raises:
        UserError: a field is out of its range, with its name, its value and what was expected.
    """

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    attn_dropout: float | None = None
    embd_dropout: float | None = None
    resid_dropout: float | None = None
    impl: str = "auto"
    fp32_residual: bool = False
    fp8: bool = False
    pad_vocab: bool = True
    gelu: str = "tanh"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.n_layer > MAX_LAYERS:
            raise UserError(
                f"GPTConfig: n_layer must be at most {MAX_LAYERS:,}, got {self.n_layer}"
            )
        if self.n_embd % self.n_head:
            raise UserError(
                f"GPTConfig: n_embd must be a multiple of n_head, "
                f"got {self.n_embd} and {self.n_head}"
            )
        for name in ("dropout", "attn_dropout", "embd_dropout", "resid_dropout"):
            value = getattr(self, name)
            if value is None and name != "dropout":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise UserError(f"GPTConfig: {name} must be in [0, 1), got {value!r}")
        for name in ("bias", "fp32_residual", "fp8", "pad_vocab"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(
                    f"GPTConfig: {name} must be True or False, got {getattr(self, name)!r}"
                )
        if self.impl not in IMPLS:
            raise UserError(f"GPTConfig: impl must be one of {', '.join(IMPLS)}, got {self.impl!r}")
        if self.gelu not in GELUS:
            raise UserError(f"GPTConfig: gelu must be one of {', '.join(GELUS)}, got {self.gelu!r}")
        if self.fp8 and self.n_embd % FP8_MULTIPLE:
            raise UserError(
                f"GPTConfig: fp8 wants n_embd to be a multiple of {FP8_MULTIPLE}, got {self.n_embd}"
            )
        if self.fp8 and self.impl == "reference":
            raise UserError("GPTConfig: fp8 has no reference implementation")

    @property
    def head_size(self) -> int:
        """D, the width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding in memory; saved files hold ``vocab_size`` rows."""
        return padded(self.vocab_size) if self.pad_vocab else self.vocab_size

    @property
    def attn_p(self) -> float:
        """Dropout rate of the attention probabilities."""
        return self.dropout if self.attn_dropout is None else self.attn_dropout

    @property
    def embd_p(self) -> float:
        """Dropout rate of the embeddings' sum."""
        return self.dropout if self.embd_dropout is None else self.embd_dropout

    @property
    def resid_p(self) -> float:
        """Dropout rate of each branch before it joins the residual stream."""
        return self.dropout if self.resid_dropout is None else self.resid_dropout

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Self:
        """The configuration known as ``name`` (see ``PRESETS``), with fields replaced."""
        if name not in PRESETS:
            raise unknown_key(name, list(PRESETS), "model preset")
        known = [field.name for field in fields(cls)]
        for key in overrides:
            if key not in known:
                raise unknown_key(key, known, "GPTConfig")
        return replace(cls(vocab_size=GPT2_VOCAB, **PRESETS[name]), **overrides)


# sizes of the four releases: OpenAI's hparams.json; the small ones are ours, for CPUs
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
    "gpt2-mini": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "gpt2-micro": dict(n_layer=4, n_head=4, n_embd=256, block_size=256),
    "gpt2-nano": dict(n_layer=4, n_head=4, n_embd=128, block_size=64),
}
