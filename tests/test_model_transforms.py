"""Derivatives of every kind: torch.func's transforms, forward mode, and create_graph."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

from fastgpt2 import kernels
from tests.kernels.test_arguments import CONTRACTS, NO_GRADIENT
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

# attention of one row, LayerNorm and so on: what has a gradient and is not a product in FP8
OPS = sorted(set(CONTRACTS) - (NO_GRADIENT - {"decode_linear"}) - {"linear_fp8"})


def _function(op: str, impl: str) -> tuple[Any, list[Tensor]]:
    """The op's outputs, squared and summed, as a function of its floating-point tensors."""
    torch.manual_seed(1)
    contract = CONTRACTS[op]
    arguments = contract.arguments() | ({"impl": impl} if contract.options else {})
    names = list(contract.floating)

    def function(*tensors: Tensor) -> Tensor:
        outputs = getattr(kernels, op)(**(arguments | dict(zip(names, tensors, strict=True))))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum((x.square().sum() for x in outputs), torch.zeros(()))

    return function, [arguments[name] for name in names]


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_agrees_with_backward(op: str) -> None:
    function, tensors = _function(op, "auto")
    directions = tuple(torch.randn_like(x) for x in tensors)
    found = jvp(function, tuple(tensors), directions)[1]
    leaves = [x.clone().requires_grad_() for x in tensors]
    grads = torch.autograd.grad(function(*leaves), leaves)
    expected = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_transforms_agree_with_autograd(op: str) -> None:
    function, tensors = _function(op, "auto")
    batch = [torch.stack([x, x * 0.5]) for x in tensors]
    wrt = tuple(range(len(tensors)))
    rows = [[x[i].clone().requires_grad_() for x in batch] for i in range(2)]
    expected = [torch.autograd.grad(function(*row), row) for row in rows]
    each = vmap(grad(function, wrt))(*batch)
    total = grad(lambda *xs: vmap(function)(*xs).sum(), wrt)(*batch)
    for found in (each, total):
        for i in range(2):
            for a, b in zip(found, expected[i], strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["layer_norm", "linear_cross_entropy", "tied_embedding", "mlp"])
def test_triton_by_name_refuses_transforms(op: str) -> None:
    function, tensors = _function(op, "triton")
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        grad(function)(*tensors)


@pytest.mark.parametrize("fused_loss", [True, False])
def test_per_sample_gradients_of_a_model(fused_loss: bool) -> None:
    model, (idx, targets) = tiny_gpt(), tiny_batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], idx: Tensor, targets: Tensor) -> Tensor:
        options = {"fused_loss": fused_loss}
        result = functional_call(model, parameters, (idx[None], targets[None]), options)
        return result[1]  # type: ignore[no-any-return]

    found = vmap(grad(loss), (None, 0, 0))(parameters, idx, targets)
    for row in range(3):
        expected = gradients(model, idx[row : row + 1], targets[row : row + 1])
        for name in parameters:
            torch.testing.assert_close(found[name][row], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_create_graph_gives_the_gradients_and_no_wrong_second_ones(impl: str) -> None:
    (idx, targets), model = tiny_batch(), tiny_gpt(impl=impl)
    plain = gradients(model, idx, targets)
    loss, parameters = model(idx, targets)[1], dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    for name, value in zip(parameters, found, strict=True):
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
    norm = sum((x.square().sum() for x in found), torch.zeros(()))
    if impl == "reference":
        assert all(x.isfinite().all() for x in torch.autograd.grad(norm, list(parameters.values())))
        return
    with pytest.raises(RuntimeError, match=r"double backward is not supported|is not implemented"):
        torch.autograd.grad(norm, list(parameters.values()))


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("upstream", [1.0, float("inf"), float("nan")])
def test_a_loss_of_no_targets_has_zero_gradients(impl: str, upstream: float) -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.full((4,), -100)
    extra: tuple[dict[str, Any], ...] = ({}, {"z_loss": 0.1, "label_smoothing": 0.1})
    for options in extra:
        losses = (
            kernels.linear_cross_entropy(x, weight, targets, impl=impl, **options),
            kernels.cross_entropy(logits, targets, impl=impl, **options),
        )
        grads = torch.autograd.grad(losses, (x, weight, logits), [torch.tensor(upstream)] * 2)
        assert not any(g.any() for g in grads)
