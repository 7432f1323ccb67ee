"""The training loop: what happens in which order, and nothing else."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastgpt2 import runs
from fastgpt2.devices import (
    autocast,
    peak_flops,
    resolve_device,
    resolve_dtype,
    resolve_kernels,
)
from fastgpt2.errors import UserError
from fastgpt2.files import write_text
from fastgpt2.generate.stream import encode_prompt, stream_text
from fastgpt2.model import GPT
from fastgpt2.streams import steady_streams
from fastgpt2.text import build_dataset, load_tokenizer, save_tokenizer
from fastgpt2.text.loaders import check_eval_tokens
from fastgpt2.text.mixture_loader import mixture_lines, open_loader
from fastgpt2.text.packing import packed
from fastgpt2.train import checkpoint
from fastgpt2.train.compiled import compiled
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.console import Console
from fastgpt2.train.freeze import freeze
from fastgpt2.train.interrupt import Interrupt, Interrupted
from fastgpt2.train.metrics import MetricsLog, plot
from fastgpt2.train.optimizers import build_optimizer, set_momentum
from fastgpt2.train.origin import open_origin
from fastgpt2.train.schedules import learning_rate, progress
from fastgpt2.train.state import RunState, check_data
from fastgpt2.train.step import Batch, TrainingStep
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
    drawn: bool


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
        origin = None
        if config.init_from is not None and not resume:
            origin = open_origin(config)
            config = origin.config
        self.config, self.run_folder = config, run
        self.console = Console(notify)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.kernels = resolve_kernels(self.device, self.dtype, config.impl, fp8=config.fp8)
        torch.set_float32_matmul_precision("high")
        folder = checkpoint.newest_intact(run, notify) if resume else None
        self.dataset = build_dataset(
            config.data,
            load_tokenizer(run) if resume else origin.tokenizer if origin else config.tokenizer,
            vocab_dir=None if origin else config.vocab_dir,
            val_fraction=config.val_fraction,
            text_column=config.text_column,
            vocab_size=config.vocab_size,
            notify=notify,
        )
        self.tokenizer = self.dataset.tokenizer
        self.tokenizer_id = f"{self.tokenizer.name} {self.tokenizer.fingerprint}"
        self.eot = self.tokenizer.eot if config.pack else None
        if config.pack and self.eot is None:
            raise UserError(
                f"--pack: the tokenizer {self.tokenizer.name} has no end-of-text id, so nothing "
                "says where a document ends"
            )
        # what would fail at the first evaluation fails now
        if config.sample_tokens:
            encode_prompt(self.tokenizer, config.sample_prompt, name="sample_prompt")
        if folder is not None:
            check_data(folder, self.tokenizer_id, self.dataset.digest)
        torch.manual_seed(config.seed)
        shape = config.gpt_config(self.tokenizer.vocab_size)
        if folder is not None:
            # the weights' own: a run's configuration does not have it
            own = {name: value for name, value in asdict(shape).items() if name != "gelu"}
            self.model = checkpoint.load_model(folder, **own)
        elif origin is not None:
            self.model = origin.load()
        else:
            self.model = GPT(shape)
        self.model.to(self.device)
        self.frozen = freeze(self.model, config.freeze)
        optimizer = build_optimizer(self.model, config)
        self.loader = open_loader(
            self.dataset.train,
            block_size=shape.block_size,
            batch_size=config.batch_size,
            seed=config.seed,
            stride=config.stride,
            eot=self.eot,
            vocab_size=shape.vocab_size,
        )
        if self.dataset.val is not None:
            check_eval_tokens(self.dataset.val, shape.vocab_size)
        self.tokens_per_step = config.grad_accum * config.batch_size * shape.block_size
        self.interrupt = Interrupt()
        self.training_step = TrainingStep(
            self.model,
            optimizer,
            dtype=self.dtype,
            grad_clip=config.grad_clip,
            forward=self.model,
            poll=self.interrupt.poll,
        )
        self.state = RunState(
            self.model,
            optimizer,
            self.loader,
            self.training_step.scaler,
            fixed={
                "tokenizer": self.tokenizer_id,
                "data": self.dataset.digest,
                "config": config.to_toml(),
            },
        )
        if folder is not None:
            self.state.restore(folder)
        self.total_steps = config.total_steps(
            self.loader.blocks_per_epoch, step=self.state.step, blocks=self.loader.blocks_used
        )

    def run(self) -> Outcome:
        """Train to the end, or to a signal; either way the run folder is left complete."""
        # a caller's terminal may go away, too
        with steady_streams():
            return self._run()

    def _run(self) -> Outcome:
        exit_code = 0
        config, run, state = self.config, self.run_folder, self.state
        try:
            run.mkdir(parents=True, exist_ok=True)
            write_text(run / "config.toml", config.to_toml())
            save_tokenizer(self.tokenizer, run)
            log = MetricsLog(run, state.step)
        except OSError as error:
            raise UserError(f"{run}: cannot be written: {error.strerror}") from None
        drawn = False
        self.console.introduce(
            self.dataset,
            self.tokenizer_id,
            self.model,
            state.optimizer,
            batch_size=config.batch_size,
            dtype=self.dtype,
            kernels=self.kernels,
        )
        left = 0 if self.total_steps is None else self.total_steps - state.step
        planned = self.loader.blocks_used + left * self.tokens_per_step // self.loader.block_size
        for line in (*self.frozen, *mixture_lines(self.loader, planned)):
            self.console.notify(line)
        self.model.train()
        if config.compile:
            self.training_step.forward = compiled(
                self.model, config.batch_size, self.dtype, self.console.notify, eot=self.eot
            )
        if self.eot is not None:
            self.training_step.forward = packed(self.training_step.forward, self.eot)
        try:
            with (
                self.interrupt,
                self.console.begin(
                    state.step, self.total_steps, config.minutes, self.tokens_per_step
                ),
            ):
                try:
                    self._loop(log)
                except Interrupted as signal:
                    exit_code = signal.exit_code
                    state.rewind()
                    state.save(run, config.keep_last)
                    self.console.write(f"stopped by {signal}: step {state.step} is saved")
                except OSError:
                    # the log could not be written; the weights may still find room
                    state.rewind()
                    state.save(run, config.keep_last)
                    raise
        finally:
            # of a run that went wrong, too: the curves say how
            drawn = plot(run, self.console.notify)
        return Outcome(
            step=state.step,
            tokens=state.tokens,
            elapsed=state.elapsed,
            train_loss=state.train_loss,
            validation=state.validation,
            best_step=int(runs.best(run).name.removeprefix("step_")),
            exit_code=exit_code,
            drawn=drawn,
        )

    def _loop(self, log: MetricsLog) -> None:
        config, state = self.config, self.state
        mark, mark_step = time.perf_counter(), state.step
        started = mark - state.elapsed
        while True:
            if self._evaluation_is_due():
                began = time.perf_counter()
                self._evaluate(log)
                # the speed is that of training alone
                mark += time.perf_counter() - began
            if self._progress() >= 1.0:
                return
            if self.interrupt.save_is_wanted():
                state.save(self.run_folder, config.keep_last)
                self.console.write(f"step {state.step} is saved")
            state.mark()
            lr = learning_rate(
                config.schedule,
                state.step,
                self._progress(),
                lr=config.lr,
                min_lr=config.final_lr,
                warmup_steps=config.warmup_steps,
                wsd_decay=config.wsd_decay,
            )
            set_momentum(
                state.optimizer,
                state.step,
                momentum=config.muon_momentum,
                warmup_steps=config.muon_warmup_steps,
            )
            batches: list[Batch] = [next(self.loader) for _ in range(config.grad_accum)]
            state.pending.append(self.training_step(batches, lr))
            state.step += 1
            state.validation = None
            state.elapsed = time.perf_counter() - started
            self.console.advance()
            if state.step % config.log_every == 0 or state.step == 1 or self._progress() >= 1.0:
                grad_norm = self._read()
                now = time.perf_counter()
                speed = (state.step - mark_step) * self.tokens_per_step / (now - mark)
                self._log(log, lr, speed, grad_norm)
                mark, mark_step = now, state.step

    def _evaluation_is_due(self) -> bool:
        """Every ``eval_every`` steps and at the end, if the weights have not been scored yet."""
        state = self.state
        if state.step == 0 or state.validation is not None:
            return False
        return state.step % self.config.eval_every == 0 or self._progress() >= 1.0

    def _read(self) -> float:
        """Check the results of the last steps; returns the last gradient norm."""
        results = self.state.read_pending()
        for step, (loss, norm) in enumerate(results, self.state.step - len(results) + 1):
            self._check(loss, norm, step)
        return results[-1][1]

    def _check(self, loss: float, norm: float, step: int) -> None:
        try:
            self.training_step.check(loss, norm, step)
        except UserError as error:
            if not runs.saved_steps(self.run_folder):
                raise
            raise UserError(f"{error}; the last checkpoint is untouched") from None

    def _log(self, log: MetricsLog, lr: float, speed: float, grad_norm: float) -> None:
        state, peak = self.state, peak_flops(self.device)
        mfu = None if peak is None else self.model.flops_per_token() * speed / peak
        log.write(
            step=state.step,
            tokens=state.tokens,
            train_loss=state.train_loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=speed,
            mfu=mfu,
            elapsed=state.elapsed,
        )
        self.console.record(state.train_loss, lr, grad_norm, speed, mfu)

    def _evaluate(self, log: MetricsLog) -> None:
        """Score the weights, save them, and only then show what came out."""
        state, config = self.state, self.config
        began = time.perf_counter()
        state.validation = validate(
            self.model,
            self.dataset,
            batch_size=max(config.batch_size, EVAL_TOKENS // self.model.config.block_size),
            dtype=self.dtype,
            poll=self.interrupt.poll,
            eot=self.eot,
        )
        seconds = time.perf_counter() - began
        if state.validation is not None:
            result = state.validation
            log.write(
                step=state.step,
                tokens=state.tokens,
                val_loss=result.loss,
                val_perplexity=result.perplexity,
                val_bits_per_byte=result.bits_per_byte,
                elapsed=state.elapsed,
            )
        state.save(self.run_folder, config.keep_last)
        if state.validation is not None:
            self.console.evaluation(state.step, state.validation, seconds)
        if config.sample_tokens:
            self.console.sample(self._sample())

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
        return text

    def _progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        return progress(
            self.state.step,
            self.state.elapsed,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            minutes=self.config.minutes,
        )
