"""``GPT.generate`` and ``GPT.log_probs``: a batch of token ids in, the same kind of batch out."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fastgpt2.devices import default_generator
from fastgpt2.errors import UserError
from fastgpt2.evaluate.scoring import score
from fastgpt2.evaluate.windows import Windows, make_batch
from fastgpt2.generate.beams import BeamSearch
from fastgpt2.generate.checks import check_prompt, evaluating, row_generator
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.processors import Processor
from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.slots import Slots
from fastgpt2.model import GPT
from fastgpt2.plain import execution_device

# rows that run at once where each has random numbers of its own
_BATCH_SIZE = 64
Prompts = Tensor | Sequence[Sequence[int]]


def generate(
    model: GPT,
    prompts: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    processors: Sequence[Processor] = (),
    stop: int | Sequence[int] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    window: str = "crop",
    draft: GPT | None = None,
    prompt_lookup: int = 0,
) -> Tensor | list[list[int]]:
    """See ``GPT.generate``."""
    rows = _rows(prompts, attention_mask)
    stops = (stop,) if isinstance(stop, int) else tuple(stop)
    if any(isinstance(item, str) for item in stops):
        raise UserError("generate: stop takes token ids; for strings use Generator, or the command")
    longest = max(len(row) for row in rows) + max(max_new_tokens, 1) - 1
    size = max(1, min(model.config.block_size, longest))
    if num_beams != 1:
        if draft is not None or prompt_lookup:
            raise UserError("generate: beams take no draft and no prompt_lookup")
        sampling = beam_sampling(temperature, top_k, processors)
        search = BeamSearch(
            Slots(model, max(1, num_beams), size),
            num_beams,
            window,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        texts = [
            search.search(row, max_new_tokens, sampling=sampling, stop=frozenset(stops))[0].ids
            for row in rows
        ]
    else:
        is_nanogpts = isinstance(prompts, Tensor) and attention_mask is None and seed is None
        engine = Generator(
            model,
            batch_size=len(rows) if is_nanogpts else min(len(rows), _BATCH_SIZE),
            size=size,
            window=window,
            draft=draft,
            prompt_lookup=prompt_lookup,
        )
        if is_nanogpts:
            sources = [default_generator(engine.slots.device) if generator is None else generator]
            sources *= len(rows)
        else:
            sources = _row_generators(engine.slots.device, rows, seed, generator)
        streams = [
            engine.submit(
                row,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                processors=processors,
                stop=stops,
                generator=source,
            )
            for row, source in zip(rows, sources, strict=True)
        ]
        engine.run()
        texts = [stream.ids for stream in streams]
    if not isinstance(prompts, Tensor):
        return [[*row, *text] for row, text in zip(rows, texts, strict=True)]
    # rows that stopped early are filled with the first stop id
    T, fill = max(map(len, texts)), stops[0] if stops else 0
    padded = [[*text, *[fill] * (T - len(text))] for text in texts]
    new = torch.tensor(padded, dtype=prompts.dtype, device=prompts.device)
    return torch.cat([prompts, new.view(len(rows), T)], dim=1)


def log_probs(model: GPT, ids: Prompts) -> Tensor | list[list[float]]:
    """See ``GPT.log_probs``."""
    rows = _rows(ids, None)
    device = execution_device(model.transformer.wpe)
    block_size = model.config.block_size
    results: list[list[float]] = []
    with evaluating(model):
        for row in rows:
            check_prompt(model, row, "slide")
            if len(row) == 1:
                results.append([])
                continue
            context = min(block_size + 1, len(row))
            windows = Windows(len(row), max(2, context), max(1, context // 2), block_size)
            tokens, values = np.array(row), []
            for k in range(len(windows)):
                idx, targets = make_batch(tokens, [windows[k]])
                values += (-score(model, idx.to(device), targets, torch.float32).nll).tolist()
            results.append(values)
    if not isinstance(ids, Tensor):
        return results
    return torch.tensor(results, dtype=torch.float32, device=ids.device).view(len(rows), -1)


def beam_sampling(
    temperature: float, top_k: int | None, processors: Sequence[Processor]
) -> Sampling:
    """What beams take of these options: the processors that edit.

    Raises:
        UserError: one of them is for drawing, and beams draw nothing.
    """
    drawing = [p for p in processors if getattr(p, "warps", False)]
    if temperature not in (0, 1) or top_k is not None or drawing:
        raise UserError("beams draw nothing: they take no temperature, top_k, top_p and the like")
    return Sampling(0.0, None, processors)


def _rows(prompts: Prompts, mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding.

    Raises:
        UserError: there are none, or a shape or the mask is not as it should be.
    """
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.is_floating_point():
            raise UserError(f"prompts must be ids of shape (B, T), got {tuple(prompts.shape)}")
        rows: list[list[int]] = prompts.tolist()
    else:
        rows = [list(row) for row in prompts]
    if not rows:
        raise UserError("prompts: at least one is needed")
    if mask is None:
        return rows
    if not isinstance(prompts, Tensor) or mask.shape != prompts.shape:
        raise UserError("attention_mask: must have the shape of the prompts, which are a tensor")
    kept = mask.bool().tolist()
    if any(sum(a != b for a, b in pairwise([False, *flags, False])) != 2 for flags in kept):
        raise UserError("attention_mask: each row needs tokens side by side, padding at one end")
    return [[t for t, k in zip(*pair, strict=True) if k] for pair in zip(rows, kept, strict=True)]


def _row_generators(
    device: torch.device,
    rows: list[list[int]],
    seed: int | None,
    generator: torch.Generator | None,
) -> list[torch.Generator]:
    """A source for each row: the same for a prompt in whatever batch, another for its next copy."""
    if seed is None:
        place = device if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=place))
    return [row_generator(device, s) for s in seeds_of(rows, seed)]


def seeds_of(prompts: Iterable[Sequence[int] | str], seed: int) -> list[int]:
    """Seeds of prompts: ``seed``, and one more for each time that the same prompt came before."""
    seen: Counter[Hashable] = Counter()
    seeds = []
    for prompt in prompts:
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        seeds.append(seed + seen[key])
        seen[key] += 1
    return seeds
