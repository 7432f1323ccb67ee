"""A training run's configuration: named config < TOML file < command line, in one dataclass."""

import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from fastgpt2.config import IMPLS, PRESETS, GPTConfig
from fastgpt2.devices import DTYPES
from fastgpt2.errors import UserError
from fastgpt2.lora import TARGETS
from fastgpt2.text.utf8 import is_utf8
from fastgpt2.train.loggers import LOGGERS
from fastgpt2.train.remat import REMATS
from fastgpt2.train.schedules import SCHEDULES, learning_rate
from fastgpt2.train.spikes import ON_SPIKE

# the table of a TOML file with the values for the optimizer Muon
MUON_TABLE = "muon"


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with the text of its command-line flag."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; stored in the run folder and in every checkpoint.

    Raises:
        UserError: a value is out of its range, or no length was given (steps, epochs, minutes).
    """

    data: tuple[str, ...] = _option(
        ("python-docs",),
        "files (text, .jsonl or .ndjson, .parquet; .gz and .zst of the first two), folders, "
        "patterns, names of corpora (python-docs, the-verdict, tinyshakespeare), a folder of token "
        "shards, or token files of llm.c or nanoGPT; NAME:WEIGHT for each makes a mixture",
    )
    text_column: str = _option(
        "text", "key of a JSON line, or column of a Parquet table, with the text"
    )
    tokenizer: str = _option(
        "auto", "how text becomes tokens", choices=("auto", "gpt2", "bytes", "char", "ids")
    )
    vocab_size: int | None = _option(
        None, "number of ids, for token files whose tokenizer is unknown"
    )
    vocab_dir: str | None = _option(None, "folder with GPT-2's encoder.json and vocab.bpe")
    val_fraction: float = _option(0.1, "share of the text, at its end, kept for validation")
    stride: int | None = _option(
        None, "tokens from the start of a block to the next [T, shifted in each epoch]"
    )
    pack: bool = _option(
        False,
        "pack documents into blocks: attention stays within each, positions restart at 0",
    )
    init_from: str | None = _option(
        None,
        "start from these weights: run folder, a folder or file in any format that convert reads, "
        "or gpt2, gpt2-medium, gpt2-large, gpt2-xl; they fix shape and tokenizer",
    )
    init_sha256: str | None = _option(None, "sha256 of --init-from's weights, noted by the run")
    freeze: tuple[str, ...] = _option(
        (),
        "parameters or modules that are not trained, by name, with the shell's * ? [..]: "
        "transformer.wte, 'transformer.h.[0-5].*', '*.ln_?.*'",
    )
    lora_rank: int | None = _option(
        None, "train only adapters of this rank (LoRA); needs --init-from"
    )
    lora_alpha: float | None = _option(None, "adapters are scaled by this / rank [the rank]")
    lora_target: tuple[str, ...] = _option(
        TARGETS, "layers with adapters: c_attn, c_proj, c_fc, or longer: mlp.c_proj"
    )
    lora_dropout: float = _option(0.0, "dropout rate on the input of the adapters")
    model: str = _option("gpt2", "shape of the model", choices=tuple(PRESETS))
    block_size: int | None = _option(None, "context length T in tokens [the model's]")
    n_layer: int | None = _option(None, "number of blocks [the model's]")
    n_head: int | None = _option(None, "attention heads [the model's]")
    n_embd: int | None = _option(None, "width C [the model's]")
    bias: bool | None = _option(None, "biases in linear layers and LayerNorms [yes, as in GPT-2]")
    dropout: float = _option(0.0, "rate of all three dropouts")
    attn_dropout: float | None = _option(None, "rate on attention probabilities [--dropout]")
    embd_dropout: float | None = _option(None, "rate on the embeddings [--dropout]")
    resid_dropout: float | None = _option(
        None, "rate on each addition to the residual stream [--dropout]"
    )
    batch_size: int = _option(12, "sequences per micro-batch; auto: as many as fit")
    auto_batch_size: bool = _option(False, "batch_size is still to be found")
    grad_accum: int = _option(1, "micro-batches per optimizer step and process")
    ranks: int | None = _option(None, "processes that batch_size and grad_accum are meant for")
    steps: int | None = _option(None, "optimizer steps to train")
    epochs: float | None = _option(None, "passes over the training tokens")
    minutes: float | None = _option(None, "stop after this wall time, where the schedule ends too")
    lr: float = _option(6e-4, "peak learning rate")
    min_lr: float | None = _option(None, "learning rate at the end of the schedule [--lr / 10]")
    warmup_steps: int = _option(100, "steps of linear warm-up")
    schedule: str = _option("cosine", "shape of the decay", choices=tuple(SCHEDULES))
    wsd_decay: float = _option(0.2, "schedule wsd decays over this last share of the run")
    optimizer: str = _option(
        "adamw",
        "adamw, or muon: Muon on the matrices of the blocks, AdamW on the rest",
        choices=("adamw", "muon"),
    )
    muon_lr: float = _option(0.02, "Muon's peak learning rate; it has the schedule of --lr")
    muon_momentum: float = _option(0.95, "Muon's momentum")
    muon_warmup_steps: int = _option(300, "steps over which Muon's momentum grows from 0.85")
    muon_weight_decay: float = _option(0.0, "Muon's weight decay, on the blocks' matrices")
    weight_decay: float = _option(0.1, "AdamW's weight decay, on matrices only")
    beta1: float = _option(0.9, "decay of AdamW's first moment")
    beta2: float = _option(0.95, "decay of AdamW's second moment")
    grad_clip: float = _option(1.0, "largest gradient norm; 0: no clipping")
    dtype: str = _option("auto", "compute dtype; weights stay in fp32", choices=DTYPES)
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, ...; mps and xpu are untested")
    impl: str = _option("auto", "implementation of the kernels", choices=IMPLS)
    fp32_residual: bool = _option(False, "keep the residual stream in fp32")
    fp8: bool = _option(
        False,
        "train linear layers and head in FP8: needs bf16, widths that are multiples of 16, and a "
        "GPU with FP8 (Ada, Hopper or later); a CPU emulates it, slowly",
    )
    compile: bool = _option(False, "torch.compile the forward and backward pass")
    remat: str = _option(
        "none",
        "activations that are recomputed in the backward pass instead of kept: of the MLPs, or of "
        "whole blocks",
        choices=REMATS,
    )
    on_spike: str = _option(
        "warn",
        "when a loss is far above the previous ones: print a line, or also go back to the last "
        "checkpoint before it and skip the data since then",
        choices=ON_SPIKE,
    )
    shard: bool = _option(
        False,
        "with several processes, each keeps a part of weights, gradients and moments (FSDP2) "
        "instead of all (DDP)",
    )
    timeout: float = _option(
        1800.0,
        "when a process is stuck for so many seconds, its stack is shown and the job ends with "
        "exit code 75; 0: wait forever",
    )
    seed: int = _option(1337, "seed of initialisation, data order and dropout")
    log_every: int = _option(10, "steps between records in metrics.jsonl")
    log: tuple[str, ...] = _option(
        (), "also show the run in tensorboard, wandb (offline unless WANDB_MODE is set)"
    )
    profile: int = _option(0, "profile so many steps: trace.json and a table of their time")
    eval_every: int = _option(250, "steps between evaluations, each with a sample and a checkpoint")
    keep_last: int = _option(2, "number of newest checkpoints to keep, besides the best")
    sample_tokens: int = _option(100, "tokens of the sample shown at each evaluation")
    sample_prompt: str = _option("\n", "text that the sample continues")

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "eval_every", "log_every", "keep_last"):
            _check(self, name, getattr(self, name) >= 1, "1 or more")
        for name in (
            *("lr", "weight_decay", "warmup_steps", "grad_clip", "sample_tokens", "timeout"),
            *("muon_lr", "muon_weight_decay", "muon_warmup_steps", "profile"),
        ):
            _check(self, name, getattr(self, name) >= 0, "0 or more")
        _check(self, "wsd_decay", 0 < self.wsd_decay <= 1, "in (0, 1]")
        if self.optimizer == "muon":
            _check(self, "lr", self.lr > 0, "greater than 0 with the optimizer muon")
            # the schedule multiplies lr: the other rate is stored as a multiple of it
            share = math.isfinite(self.muon_lr / self.lr)
            _check(self, "muon_lr", share, f"a multiple of lr ({self.lr:g}) that a float can hold")
        self._check_lora()
        if unknown := [name for name in self.loggers if name not in LOGGERS]:
            raise UserError(f"config: log must be of {', '.join(LOGGERS)}, got {unknown[0]!r}")
        for name in ("beta1", "beta2", "muon_momentum"):
            _check(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("vocab_size", "stride", "steps", "epochs", "minutes", "ranks"):
            value = getattr(self, name)
            _check(self, name, value is None or value > 0, "greater than 0")
        if self.min_lr is not None:
            _check(self, "min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to lr ({self.lr:g})")
        _check(self, "val_fraction", 0 < self.val_fraction < 1, "in (0, 1)")
        _check(self, "data", len(self.data) > 0, "at least one file or name")
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")
        for item in fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices:
                _check(self, item.name, value in choices, f"one of {', '.join(choices)}")
            if isinstance(value, int):
                _check(self, item.name, value < 2**63, "below 2^63")
            if isinstance(value, float):
                _check(self, item.name, math.isfinite(value), "finite")
            # a file's name may hold bytes that are not text, which TOML cannot store
            for text in value if isinstance(value, tuple) else (value,):
                _check(self, item.name, not isinstance(text, str) or is_utf8(text), "UTF-8 text")
        _check(self, "epochs", self.epochs is None or self.epochs < 2**63, "below 2^63")
        if self.steps is None and self.epochs is None and self.minutes is None:
            raise UserError("config: give a length of training: steps, epochs or minutes")

    def _check_lora(self) -> None:
        _check(self, "lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        rank, alpha = self.lora_rank, self.lora_alpha
        _check(self, "lora_rank", rank is None or rank >= 1, "1 or more")
        _check(self, "lora_alpha", alpha is None or alpha > 0, "greater than 0")
        asked = alpha is not None or self.lora_dropout or self.lora_target != TARGETS
        if rank is None and asked:
            raise UserError("config: lora_alpha, lora_target and lora_dropout need lora_rank")
        if rank is not None and self.init_from is None:
            raise UserError("config: lora_rank needs init_from: adapters belong to trained weights")
        if rank is not None and self.optimizer == "muon":
            raise UserError("config: adapters are trained by adamw: Muon is for whole matrices")

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Names of the layers with adapters; one string may hold several, with commas."""
        return _split(self.lora_target)

    @property
    def loggers(self) -> tuple[str, ...]:
        """Names of the programs that show the run; one string may hold several, with commas."""
        return _split(self.log)

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The model's shape: the preset with this run's overrides."""
        shape = {
            name: getattr(self, name) for name in ("block_size", "n_layer", "n_head", "n_embd")
        }
        return GPTConfig.preset(
            self.model,
            vocab_size=vocab_size,
            bias=self.bias is not False,
            dropout=self.dropout,
            attn_dropout=self.attn_dropout,
            embd_dropout=self.embd_dropout,
            resid_dropout=self.resid_dropout,
            impl=self.impl,
            fp32_residual=self.fp32_residual,
            fp8=self.fp8,
            **{name: value for name, value in shape.items() if value is not None},
        )

    def split(self, ranks: int) -> tuple[int, int]:
        """Micro-batch size, and micro-batches per step of each of ``ranks`` processes.

        A step has the same sequences for any number of processes that divides them evenly; a
        micro-batch is never larger than ``batch_size``.

        Args:
            ranks: number of processes.

        Raises:
            UserError: the sequences of a step are not a multiple of ``ranks``.
        """
        if self.ranks in (None, ranks):
            return self.batch_size, self.grad_accum
        sequences = self.ranks * self.batch_size * self.grad_accum
        if sequences % ranks:
            raise UserError(
                f"config: the {sequences} sequences of a step cannot be dealt out to {ranks} "
                f"processes; give another number of processes, or --batch-size and --grad-accum"
            )
        own = sequences // ranks
        batch_size = max(size for size in range(1, self.batch_size + 1) if own % size == 0)
        return batch_size, own // batch_size

    @property
    def final_lr(self) -> float:
        """The learning rate at the end of the schedule."""
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def learning_rate(self, step: int, progress: float) -> float:
        """The learning rate of an optimizer step.

        Args:
            step: its number, from 0.
            progress: how much of the run is done after the warm-up, 0 to 1.
        """
        return learning_rate(
            self.schedule,
            step,
            progress,
            lr=self.lr,
            min_lr=self.final_lr,
            warmup_steps=self.warmup_steps,
            wsd_decay=self.wsd_decay,
        )

    def total_steps(
        self, blocks_per_epoch: int, *, step: int = 0, blocks: int = 0, ranks: int = 1
    ) -> int | None:
        """Optimizer steps by ``steps`` or ``epochs``, whichever is fewer; None: by time alone.

        Args:
            blocks_per_epoch: number of blocks in the training tokens.
            step: steps taken so far, perhaps with another batch size.
            blocks: blocks used in those steps.
            ranks: number of processes that share a step's blocks.
        """
        batch_size, grad_accum = self.split(ranks)
        limits = [] if self.steps is None else [self.steps]
        if self.epochs is not None:
            left = max(0.0, self.epochs * blocks_per_epoch - blocks)
            limits.append(step + math.ceil(left / (ranks * batch_size * grad_accum)))
        return min(limits, default=None)

    def to_toml(self) -> str:
        """The configuration as TOML, without the fields that are None."""
        lines = []
        for name, value in asdict(self).items():
            if value is not None:
                # JSON's strings, numbers, booleans and lists are TOML's, except for one character
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{name} = {text}")
        return "\n".join(lines) + "\n"

    @classmethod
    def from_layers(cls, *layers: dict[str, Any]) -> Self:
        """The configuration of ``merge_layers``."""
        return cls(**merge_layers(*layers))


def merge_layers(*layers: dict[str, Any]) -> dict[str, Any]:
    """The values of several configurations; later layers override earlier ones.

    A layer's table ``muon`` applies if any layer chooses that optimizer. If ``batch_size`` is
    ``auto``, the layers before it give the sequences of a step.

    Args:
        layers: what ``read_config`` returns, or flags.
    """
    chosen = [layer["optimizer"] for layer in layers if "optimizer" in layer]
    merged: dict[str, Any] = {}
    for layer in layers:
        auto = layer.get("batch_size") == "auto"
        if "batch_size" in layer:
            merged["auto_batch_size"] = auto
        left_out = (MUON_TABLE, "batch_size") if auto else (MUON_TABLE,)
        merged |= {name: value for name, value in layer.items() if name not in left_out}
        if chosen and chosen[-1] == "muon":
            merged |= layer.get(MUON_TABLE, {})
    return merged


def _check(config: TrainConfig, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise UserError(f"config: {name} must be {expected}, got {getattr(config, name)!r}")


def _split(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Each name once, in order."""
    return tuple(dict.fromkeys(name for text in texts for name in text.replace(",", " ").split()))


def field_types() -> dict[str, tuple[type, bool]]:
    """Each field's plain type, and whether it may be None."""
    result = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        optional = isinstance(hint, types.UnionType)
        plain = typing.get_args(hint)[0] if optional else hint
        result[name] = (typing.get_origin(plain) or plain, optional)
    return result
