"""The training loop: what happens in which order, and nothing else."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastgpt2.devices import peak_flops
from fastgpt2.errors import UserError
from fastgpt2.kernels import explain
from fastgpt2.model import GPT
from fastgpt2.text import BlockLoader, build_dataset, load_tokenizer, save_tokenizer
from fastgpt2.training import checkpoint, summary
from fastgpt2.training.config import TrainConfig
from fastgpt2.training.device import resolve_device, resolve_dtype
from fastgpt2.training.interrupt import Interrupt, Interrupted
from fastgpt2.training.metrics import MetricsLog, plot
from fastgpt2.training.schedules import learning_rate
from fastgpt2.training.step import Batch, StepResult, TrainingStep
from fastgpt2.training.validation import Validation, validate


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
        torch.set_float32_matmul_precision("high")
        folder = checkpoint.latest(run) if resume else None
        self.dataset = build_dataset(
            config.data,
            load_tokenizer(run) if resume else config.tokenizer,
            vocab_dir=config.vocab_dir,
            val_fraction=config.val_fraction,
            notify=notify,
        )
        self.tokenizer = self.dataset.tokenizer
        torch.manual_seed(config.seed)
        shape = config.gpt_config(self.tokenizer.vocab_size)
        self.model = (
            GPT(shape) if folder is None else checkpoint.load_model(folder, impl=config.impl)
        )
        self.model.to(self.device)
        self.optimizer = self.model.configure_optimizers(
            config.weight_decay, config.lr, (config.beta1, config.beta2), self.device.type
        )
        self.loader = BlockLoader(
            self.dataset.train,
            block_size=self.model.config.block_size,
            batch_size=config.batch_size,
            seed=config.seed,
            vocab_size=self.tokenizer.vocab_size,
        )
        self.tokens_per_step = config.grad_accum * config.batch_size * self.model.config.block_size
        self.total_steps = self._total_steps()
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
        self.validation: Validation | None = None
        self.train_loss = math.nan
        if folder is not None:
            self._restore(folder)
        self._snapshot = self._position()

    def run(self) -> Outcome:
        """Train to the end, or to a signal; either way the run folder is left complete."""
        exit_code = 0
        run, config = self.run_folder, self.config
        run.mkdir(parents=True, exist_ok=True)
        if self.step == 0:
            (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
            save_tokenizer(self.tokenizer, run)
        log = MetricsLog(run, self.step)
        self._introduce()
        self.model.train()
        with self.interrupt, self._bar() as bar:
            try:
                self._loop(log, bar)
            except Interrupted as signal:
                exit_code = signal.exit_code
                self._rewind()
                bar.write(f"stopped by {signal}: saving step {self.step}")
            self._save()
        plot(run)
        return Outcome(
            step=self.step,
            tokens=self.step * self.tokens_per_step,
            elapsed=self.elapsed,
            train_loss=self.train_loss,
            validation=self.validation,
            best_step=int(checkpoint.best(run).name.removeprefix("step_")),
            exit_code=exit_code,
        )

    def _loop(self, log: MetricsLog, bar: "tqdm[Any]") -> None:
        config = self.config
        pending: list[StepResult] = []
        mark, mark_step = time.perf_counter(), self.step
        started = mark - self.elapsed
        while self._progress() < 1.0:
            self._snapshot = self._position()
            lr = learning_rate(
                config.schedule,
                self.step,
                self._progress(),
                lr=config.lr,
                min_lr=config.min_lr,
                warmup_steps=config.warmup_steps,
            )
            batches: list[Batch] = [next(self.loader) for _ in range(config.grad_accum)]
            pending.append(self.training_step(batches, lr))
            self.step += 1
            self.elapsed = time.perf_counter() - started
            bar.update(1)
            at_end = self._progress() >= 1.0
            if self.step % config.log_every == 0 or self.step == 1 or at_end:
                self._read(pending)
                now = time.perf_counter()
                speed = (self.step - mark_step) * self.tokens_per_step / (now - mark)
                self._log(log, bar, lr, speed, pending[-1])
                pending.clear()
                mark, mark_step = now, self.step
            if self.step % config.eval_every == 0 or at_end:
                self._evaluate(log, bar)
                self._save()
                mark = time.perf_counter()

    def _read(self, pending: list[StepResult]) -> None:
        """Fetch the losses of the last steps from the device, and stop if they went bad."""
        losses = torch.stack([result.loss for result in pending]).tolist()
        norms = torch.stack([result.grad_norm for result in pending]).tolist()
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            self.training_step.check(loss, norm, self.step - len(pending) + i + 1)
        finite = [loss for loss in losses if math.isfinite(loss)]
        self.train_loss = sum(finite) / len(finite) if finite else math.nan

    def _log(
        self, log: MetricsLog, bar: "tqdm[Any]", lr: float, speed: float, last: StepResult
    ) -> None:
        peak = peak_flops(self.device)
        mfu = None if peak is None else self.model.flops_per_token() * speed / peak
        grad_norm = last.grad_norm.item()
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
            batch_size=self.config.batch_size,
            context=self.training_step.autocast,
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
        prompt = self.tokenizer.encode(self.config.sample_prompt) or [0]
        idx = torch.tensor([prompt], device=self.device)
        # a generator of its own: showing a sample must not change the training that follows
        generator = torch.Generator(self.device).manual_seed(self.config.seed)
        with self.training_step.autocast():
            ids = self.model.generate(
                idx, self.config.sample_tokens, temperature=0.8, top_k=50, generator=generator
            )
        text = self.tokenizer.decode(ids[0].tolist()).strip()
        return "\n".join(f"  | {line}" for line in text.splitlines())

    def _compiled(self) -> Callable[..., Any]:
        if not self.config.compile:
            return self.model
        obstacle = summary.compiler_obstacle(self.device)
        if obstacle is not None:
            self.notify(f"compile: {obstacle}; training without it")
            return self.model
        self.notify("compile: on; the first step takes a minute or so")
        return torch.compile(self.model, fullgraph=True, dynamic=False)

    def _total_steps(self) -> int | None:
        limits = [] if self.config.steps is None else [self.config.steps]
        if self.config.epochs is not None:
            blocks = self.config.epochs * self.loader.blocks_per_epoch
            limits.append(math.ceil(blocks / (self.config.batch_size * self.config.grad_accum)))
        return min(limits, default=None)

    def _progress(self) -> float:
        """How much of the run lies behind, 0 to 1, by steps or by time, whichever is further.

        Steps count from the end of the warm-up, as the schedule does.
        """
        by_steps = by_time = 0.0
        if self.total_steps is not None:
            warmup = min(self.config.warmup_steps, self.total_steps - 1)
            by_steps = (self.step - warmup) / (self.total_steps - warmup)
        if self.config.minutes is not None:
            by_time = self.elapsed / (60.0 * self.config.minutes)
        return max(by_steps, by_time)

    def _position(self) -> dict[str, Any]:
        """Everything a step changes besides weights and moments."""
        return {
            "step": self.step,
            "elapsed": self.elapsed,
            "loader": self.loader.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self._on_cuda else None,
        }

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def _rewind(self) -> None:
        """Undo the part of an interrupted step that has happened: data drawn, random numbers."""
        snapshot = self._snapshot
        if self.step == snapshot["step"]:
            self.loader.load_state_dict(snapshot["loader"])
            torch.set_rng_state(snapshot["rng"])
            if self._on_cuda:
                torch.cuda.set_rng_state(snapshot["cuda_rng"], self.device)

    def _save(self) -> None:
        if self.step == 0:
            return
        validation = self.validation
        state = {
            "elapsed": self.elapsed,
            "loader": self.loader.state_dict(),
            "scaler": self.training_step.scaler.state_dict(),
            "train_loss": self.train_loss if math.isfinite(self.train_loss) else None,
            "val_loss": None if validation is None else validation.loss,
            "tokenizer": {
                "name": self.tokenizer.name,
                "fingerprint": self.tokenizer.fingerprint,
                "vocab_size": self.tokenizer.vocab_size,
            },
            "config": self.config.to_toml(),
        }
        checkpoint.save(self.run_folder, self.step, self.model, self.optimizer, state)
        checkpoint.prune(self.run_folder, self.config.keep_last)

    def _restore(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        saved = state["tokenizer"]["fingerprint"]
        if saved != self.tokenizer.fingerprint:
            raise UserError(
                f"{folder}: saved with tokenizer {state['tokenizer']['name']} {saved}, the data "
                f"has {self.tokenizer.name} {self.tokenizer.fingerprint}"
            )
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.loader.load_state_dict(state["loader"])
        self.training_step.scaler.load_state_dict(state["scaler"])
        checkpoint.load_training_state(folder, self.model, self.optimizer)

    def _introduce(self) -> None:
        dataset = self.dataset
        self.notify(
            f"data: {dataset.source}; {len(dataset.train):,} training and "
            f"{0 if dataset.val is None else len(dataset.val):,} validation tokens "
            f"(tokenizer {self.tokenizer.name} {self.tokenizer.fingerprint})"
        )
        batch_size = self.config.batch_size
        for line in summary.model_lines(self.model, batch_size, self.dtype, self.device):
            self.notify(line)
        self.notify(f"kernels: {explain(self.device, self.dtype, self.config.impl)}")
        length = "by time" if self.total_steps is None else f"{self.total_steps:,} steps"
        limit = "" if self.config.minutes is None else f", at most {self.config.minutes:g} minutes"
        self.notify(f"training: {length}{limit}, {self.tokens_per_step:,} tokens a step")

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
