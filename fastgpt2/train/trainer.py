"""The training loop: only the order of events."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from fastgpt2 import distributed, runs
from fastgpt2.devices import resolve_device, resolve_dtype, resolve_kernels
from fastgpt2.errors import EndedElsewhere, UserError
from fastgpt2.generate.stream import encode_prompt
from fastgpt2.model import GPT
from fastgpt2.streams import steady_streams
from fastgpt2.text import build_dataset, load_tokenizer
from fastgpt2.text.loaders import check_eval_tokens
from fastgpt2.text.mixture_loader import mixture_lines, open_loader
from fastgpt2.train import checkpoint
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.console import Console
from fastgpt2.train.fitted import fitted
from fastgpt2.train.folder import begin_folder
from fastgpt2.train.forward import forward_pass
from fastgpt2.train.freeze import freeze
from fastgpt2.train.guard import KeptStep
from fastgpt2.train.intact import newest_intact
from fastgpt2.train.interrupt import Interrupt, Interrupted
from fastgpt2.train.memory import estimate
from fastgpt2.train.metrics import plot
from fastgpt2.train.optimizers import build_optimizer, set_momentum
from fastgpt2.train.origin import open_origin
from fastgpt2.train.outcome import Outcome
from fastgpt2.train.parallel import seed_for_rank, shard, whole_model
from fastgpt2.train.profiling import StepProfile
from fastgpt2.train.reader import Reader
from fastgpt2.train.records import Record, Records
from fastgpt2.train.remat import set_remat
from fastgpt2.train.samples import sample
from fastgpt2.train.schedules import progress
from fastgpt2.train.state import RunState, check_data
from fastgpt2.train.step import Batch, TrainingStep
from fastgpt2.train.validation import EVAL_TOKENS, validate


class Trainer:
    """Trains the model a configuration describes, into a run folder.

    Several processes with a process group train one model: each makes a Trainer of the same run.

    Args:
        config: the run's configuration.
        run: its folder; with ``resume``, one with a checkpoint to continue from.
        resume: continue; the run then equals one that was never stopped, bit for bit on a CPU
            (if its length is given in steps or epochs).
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
        notify = self.console.notify
        self.device = resolve_device(distributed.local_device(config.device))
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.kernels = resolve_kernels(self.device, self.dtype, config.impl, fp8=config.fp8)
        torch.set_float32_matmul_precision("high")
        folder = distributed.on_rank_0(lambda: newest_intact(run, notify)) if resume else None
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
        distributed.check_same("data", f"tokenizer {self.tokenizer_id}, ids {self.dataset.digest}")
        self.eot = self.tokenizer.eot if config.pack else None
        if config.pack and self.eot is None:
            raise UserError(
                f"--pack: the tokenizer {self.tokenizer.name} has no end-of-text id, so nothing "
                "says where a document ends"
            )
        # validate the prompt now, not at the first evaluation
        if config.sample_tokens:
            encode_prompt(self.tokenizer, config.sample_prompt, name="sample_prompt")
        if folder is not None:
            check_data(folder, self.tokenizer_id, self.dataset.digest)
        torch.manual_seed(config.seed)
        ranks = distributed.world_size()
        shape = config.gpt_config(self.tokenizer.vocab_size)
        if folder is not None:
            # from the weights: a run's configuration does not have it
            own = {name: value for name, value in asdict(shape).items() if name != "gelu"}
            self.model = checkpoint.load_model(folder, **own)
        elif origin is not None:
            self.model = origin.load()
        else:
            self.model = GPT(shape)
        self.model.to(self.device)
        self.frozen = freeze(self.model, config.freeze)
        set_remat(self.model, config.remat)
        if config.shard and ranks > 1:
            shard(self.model, self.dtype)
        optimizer = build_optimizer(self.model, config)
        config = self.config = fitted(config, self.model, optimizer, self.dtype, notify)
        self.batch_size, self.grad_accum = config.split(ranks)
        self.loader = open_loader(
            self.dataset.train,
            block_size=shape.block_size,
            batch_size=self.batch_size,
            seed=config.seed,
            rank=distributed.rank(),
            world_size=ranks,
            stride=config.stride,
            eot=self.eot,
            vocab_size=shape.vocab_size,
        )
        if self.dataset.val is not None:
            check_eval_tokens(self.dataset.val, shape.vocab_size)
        self.tokens_per_step = ranks * self.grad_accum * self.batch_size * shape.block_size
        self.interrupt = Interrupt()
        self.profile = StepProfile(config.profile, run, self.device, self.console.say)
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
        self.records = Records(
            self.state, self.training_step, run, self.console, self.tokens_per_step
        )
        seed_for_rank(config.seed, 0 if folder is None else runs.read_state(folder)["step"])
        if folder is not None:
            self.state.restore(folder)
        self.total_steps = config.total_steps(
            self.loader.blocks_per_epoch,
            step=self.state.step,
            blocks=self.loader.blocks_used,
            ranks=ranks,
        )

    def run(self) -> Outcome:
        """Train to the end, or to a signal; in both cases the run folder is complete."""
        # a caller's terminal may disappear, too
        with steady_streams():
            return self._run()

    def _run(self) -> Outcome:
        ended, config, state = 1, self.config, self.state
        distributed.on_rank_0(self._begin_folder)
        self.console.introduce(
            self.dataset,
            self.tokenizer_id,
            self.model,
            state.optimizer,
            estimate(
                self.model,
                state.optimizer,
                self.batch_size,
                self.dtype,
                grad_accum=self.grad_accum,
                pack=config.pack,
            ),
            dtype=self.dtype,
            kernels=self.kernels,
        )
        left = 0 if self.total_steps is None else self.total_steps - state.step
        planned = self.loader.blocks_used + left * self.tokens_per_step // self.loader.block_size
        step, notify = self.training_step, self.console.notify
        for line in (*self.frozen, *mixture_lines(self.loader, planned)):
            notify(line)
        self.model.train()
        step.forward, step.accumulate = forward_pass(
            step.forward, self.model, config, self.batch_size, self.dtype, notify, eot=self.eot
        )
        try:
            with (
                self.interrupt,
                state.saver,
                # reads the micro-batches of the next step while this one is computed
                Reader(self.loader, self.device, self.grad_accum) as self.reader,
                self.console.begin(
                    state.step, self.total_steps, config.minutes, self.tokens_per_step
                ),
            ):
                try:
                    exit_code = self._until_the_end()
                except (OSError, EndedElsewhere) as error:
                    # the log could not be written; the disk may still have room for the weights
                    if distributed.is_agreed(error) and distributed.is_by_system(error):
                        with suppress(OSError, EndedElsewhere):
                            self._finish_record()
                        self._save_finished_step()
                    raise
            ended = exit_code
        except Exception as error:
            # unless other processes are waiting for this one to end
            if distributed.is_agreed(error):
                # the first error is the one to say
                with suppress(Exception):
                    self.records.finish()
                # failed runs are drawn too
                self._plot()
            raise
        finally:
            self.profile.close()
            if distributed.rank() == 0:
                self.records.log.close(ended)
        best = distributed.on_rank_0(lambda: runs.best(self.run_folder, pass_over=True))
        return Outcome(
            step=state.step,
            tokens=state.tokens,
            elapsed=state.elapsed,
            train_loss=state.train_loss,
            validation=state.validation,
            best_step=int(best.name.removeprefix("step_")),
            exit_code=exit_code,
            drawn=self._plot(),
        )

    def _until_the_end(self) -> int:
        """Train to the end, or to a signal; returns the exit code."""
        try:
            self._loop()
            self.state.settle()
            return 0
        except Interrupted as signal:
            self._save_finished_step()
            self.console.write(f"stopped by {signal}: step {self.state.step} is saved")
            return signal.exit_code

    def _save_finished_step(self) -> None:
        """Save the last step that was finished, and wait for it."""
        self._finish_record()
        self.state.rewind()
        self.state.save(self.run_folder, self.config.keep_last)
        self.state.settle()

    def _plot(self) -> bool:
        return distributed.rank() == 0 and plot(self.run_folder, self.console.notify)

    def _begin_folder(self) -> None:
        """Write the run folder's first files, and open the log."""
        self.records.log = begin_folder(
            self.run_folder, self.config, self.tokenizer, self.state.step, self.console.say
        )

    def _loop(self) -> None:
        config, state = self.config, self.state
        self.records.restart()
        started = time.perf_counter() - state.elapsed
        while True:
            if self._evaluation_is_due():
                # this may take the run back, and then nothing is due
                self._finish_record()
            if self._evaluation_is_due():
                began = time.perf_counter()
                self._evaluate()
                # the speed counts training only
                self.records.pause(time.perf_counter() - began)
            if self._progress() >= 1.0:
                return
            if self.interrupt.save_is_wanted():
                self._save_finished_step()
                self.console.write(f"step {state.step} is saved")
            state.mark()
            lr = config.learning_rate(state.step, self._progress())
            set_momentum(
                state.optimizer,
                state.step,
                momentum=config.muon_momentum,
                warmup_steps=config.muon_warmup_steps,
            )
            self.profile.step()
            batches = distributed.together(self._take)
            state.pending.append(self.training_step(batches, lr))
            state.step += 1
            state.validation = None
            state.elapsed = time.perf_counter() - started
            if config.minutes is not None:
                # minutes decide when the run ends, and must be the same on all processes
                state.elapsed = distributed.longest(state.elapsed)
            self.console.advance()
            # the step before may have left a record: read it now that the device has the next step
            self._finish_record(self._new_record(batches, lr))

    def _new_record(self, batches: list[Batch], lr: float) -> Record | None:
        """The record of the step that was just begun, if the log is to have one."""
        state = self.state
        if state.step % self.config.log_every and state.step != 1 and self._progress() < 1.0:
            return None
        random_numbers = state.marked_random_numbers
        return Record(
            state.take_pending(),
            KeptStep(self.model, batches, random_numbers, state.step, self.eot),
            lr=lr,
            tokens=state.tokens,
            elapsed=state.elapsed,
        )

    def _finish_record(self, following: Record | None = None) -> None:
        """Log the record that waits, which may take the run back; ``following`` waits then."""
        spike = self.records.finish(following)
        if spike is not None and self.config.on_spike == "rollback":
            self._go_back(spike)

    def _take(self) -> list[Batch]:
        """The micro-batches of a step, unless the last checkpoint could not be written."""
        self.state.saver.look()
        return self.reader.take(self.grad_accum)

    def _go_back(self, spike: int) -> None:
        """Go back to before step ``spike``, and on with the data that comes now."""
        self.state.settle()
        folder = distributed.on_rank_0(lambda: checkpoint.newest_before(self.run_folder, spike))
        if folder is None:
            self.console.write("there is no checkpoint to go back to")
            return
        self.state.go_back(folder)
        # later records are dropped
        distributed.on_rank_0(self._begin_folder)
        self.records.restart()
        self.console.go_back(self.state.step)

    def _evaluation_is_due(self) -> bool:
        """Every ``eval_every`` steps and at the end, if the weights have not been scored yet."""
        state = self.state
        if state.step == 0 or state.validation is not None:
            return False
        return state.step % self.config.eval_every == 0 or self._progress() >= 1.0

    def _evaluate(self) -> None:
        """Score the weights, copy them for the checkpoint, and show what the log has already."""
        state, config = self.state, self.config
        began = time.perf_counter()
        state.validation = validate(
            self.model,
            self.dataset,
            batch_size=max(self.batch_size, EVAL_TOKENS // self.model.config.block_size),
            dtype=self.dtype,
            poll=self.interrupt.poll,
            eot=self.eot,
        )
        seconds = time.perf_counter() - began
        if state.validation is not None:
            result = state.validation
            self.records.write(
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
            model = whole_model(self.model)
            if distributed.rank() == 0:
                self.console.sample(sample(model, self.tokenizer, config, self.dtype))

    def _progress(self) -> float:
        """How much of the run is done, 0 to 1."""
        return progress(
            self.state.step,
            self.state.elapsed,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            minutes=self.config.minutes,
        )
