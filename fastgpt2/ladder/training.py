"""Rung 12: the loss, and the loop that lowers it."""

import math
from collections.abc import Iterable, Sequence, Sized
from itertools import islice
from textwrap import shorten
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastgpt2.errors import UserError
from fastgpt2.ladder.sampling import generate_text_simple
from fastgpt2.ladder.windows import Encoder
from fastgpt2.text.encoding import encode_special

_SAMPLE_TOKENS = 50


class Batches(Sized, Iterable[tuple[Tensor, Tensor]], Protocol):
    """Batches (inputs, targets) that can be counted and gone through again: a ``DataLoader``."""


def text_to_token_ids(text: str, tokenizer: Encoder) -> Tensor:
    """A text as a batch of one, (1, T) int64; ``<|endoftext|>`` in it is one token."""
    return torch.tensor([encode_special(tokenizer, text)])


def token_ids_to_text(token_ids: Tensor, tokenizer: Encoder) -> str:
    """The text of a batch of one, (1, T)."""
    return tokenizer.decode(token_ids.squeeze(0).tolist())


def calc_loss_batch(
    input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: torch.device | str
) -> Tensor:
    """Cross-entropy of the targets, -mean(log softmax(logits)[target]), in nats per token.

    Args:
        input_batch, target_batch: (B, T) token ids; the targets are the inputs moved on by one.
        model: gives logits (B, T, V).
        device: where the model is; the batch is moved there.
    """
    logits = model(input_batch.to(device))
    return F.cross_entropy(logits.flatten(0, 1), target_batch.to(device).flatten())


@torch.no_grad()
def calc_loss_loader(
    data_loader: Batches,
    model: nn.Module,
    device: torch.device | str,
    num_batches: int | None = None,
) -> float:
    """Mean over the batches of ``calc_loss_batch``: over the first ``num_batches``, or all of them.

    NaN where there is no batch. Put the model in evaluation mode first.
    """
    losses = [
        calc_loss_batch(inputs, targets, model, device).item()
        for inputs, targets in islice(data_loader, num_batches)
    ]
    return sum(losses) / len(losses) if losses else math.nan


def evaluate_model(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    device: torch.device | str,
    eval_iter: int,
) -> tuple[float, float]:
    """Training and validation loss over ``eval_iter`` batches each, without dropout."""
    model.eval()
    losses = [
        calc_loss_loader(loader, model, device, eval_iter) for loader in (train_loader, val_loader)
    ]
    model.train()
    return losses[0], losses[1]


def train_model_simple(
    model: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Encoder,
) -> tuple[list[float], list[float], list[int]]:
    """Train, print both losses every ``eval_freq`` steps and a sample after each epoch.

    Args:
        model: a ``GPTModel``, this package's or the book's; is left in training mode.
        train_loader, val_loader: batches (inputs, targets) of (B, T) token ids.
        optimizer: over the model's parameters.
        device: where the model is.
        num_epochs: how often to go through the training batches.
        eval_freq: steps from one evaluation to the next; the first is after the first step.
        eval_iter: batches an evaluation looks at in each of the loaders.
        start_context: what the samples continue.
        tokenizer: turns it into ids, and the sample into text.

    Returns:
        training losses, validation losses, and the tokens seen so far at each evaluation.

    Raises:
        UserError: the model has no position embedding, from which the samples' context is read.
    """
    # check now what a sample needs, not after a whole epoch
    _context_size(model)
    text_to_token_ids(start_context, tokenizer)
    train_losses: list[float] = []
    val_losses: list[float] = []
    track_tokens_seen: list[int] = []
    tokens_seen = step = 0
    for epoch in tqdm(range(1, num_epochs + 1), desc="epochs", disable=None):
        model.train()
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(inputs, targets, model, device).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            tokens_seen += inputs.numel()
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(
                    model, train_loader, val_loader, device, eval_iter
                )
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(
                    f"Ep {epoch} (Step {step:06d}): "
                    f"Train loss {train_loss:.3f}, Val loss {val_loss:.3f}"
                )
            step += 1
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


def generate_and_print_sample(
    model: nn.Module, tokenizer: Encoder, device: torch.device | str, start_context: str
) -> None:
    """Print the greedy continuation of ``start_context``, 50 tokens on one line.

    Args:
        model: a ``GPTModel``, this package's or the book's; is left in training mode.
        tokenizer: turns the text into ids, and the sample into text.
        device: where the model is.
        start_context: what the sample continues.
    """
    model.eval()
    idx = text_to_token_ids(start_context, tokenizer).to(device)
    out = generate_text_simple(model, idx, _SAMPLE_TOKENS, _context_size(model))
    print(token_ids_to_text(out, tokenizer).replace("\n", " "))
    model.train()


def _context_size(model: nn.Module) -> int:
    """The positions that a model has; the book's own GPTModel keeps no configuration."""
    pos_emb = getattr(model, "pos_emb", None)
    if not isinstance(pos_emb, nn.Embedding):
        raise UserError(f"{type(model).__name__}: no pos_emb, so the context length is unknown")
    return pos_emb.num_embeddings


def plot_losses(
    epochs_seen: Sequence[float] | Tensor,
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
) -> None:
    """Draw both losses against epochs and tokens, into ``loss-plot.pdf``; show it on a screen.

    A picture that cannot be drawn is one line: the trained model must not be lost with it.

    Args:
        epochs_seen: epochs at each evaluation.
        tokens_seen: tokens at each evaluation.
        train_losses, val_losses: the losses there, nats per token.
    """
    try:
        _draw_losses(epochs_seen, tokens_seen, train_losses, val_losses)
    except Exception as error:
        print(f"loss-plot.pdf: not drawn ({shorten(str(error), 200, placeholder=' ...')})")


def _draw_losses(
    epochs_seen: Sequence[float] | Tensor,
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(epochs_seen, train_losses, label="training")
    axes.plot(epochs_seen, val_losses, "-.", label="validation")
    axes.set_xlabel("epochs")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    # an invisible curve gives the second scale its range
    above = axes.twiny()
    above.plot(tokens_seen, train_losses, alpha=0)
    above.set_xlabel("tokens seen")
    figure.savefig("loss-plot.pdf")
    if plt.get_backend().lower() != "agg":
        plt.show()
    plt.close(figure)
