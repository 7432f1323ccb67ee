"""The training loop: what happens in which order, and nothing else."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastgpt2 import runs
from fastgpt2.devices import (
    autocast,
    peak_flops,
    resolve_device,
    resolve_dtype,
    resolve_kernels,
    rng_states,
    set_rng_states,
)
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.generate.stream import encode_prompt, stream_text
from fastgpt2.model import GPT
from fastgpt2.text import BlockLoader, build_dataset, load_tokenizer, save_tokenizer
from fastgpt2.text.loaders import iter_eval_batches
from fastgpt2.train import checkpoint, summary
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.interrupt import Interrupt, Interrupted
from fastgpt2.train.metrics import MetricsLog, plot
from fastgpt2.train.optimizers import build_optimizer, set_momentum
from fastgpt2.train.schedules import learning_rate, progress
from fastgpt2.train.step import Batch, StepResult, TrainingStep
from fastgpt2.train.validation import Validation, validate

# tokens of an evaluation's batch, at least: without gradients they fit wherever training does
EVAL_TOKENS = 4096


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    tokens: int
    elapsed: float
    train_loss: float
    validation: Validation | None
    best_step: int
    exit_code: int


class Trainer:
    """Trains the model a configuration describes, into a run folder.

    Args:
        config: the run.
        run: its folder; with ``resume``, one that holds a checkpoint to go on from.
        resume: continue; the run then equals one that was never stopped, bit for bit on a CPU
            (where its length is given in steps or epochs).
        notify: shows a line to a person.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        *,
        resume: bool = False,
        notify: Callable[[str], None] = print,
    ) -> None:
        self.config, self.run_folder, self.notify = config, run, notify
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.kernels = resolve_kernels(self.device, self.dtype, config.impl, fp8=config.fp8)
        torch.set_float32_matmul_precision("high")
        folder = runs.latest(run) if resume else None
        self.dataset = build_dataset(
            config.data,
            load_tokenizer(run) if resume else config.tokenizer,
            vocab_dir=config.vocab_dir,
            val_fraction=config.val_fraction,
            notify=notify,
        )
        self.tokenizer = self.dataset.tokenizer
        if config.sample_tokens:
            # for its checks, like those of the validation tokens below: better now than at the
            # first evaluation
            encode_prompt(self.tokenizer, config.sample_prompt, name="sample_prompt")
        self.tokenizer_id = f"{self.tokenizer.name} {self.tokenizer.fingerprint}"
        if folder is not None:
            saved = runs.read_state(folder).get("tokenizer")
            if saved != self.tokenizer_id:
                raise UserError(
                    f"{folder}: saved with tokenizer {saved}, the run's is {self.tokenizer_id}"
                )
        torch.manual_seed(config.seed)
        shape = config.gpt_config(self.tokenizer.vocab_size)
        self.model = (
            GPT(shape) if folder is None else checkpoint.load_model(folder, **asdict(shape))
        )
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, config)
        self.loader = BlockLoader(
            self.dataset.train,
            block_size=shape.block_size,
            batch_size=config.batch_size,
            seed=config.seed,
            stride=config.stride,
            vocab_size=shape.vocab_size,
        )
        if self.dataset.val is not None:
            iter_eval_batches(
                self.dataset.val, shape.block_size, config.batch_size, vocab_size=shape.vocab_size
            )
        self.tokens_per_step = config.grad_accum * config.batch_size * shape.block_size
        self.total_steps = config.total_steps(self.loader.blocks_per_epoch)
        self.interrupt = Interrupt()
        self.training_step = TrainingStep(
            self.model,
            self.optimizer,
            dtype=self.dtype,
            grad_clip=config.grad_clip,
            forward=self._compiled(),
            poll=self.interrupt.poll,
        )
        self.step, self.elapsed = 0, 0.0
        # of the weights as they are after `step`; None where it has not been measured
        self.validation: Validation | None = None
        self.train_loss = math.nan
        # results of the steps since the last record in the log
        self.pending: list[StepResult] = []
        if folder is not None:
            self._restore(folder)
        self._snapshot = self._position()

    def run(self) -> Outcome:
        """Train to the end, or to a signal; either way the run folder is left complete."""
        exit_code = 0
        run = self.run_folder
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_text(run / "config.toml", self.config.to_toml())
            save_tokenizer(self.tokenizer, run)
            log = MetricsLog(run, self.step)
        except OSError as error:
            raise UserError(f"{run}: cannot be written: {error.strerror}") from None
        self._introduce()
        self.model.train()
        try:
            with self.interrupt, self._bar() as bar:
                try:
                    self._loop(log, bar)
                except Interrupted as signal:
                    exit_code = signal.exit_code
                    self._rewind()
                    bar.write(f"stopped by {signal}: saving step {self.step}")
                    self._save()
        finally:
            # of a run that went wrong, too: the curves say how
            plot(run)
        return Outcome(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            elapsed=self.elapsed,
            train_loss=self.train_loss,
            validation=self.validation,
            best_step=int(runs.best(run).name.removeprefix("step_")),
            exit_code=exit_code,
        )

    def _loop(self, log: MetricsLog, bar: "tqdm[Any]") -> None:
        config = self.config
        mark, mark_step = time.perf_counter(), self.step
        started = mark - self.elapsed
        while True:
            if self._evaluation_is_due():
                began = time.perf_counter()
                self._evaluate(log, bar)
                self._save()
                # the speed is that of training alone
                mark += time.perf_counter() - began
            if self._progress() >= 1.0:
                return
            self._snapshot = self._position()
            lr = learning_rate(
                config.schedule,
                self.step,
                self._progress(),
                lr=config.lr,
                min_lr=config.min_lr,
                warmup_steps=config.warmup_steps,
                wsd_decay=config.wsd_decay,
            )
            set_momentum(
                self.optimizer,
                self.step,
                momentum=config.muon_momentum,
                warmup_steps=config.muon_warmup_steps,
            )
            batches: list[Batch] = [next(self.loader) for _ in range(config.grad_accum)]
            self.pending.append(self.training_step(batches, lr))
            self.step += 1
            self.validation = None
            self.elapsed = time.perf_counter() - started
            bar.update(1)
            if self.step % config.log_every == 0 or self.step == 1 or self._progress() >= 1.0:
                grad_norm = self._read()
                now = time.perf_counter()
                speed = (self.step - mark_step) * self.tokens_per_step / (now - mark)
                self._log(log, bar, lr, speed, grad_norm)
                mark, mark_step = now, self.step

    def _evaluation_is_due(self) -> bool:
        """Every ``eval_every`` steps and at the end, if the weights have not been scored yet."""
        if self.step == 0 or self.validation is not None:
            return False
        return self.step % self.config.eval_every == 0 or self._progress() >= 1.0

    def _read(self) -> float:
        """Fetch the results of the last steps from the device, and stop if they went bad.

        Returns the last gradient norm; ``train_loss`` becomes the mean of the losses.
        """
        losses = torch.stack([result.loss for result in self.pending]).tolist()
        norms: list[float] = torch.stack([result.grad_norm for result in self.pending]).tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            self.training_step.check(loss, norm, self.step - len(losses) + i + 1)
        finite = [loss for loss in losses if math.isfinite(loss)]
        self.train_loss = sum(finite) / len(finite) if finite else math.nan
        self.pending.clear()
        return norms[-1]

    def _log(
        self, log: MetricsLog, bar: "tqdm[Any]", lr: float, speed: float, grad_norm: float
    ) -> None:
        peak = peak_flops(self.device)
        mfu = None if peak is None else self.model.flops_per_token() * speed / peak
        log.write(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            train_loss=self.train_loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=speed,
            mfu=mfu,
            elapsed=self.elapsed,
        )
        bar.set_postfix_str(
            f"loss {self.train_loss:.3f}, lr {lr:.1e}, norm {grad_norm:.2f}, "
            f"{summary.human(speed)} tok/s, MFU {'unknown' if mfu is None else f'{mfu:.1%}'}",
            refresh=False,
        )

    def _evaluate(self, log: MetricsLog, bar: "tqdm[Any]") -> None:
        began = time.perf_counter()
        self.validation = validate(
            self.model,
            self.dataset,
            batch_size=max(self.config.batch_size, EVAL_TOKENS // self.model.config.block_size),
            dtype=self.dtype,
            poll=self.interrupt.poll,
        )
        if self.validation is not None:
            result = self.validation
            log.write(
                step=self.step,
                tokens=self.step * self.tokens_per_step,
                val_loss=result.loss,
                val_perplexity=result.perplexity,
                val_bits_per_byte=result.bits_per_byte,
                elapsed=self.elapsed,
            )
            bar.write(
                f"step {self.step}: validation loss {result.loss:.4f} nats/token, perplexity "
                f"{result.perplexity:.2f}, {result.nats_per_byte:.4f} nats/byte "
                f"({time.perf_counter() - began:.1f} s)"
            )
        if self.config.sample_tokens:
            bar.write(self._sample())

    def _sample(self) -> str:
        config = self.config
        with autocast(self.device, self.dtype):
            # a seed of its own: showing a sample must not change the training that follows
            pieces = stream_text(
                self.model,
                self.tokenizer,
                config.sample_prompt,
                config.sample_tokens,
                temperature=0.8,
                top_k=50,
                seed=config.seed,
            )
            text = config.sample_prompt + "".join(pieces)
        self.model.train()
        return "\n".join(f"  | {line}" for line in text.strip().splitlines())

    def _compiled(self) -> Callable[..., Any]:
        if not self.config.compile:
            return self.model
        obstacle = summary.compiler_obstacle(self.device)
        if obstacle is not None:
            self.notify(f"compile: {obstacle}; training without it")
            return self.model
        self.notify("compile: on; the first step takes a minute or so")
        return torch.compile(self.model, fullgraph=True, dynamic=False)

    def _progress(self) -> float:
        """How much of the run lies behind, 0 to 1."""
        return progress(
            self.step,
            self.elapsed,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            minutes=self.config.minutes,
        )

    def _position(self) -> dict[str, Any]:
        """Everything a step changes besides weights and moments."""
        return {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "rng": rng_states(self.device),
        }

    def _rewind(self) -> None:
        """Undo the part of an interrupted step that has happened: data drawn, random numbers."""
        snapshot = self._snapshot
        if self.step == snapshot["step"]:
            self.loader.load_state_dict(snapshot["loader"])
            set_rng_states(snapshot["rng"], self.device)

    def _save(self) -> None:
        validation = self.validation
        if validation is not None and not math.isfinite(validation.loss):
            validation = None
        state = {
            "elapsed": self.elapsed,
            "loader": self.loader.state_dict(),
            "scaler": self.training_step.scaler.state_dict(),
            "train_loss": _finite_or_none(self.train_loss),
            "validation": None if validation is None else asdict(validation),
            "pending": [[_finite_or_none(x.item()) for x in result] for result in self.pending],
            "tokenizer": self.tokenizer_id,
            "config": self.config.to_toml(),
        }
        checkpoint.save(self.run_folder, self.step, self.model, self.optimizer, state)
        checkpoint.prune(self.run_folder, self.config.keep_last)

    def _restore(self, folder: Path) -> None:
        state = runs.read_state(folder)
        try:
            self.step, self.elapsed = state["step"], state["elapsed"]
            self.train_loss = _or_nan(state["train_loss"])
            if state["validation"] is not None:
                self.validation = Validation(**state["validation"])
            for result in state["pending"]:
                loss, norm = torch.tensor([_or_nan(x) for x in result], device=self.device)
                self.pending.append(StepResult(loss, norm))
            self.loader.load_state_dict(state["loader"])
            # empty where the dtype needed none
            if state["scaler"]:
                self.training_step.scaler.load_state_dict(state["scaler"])
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: damaged state: {error!r}") from None
        checkpoint.load_training_state(folder, self.model, self.optimizer)

    def _introduce(self) -> None:
        config, dataset = self.config, self.dataset
        val_tokens = 0 if dataset.val is None else len(dataset.val)
        self.notify(
            f"data: {dataset.source}; {len(dataset.train):,} training and {val_tokens:,} "
            f"validation tokens (tokenizer {self.tokenizer_id})"
        )
        for line in summary.model_lines(self.model, config.batch_size, self.dtype, self.device):
            self.notify(line)
        self.notify(f"kernels: {self.kernels}")
        length = "by time" if self.total_steps is None else f"{self.total_steps:,} steps"
        limit = "" if config.minutes is None else f", at most {config.minutes:g} minutes"
        done = f" ({self.step:,} done)" if self.step else ""
        self.notify(f"training: {length}{limit}{done}, {self.tokens_per_step:,} tokens a step")

    def _bar(self) -> "tqdm[Any]":
        return tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            # a log file gets a line now and then, not ten a second
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )


def _finite_or_none(x: float) -> float | None:
    """What JSON can hold."""
    return x if math.isfinite(x) else None


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else x
