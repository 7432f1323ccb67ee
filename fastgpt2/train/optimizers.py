"""AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the rest."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastgpt2.devices import device_kind
from fastgpt2.model import GPT
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.parallel import own, placed_like, whole_like

# momentum grows linearly from MOMENTUM_START over the first steps (Jordan et al., "Muon", 2024)
MOMENTUM_START = 0.85

# a Newton-Schulz step is X <- a X + (b X X^T + c (X X^T)^2) X
Coefficients = tuple[float, float, float]


def build_optimizer(model: GPT, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names, over the parameters that are trained.

    Args:
        model: on its device already.
        config: rates, moments and weight decay.
    """
    device_type = model.lm_head.weight.device.type
    adamw = model.configure_optimizers(
        config.weight_decay, config.lr, (config.beta1, config.beta2), device_type
    )
    if config.optimizer == "adamw":
        return adamw
    matrices = {p for name, p in model.named_parameters() if p.requires_grad and for_muon(name, p)}
    if not matrices:
        return adamw
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if p not in matrices]
    muon = Muon(
        [p for p in model.parameters() if p in matrices],
        lr=config.muon_lr,
        momentum=config.muon_momentum,
        weight_decay=config.muon_weight_decay,
    )
    # one schedule moves both learning rates
    muon.param_groups[0]["lr_ratio"] = config.muon_lr / config.lr
    return MuonAndAdamW(muon, adamw)


def for_muon(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates the parameter: a matrix of a block.

    Embeddings and the head are matrices too, but their gradients are sparse, one row per token.
    """
    return parameter.dim() == 2 and ".h." in f".{name}"


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate, where ``lr`` is AdamW's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def set_momentum(
    optimizer: torch.optim.Optimizer, step: int, *, momentum: float, warmup_steps: int
) -> None:
    """Give Muon its momentum at ``step``, from 0: linear up to ``momentum`` in ``warmup_steps``."""
    share = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    start = min(MOMENTUM_START, momentum)
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = start + share * (momentum - start)


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments in fp32, of all processes: AdamW keeps two per parameter, Muon one."""
    return sum(
        4 * (1 if "momentum" in group else 2) * sum(p.numel() for p in group["params"])
        for group in optimizer.param_groups
    )


def update_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an update takes in one process, beside weights, gradients and moments.

    AdamW computes in place. Muon has, for the matrices of one shape: their gradients with the
    guard, what the momentum makes of them, both for the whole matrices before and after the
    iteration, and four of the iteration's square matrices.
    """
    peak = 0
    for group in optimizer.param_groups:
        for batch in _by_shape(group["params"]) if "momentum" in group else ():
            part, whole = (sum(x.numel() for x in xs) for xs in ([own(p) for p in batch], batch))
            gathered = 0 if part == whole else whole
            squares = sum(min(p.shape) ** 2 for p in batch)
            peak = max(peak, 4 * (2 * part + gathered + 2 * whole + 4 * squares))
    return peak


def _by_shape(matrices: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of one shape, or of its transpose, together."""
    batches: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        batches[min(matrix.shape), max(matrix.shape)].append(matrix)
    return list(batches.values())


class Muon(torch.optim.Muon):
    """PyTorch's Muon, faster on small matrices, and with the guard that fused AdamW has.

    The update is that of ``torch.optim.Muon`` with the original adjustment of the learning rate:
    M <- mu M + (1 - mu) G, U = orthogonal((1 - mu) G + mu M), W <- (1 - lr decay) W - lr s U, with
    s = sqrt(max(1, rows / columns)). Matrices of one shape, or of its transpose, are orthogonalised
    in one batch. The iteration is in bf16 on a GPU and in fp32 on a CPU. ``grad_scale`` divides the
    gradients, and if ``found_inf`` is 1 nothing changes; the device decides. If parameters are
    sharded, so are the moments; each process orthogonalises all matrices and keeps its part.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all matrices once; ``closure`` is not used."""
        for group in self.param_groups:
            for parameters in _by_shape([p for p in group["params"] if p.grad is not None]):
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, decay, momentum = group["lr"], group["weight_decay"], group["momentum"]
        grads = [self._gradient(p) for p in parameters]
        moments = [own(self._moment(p)) for p in parameters]
        keep = 1.0 if self.found_inf is None else 1.0 - self.found_inf
        torch._foreach_add_(
            moments, torch._foreach_mul(torch._foreach_sub(grads, moments), keep * (1.0 - momentum))
        )
        updates = torch._foreach_lerp(grads, moments, momentum)
        pairs = zip(parameters, updates, strict=True)
        wholes = [whole_like(p, u) for p, u in pairs]
        flat = [u if u.shape[0] <= u.shape[1] else u.T for u in wholes]
        orthogonal = orthogonalize(torch.stack(flat), group["ns_coefficients"], group["ns_steps"])
        sizes = [-lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 for p in parameters]
        scale = torch.tensor(sizes, device=orthogonal.device, dtype=orthogonal.dtype) * keep
        orthogonal *= scale[:, None, None]
        out = [
            own(placed_like(p, u if p.shape[0] <= p.shape[1] else u.T))
            for p, u in zip(parameters, orthogonal.unbind(), strict=True)
        ]
        weights = [own(p) for p in parameters]
        if decay:
            torch._foreach_mul_(weights, 1.0 - lr * decay * keep)
        torch._foreach_add_(weights, out)

    def _gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        grad = own(parameter.grad)
        if self.grad_scale is not None:
            grad = grad / self.grad_scale
        # no multiplication by zero: zero times a NaN is a NaN
        return grad if self.found_inf is None else torch.where(self.found_inf > 0, 0.0, grad)

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        moment: Tensor = state["momentum_buffer"]
        return moment


def orthogonalize(x: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """(n, rows, columns) with rows <= columns -> nearly the closest matrices with U U^T = 1.

    A quintic Newton-Schulz iteration brings all singular values near 1, to about 0.7 .. 1.2. It
    runs on the Gram matrix G = X X^T, (n, rows, rows), which every factor P = a + b G + c G^2
    commutes with: G <- P G P and Q <- P Q, and X is multiplied by Q once, at the end.
    """
    a, b, c = coefficients
    x = x.bfloat16() if device_kind(x.device).cuda else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # the iteration itself is in fp32: G has the squares of the singular values
    gram = (x @ x.mT).float()
    product: Tensor | None = None
    for step in range(steps):
        # P - a, so that a is added exactly
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if product is None:
            product = factor + a * torch.eye(x.shape[1], device=x.device)
        else:
            product = torch.baddbmm(product, factor, product, beta=a)
        if step + 1 < steps:
            half = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(half, half, factor, beta=a)
    return x.float() if product is None else (product.to(x.dtype) @ x).float()


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimizers that look like one: the same groups, one state."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW) -> None:
        self._parts: tuple[Any, ...] = (muon, adamw)
        # the same dicts as in the parts: a learning rate that is set here is set there
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters once; ``closure`` is not used."""
        for part in self._parts:
            part.grad_scale, part.found_inf = self.grad_scale, self.found_inf
            part.step()
