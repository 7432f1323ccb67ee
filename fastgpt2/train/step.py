"""One optimizer step: forward, backward, clip, update, with a guard against bad numbers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from fastgpt2 import distributed
from fastgpt2.devices import autocast, device_kind
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.train.optimizers import set_learning_rate
from fastgpt2.train.parallel import Accumulate, alone, whole

# consecutive steps with a non-finite loss or gradient before training stops
MAX_SKIPPED = 8

Batch = tuple[Tensor, Tensor]


class StepResult(NamedTuple):
    """Device scalars, read later so that the device never waits for the host."""

    loss: Tensor
    grad_norm: Tensor


class TrainingStep:
    """Runs optimizer steps on a model whose parameters are fp32.

    A step whose gradient is not finite leaves the weights and the optimizer untouched; the device
    decides that if its AdamW is fused. Gradients of micro-batches are weighted by their number of
    valid targets, counted over all processes, so 4x1 equals 1x4 on any number of processes. In fp16
    a ``GradScaler`` scales the loss. ``poll`` is called before each micro-batch. ``accumulate``
    makes the context of a micro-batch, given whether it is the last of its step.
    """

    accumulate: Accumulate = staticmethod(alone)

    def __init__(
        self,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        *,
        dtype: torch.dtype,
        grad_clip: float,
        forward: Callable[..., tuple[Tensor | None, Tensor]],
        poll: Callable[[], None],
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.forward, self.poll = forward, poll
        self.grad_clip = grad_clip
        self.device = model.lm_head.weight.device
        self.dtype = dtype
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.skipped = 0

    def __call__(self, batches: Sequence[Batch], lr: float) -> StepResult:
        """Train on one micro-batch after another, then update once.

        Args:
            batches: the micro-batches, each inputs and targets (B, T) int64; targets below 0 do
                not count.
            lr: the learning rate of this step.

        Returns:
            The mean loss in nats per counted target, and the norm of the gradient before clipping,
            over all processes: fp32 scalars on the device.
        """
        # freed only now, so that a diverged run can name the gradient that went bad
        self.optimizer.zero_grad(set_to_none=True)
        set_learning_rate(self.optimizer, lr)
        # counted on the host, where the reader leaves the batches: no wait for the device
        counts = [int(np.count_nonzero(targets.numpy(force=True) >= 0)) for _, targets in batches]
        ranks = distributed.world_size()
        total = max(int(distributed.all_sum(np.array([float(sum(counts))]))[0]), 1)
        loss_sum = torch.zeros((), device=self.device)
        for i, ((idx, targets), count) in enumerate(zip(batches, counts, strict=True), 1):
            self.poll()
            idx = idx.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with self.accumulate(i == len(batches)):
                with record_function("forward"), autocast(self.device, self.dtype):
                    loss = self.forward(idx, targets)[1]
                # the gradient of several processes is the mean of theirs
                weight = ranks * count / total
                with record_function("backward"):
                    scaled = self.scaler.scale(loss if weight == 1.0 else loss * weight)
                    torch.autograd.backward(scaled)
            loss_sum += loss.detach() * (count / total)
        if ranks > 1:
            dist.all_reduce(loss_sum)
        with record_function("update"):
            return StepResult(loss_sum, self._update())

    def _update(self) -> Tensor:
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        grad_norm = whole(torch.nn.utils.get_total_norm(grads))
        clip = (grad_norm / self.grad_clip).clamp(min=1.0) if self.grad_clip > 0 else None
        if self.scaler.is_enabled():
            if clip is not None:
                torch._foreach_div_(grads, clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return grad_norm
        if not device_kind(self.device).fused_adamw:
            # any other AdamW has neither scale nor guard, so the host waits and decides
            if clip is not None:
                torch._foreach_div_(grads, clip)
            if torch.isfinite(grad_norm):
                self.optimizer.step()
            return grad_norm
        # fused AdamW divides by grad_scale as it reads the gradient, so clipping needs no separate
        # pass; it changes nothing if found_inf is 1
        self.optimizer.grad_scale = clip  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        return grad_norm

    def check(self, loss: float, grad_norm: float, step: int) -> None:
        """Stop after too many bad steps in a row; fp16's scaler may skip a few while it settles.

        Args:
            loss: loss of the step, in nats per token.
            grad_norm: norm of its gradient before clipping.
            step: its number, for the message.

        Raises:
            UserError: the loss or gradient was not finite ``MAX_SKIPPED`` times in a row; names
                the first bad tensor.
        """
        finite = abs(loss) < float("inf") and abs(grad_norm) < float("inf")
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= MAX_SKIPPED:
            raise UserError(
                f"training diverged: loss {loss}, gradient norm {grad_norm} at step {step}, "
                f"{self.skipped} steps in a row; {self._first_bad_tensor()} "
                "(try a lower --lr, --dtype fp32 or --impl reference)"
            )

    def _first_bad_tensor(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(whole(parameter)).all():
                return f"first non-finite weight: {name}"
            if parameter.grad is not None and not torch.isfinite(whole(parameter.grad)).all():
                return f"first non-finite gradient: {name}"
        return "all weights and gradients are finite"
