"""Documents in one block are each as they are alone: loss, gradients, logits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt2.kernels import use_impl
from fastgpt2.layers import CausalSelfAttention
from fastgpt2.text.loaders import BlockLoader
from fastgpt2.text.packing import document_ids, inside_documents, packed
from fastgpt2.transformer import positions_in_segments
from tests.tiny_gpt import tiny_gpt

EOT = 0
LENGTHS = (7, 1, 12, 4)


def documents() -> list[Tensor]:
    """Random tokens, each list with the end-of-text id at its end."""
    generator = torch.Generator().manual_seed(0)
    bodies = (torch.randint(1, 65, (length,), generator=generator) for length in LENGTHS)
    return [torch.cat([body, torch.tensor([EOT])]) for body in bodies]


def block() -> tuple[Tensor, Tensor]:
    tokens = torch.cat(documents())
    idx, targets = tokens[None, :-1], tokens[None, 1:]
    return idx, inside_documents(idx, targets, EOT)


def test_numbers_and_positions_of_documents() -> None:
    idx = torch.tensor([[5, 6, EOT, 7, EOT, EOT, 8, 9]])
    ids = document_ids(idx, EOT)
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3]]
    assert positions_in_segments(ids).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    # ids need not be ascending
    assert positions_in_segments(torch.tensor([[4, 4, 1, 1, 4]])).tolist() == [[0, 1, 0, 1, 0]]
    targets = inside_documents(idx, torch.arange(8)[None], EOT)
    assert targets.tolist() == [[0, 1, -100, 3, -100, -100, 6, 7]]


@pytest.fixture(params=["reference", "torch"])
def impl(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_impl(request.param):
        yield


def alone(model: Any) -> Tensor:
    """The loss of the documents one by one, the mean over all their targets."""
    total, count = torch.zeros(()), 0
    for tokens in documents():
        loss = model(tokens[None, :-1], tokens[None, 1:])[1]
        total = total + loss * (len(tokens) - 1)
        count += len(tokens) - 1
    return total / count


@pytest.mark.parametrize("fused", [True, False])
def test_loss_and_gradients_are_those_of_the_documents_alone(impl: None, fused: bool) -> None:
    model = tiny_gpt(0, block_size=32, vocab_size=65)
    idx, targets = block()
    model.train(fused)
    loss = packed(model, EOT)(idx, targets)[1]
    torch.autograd.backward(loss)
    together = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    expected = alone(model)
    torch.autograd.backward(expected)
    # fp32: a few roundings of sums of 24 numbers
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    for ours, parameter in zip(together, model.parameters(), strict=True):
        assert parameter.grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(ours, parameter.grad, rtol=0, atol=2e-6 * max(scale, 1.0))
    # without the documents' borders the loss is another one
    assert abs(model(idx, targets)[1].item() - expected.item()) > 1e-4


def test_what_stands_before_a_document_changes_nothing() -> None:
    model = tiny_gpt(0, block_size=32, vocab_size=65).eval()
    idx, _ = block()
    ids = document_ids(idx, EOT)
    other = idx.clone()
    other[0, :7] = torch.arange(10, 17)
    both = [model.head(model.hidden_states(x, segment_ids=ids)) for x in (idx, other)]
    assert torch.equal(both[0][:, 8:], both[1][:, 8:])
    assert not torch.equal(both[0][:, :8], both[1][:, :8])
    # the last position's logits, too
    last = model(idx, segment_ids=ids)[0]
    assert last is not None
    torch.testing.assert_close(last, both[0][:, -1:])


def test_modules_that_are_called_get_the_documents() -> None:
    """A hook on the attention, and a token embedding of somebody else."""
    idx, targets = block()
    expected = packed(tiny_gpt(0, block_size=32, vocab_size=65).eval(), EOT)(idx, targets)[1]
    model = tiny_gpt(0, block_size=32, vocab_size=65).eval()
    seen = []
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.register_forward_hook(lambda *call: seen.append(call))
    model.transformer.wte.register_forward_hook(lambda *call: seen.append(call))
    loss = packed(model, EOT)(idx, targets)[1]
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)
    assert len(seen) == 1 + len(model.transformer.h)
    assert isinstance(model.transformer.wte, nn.Embedding)


def test_the_loader_does_not_predict_across_documents() -> None:
    tokens = torch.cat(documents()).repeat(4)
    batches = [
        next(BlockLoader(tokens, block_size=16, batch_size=3, eot=eot)) for eot in (None, EOT)
    ]
    (plain, targets), (idx, inside) = batches
    assert torch.equal(plain, idx)
    assert (inside[idx == EOT] == -100).all() and (idx == EOT).any()
    assert torch.equal(inside[idx != EOT], targets[idx != EOT])
