"""A step whose loss or gradient is not finite: find the module that went wrong, save the batch.

The step is recomputed module by module. The weights are still those of the bad step, since such a
step changes nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastgpt2 import distributed, runs
from fastgpt2.config import GPTConfig
from fastgpt2.devices import autocast, rng_states, set_rng_states
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.text.packing import packed
from fastgpt2.train.parallel import own, reshard, whole_weights
from fastgpt2.train.step import Batch, TrainingStep

# the file in the run folder
BAD_STEP = "bad_step.safetensors"


@dataclass(frozen=True)
class KeptStep:
    """A step that can be recomputed.

    Attributes:
        model: in training mode, with the weights that the step began with.
        batches: the step's micro-batches.
        random_numbers: states of the generators when it began.
        step: its number.
        eot: the id that ends a document, if documents are packed into its blocks.
    """

    model: GPT
    batches: Sequence[Batch]
    random_numbers: Mapping[str, Tensor]
    step: int
    eot: int | None = None

    def save(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Write everything into one file, which ``load`` reads.

        Args:
            path: a safetensors file.
            weights: those of the model, whole.
        """
        tensors = {f"model.{name}": weight for name, weight in weights.items()}
        for i, (idx, targets) in enumerate(self.batches):
            tensors |= {f"idx.{i}": idx.contiguous(), f"targets.{i}": targets.contiguous()}
        tensors |= {f"rng.{name}": state for name, state in self.random_numbers.items()}
        config = json.dumps(asdict(self.model.config))
        metadata = {"config": config, "step": str(self.step)}
        if self.eot is not None:
            metadata["eot"] = str(self.eot)
        save_file(tensors, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> "KeptStep":
        """Read a file that ``save`` has written.

        Args:
            path: the file.
            overrides: fields of the model's configuration, such as ``impl``.

        Raises:
            UserError: the file is not one of these.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            with torch.device("meta"):
                model = GPT(GPTConfig(**(json.loads(metadata["config"]) | overrides)))
            model.load_state_dict(_below(tensors, "model."), assign=True)
            idx, targets = _below(tensors, "idx."), _below(tensors, "targets.")
            batches = [(idx[str(i)], targets[str(i)]) for i in range(len(idx))]
            eot = int(metadata["eot"]) if "eot" in metadata else None
            return cls(model, batches, _below(tensors, "rng."), int(metadata["step"]), eot)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--replay {path}: not a step that was kept: {reason}") from None

    def first_bad(self, dtype: torch.dtype) -> str | None:
        """Recompute it; returns the first output or gradient that is not finite, None if all are.

        All processes of a sharded model call it; each looks at its own batches.

        Args:
            dtype: dtype of the computation.
        """
        model = self.model
        # the parts of a sharded model need each other, whatever one process has found
        goes_on = isinstance(model, FSDPModule)
        reshard(model)
        device = model.lm_head.weight.device
        before = rng_states(device)
        set_rng_states(self.random_numbers, device)
        try:
            with _watched(model) as findings:
                forward = model if self.eot is None else packed(model, self.eot)
                for idx, targets in self.batches:
                    with autocast(device, dtype):
                        loss = forward(idx.to(device), targets.to(device))[1]
                    assert loss is not None
                    if goes_on or not findings:
                        torch.autograd.backward(loss)
                    if findings and not goes_on:
                        break
        finally:
            model.zero_grad(set_to_none=True)
            set_rng_states(before, device)
        return findings[0] if findings else None


def check(
    training_step: TrainingStep, last: KeptStep, run: Path, result: tuple[float, float, int]
) -> None:
    """Stop a run that has diverged, after saving and naming the cause; all processes call it.

    Args:
        training_step: counts the steps that were not finite.
        last: the last step that the log knows of, which is recomputed.
        run: the run folder.
        result: loss, norm of the gradient and number of a step.

    Raises:
        UserError: the last steps were not finite.
    """
    try:
        training_step.check(*result)
    except UserError as error:
        kept = "; the last checkpoint is untouched" if runs.saved_steps(run) else ""
        found = explain(last, training_step.dtype, run / BAD_STEP)
        raise distributed.agreed(UserError(f"{error}{found}{kept}")) from None


def explain(bad: KeptStep, dtype: torch.dtype, path: Path) -> str:
    """The end of the message of a run that diverged; all processes call it.

    The first process that finds something saves its part of the step, with the whole weights.

    Args:
        bad: the step.
        dtype: dtype of the computation.
        path: where the step is saved.
    """
    every = distributed.gather([bad.first_bad(dtype)])
    first = next((rank for rank, found in enumerate(every) if found), None)
    if first is None:
        return "; a second pass, module by module, was finite"
    found = every[first]
    weights = whole_weights(bad.model)
    if first == distributed.rank():
        try:
            bad.save(path, weights)
        except (OSError, SafetensorError) as error:
            return f"; not finite first: {found}; the step could not be kept: {error}"
    return f"; not finite first: {found}; --replay {path} runs the step again"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """Within the block, collects what is not finite as modules are called, in this order."""
    findings: list[str] = []

    def gradient_of(name: str) -> Callable[[Tensor], None]:
        def look(grad: Tensor) -> None:
            if not torch.isfinite(grad).all():
                findings.append(f"the gradient of {name}")

        return look

    def output_of(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if not torch.isfinite(output).all():
                findings.append(f"the output of {name}")
            if output.requires_grad:
                hook = gradient_of(f"the output of {name}")
                output.register_hook(hook)  # type: ignore[no-untyped-call]

        return look

    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            # of a shard, this process's part
            if not torch.isfinite(own(parameter)).all():
                findings.append(f"the weight {name}")
            if parameter.requires_grad:
                handle = parameter.register_hook(gradient_of(name))  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
        for name, module in model.named_modules():
            # containers are not called
            if name and not isinstance(module, nn.ModuleList):
                stack.callback(module.register_forward_hook(output_of(name)).remove)
        yield findings
