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
from fastgpt2.evaluate.windows import Window, Windows, make_batch
from fastgpt2.generate.beams import BeamSearch
from fastgpt2.generate.checks import (
    as_ids,
    check_generator,
    check_prompt,
    evaluating,
    row_generator,
    split_stops,
    stops_of,
)
from fastgpt2.generate.generator import Generator
from fastgpt2.generate.processors import Processor, is_count, plain, require
from fastgpt2.generate.request import likeliest
from fastgpt2.generate.sampling import Sampling
from fastgpt2.generate.slots import Slots
from fastgpt2.model import GPT

# rows that run at once if each has random numbers of its own
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
    best_of: int = 1,
    attention_mask: Tensor | None = None,
    seed: int | None = None,
    window: str = "crop",
    draft: GPT | None = None,
    prompt_lookup: int = 0,
    compile: bool = False,
) -> Tensor | list[list[int]]:
    """See ``GPT.generate``."""
    rows, stops = _rows(prompts, attention_mask), stops_of(stop)
    max_new_tokens, num_beams, best_of = map(plain, (max_new_tokens, num_beams, best_of))
    temperature, top_k, seed = plain(temperature), plain(top_k), plain(seed)
    check_generator(generator)
    stop_ids, stop_texts = split_stops(model, stops)
    if stop_texts:
        raise UserError("generate: stop takes token ids; for strings use Generator, or the command")
    counts = (("max_new_tokens", max_new_tokens, 0), ("num_beams", num_beams, 1))
    for name, value, least in (*counts, ("best_of", best_of, 1)):
        require(name, value, is_count(value, least), f"an integer of {least} or more")
    if best_of > 1 and (temperature == 0 or num_beams > 1):
        raise UserError("best_of: greedy decoding and beams write the same text each time")
    if num_beams == 1 and (length_penalty != 1.0 or early_stopping):
        raise UserError("length_penalty and early_stopping are for beams; give num_beams")
    longest = max(len(row) for row in rows) + max(max_new_tokens, 1) - 1
    size = max(1, min(model.config.block_size, longest))
    if num_beams > 1:
        if draft is not None or prompt_lookup:
            raise UserError("generate: beams take no draft and no prompt_lookup")
        sampling = beam_sampling(temperature, top_k, processors)
        search = BeamSearch(
            Slots(model, num_beams, size, compile=compile),
            num_beams,
            window,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )
        texts = [
            search.search(row, max_new_tokens, sampling=sampling, stop=stop_ids)[0].ids
            for row in rows
        ]
    else:
        copies = [row for row in rows for _ in range(best_of)]
        is_nanogpts = isinstance(prompts, Tensor) and attention_mask is None and seed is None
        engine = Generator(
            model,
            batch_size=len(copies) if is_nanogpts else min(len(copies), _BATCH_SIZE),
            size=size,
            window=window,
            draft=draft,
            prompt_lookup=prompt_lookup,
            compile=compile,
        )
        if is_nanogpts:
            sources = [default_generator(engine.slots.device) if generator is None else generator]
            sources *= len(copies)
        else:
            sources = _row_generators(engine.slots.device, copies, seed, generator)
        streams = [
            engine.submit(
                row,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                processors=processors,
                stop=stop_ids,
                generator=source,
                log_probs=best_of > 1,
            )
            for row, source in zip(copies, sources, strict=True)
        ]
        engine.run()
        every = range(0, len(streams), best_of)
        texts = [likeliest(streams[i : i + best_of]).ids for i in every]
    if not isinstance(prompts, Tensor):
        return [[*row, *text] for row, text in zip(rows, texts, strict=True)]
    # rows that stopped early are filled with the first stop id
    T, fill = max(map(len, texts)), stops[0] if stops else 0
    padded = [[*text, *[fill] * (T - len(text))] for text in texts]
    new = torch.tensor(padded, dtype=prompts.dtype, device=prompts.device)
    return torch.cat([prompts, new.view(len(rows), T)], dim=1)


def log_probs(model: GPT, ids: Prompts, batch_size: int = 8) -> Tensor | list[list[float]]:
    """See ``GPT.log_probs``."""
    batch_size = plain(batch_size)
    require("batch_size", batch_size, is_count(batch_size, 1), "an integer of 1 or more")
    rows = _rows(ids, None)
    for row in rows:
        check_prompt(model, row, "slide")
    block_size = model.config.block_size
    # the rows side by side, and the windows of all of them
    tokens = np.concatenate([np.array(row) for row in rows])
    ends = np.cumsum([len(row) for row in rows]).tolist()
    windows: list[Window] = []
    for row, end in zip(rows, ends, strict=True):
        if len(row) > 1:
            context = min(block_size + 1, len(row))
            of_row = Windows(len(row), context, max(1, context // 2), block_size)
            # from indices in the row to indices in all rows
            first = end - len(row)
            windows += [Window(*(first + at for at in of_row[k])) for k in range(len(of_row))]
    values: list[float] = []
    with evaluating(model):
        for k in range(0, len(windows), batch_size):
            idx, targets = make_batch(tokens, windows[k : k + batch_size])
            values += (-score(model, idx, targets, torch.float32).nll).tolist()
    results = []
    for row in rows:
        results.append(values[: len(row) - 1])
        del values[: len(row) - 1]
    if not isinstance(ids, Tensor):
        return results
    return torch.tensor(results, dtype=torch.float32, device=ids.device).view(len(rows), -1)


def beam_sampling(
    temperature: float, top_k: int | None, processors: Sequence[Processor]
) -> Sampling:
    """The options that beams can use: processors that change scores without drawing.

    Raises:
        UserError: one of them is for drawing, and beams draw nothing.
    """
    sampling = Sampling(0.0, None, processors)
    drawing = any(getattr(p, "warps", False) for p in sampling.processors)
    if temperature not in (0, 1) or top_k is not None or drawing:
        raise UserError("beams draw nothing: they take no temperature, top_k, top_p or similar")
    return sampling


def _rows(prompts: Prompts, mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding.

    Raises:
        UserError: there are none, or a shape or the mask is not as it should be.
    """
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.dtype not in (torch.int32, torch.int64):
            raise UserError(
                "prompts must be int32 or int64 ids of shape (B, T), got "
                f"{str(prompts.dtype).removeprefix('torch.')} of shape {tuple(prompts.shape)}"
            )
        rows: list[list[int]] = prompts.tolist()
    elif not isinstance(prompts, Iterable):
        raise UserError(f"prompts: expected lists of token ids, got {prompts!r:.80}")
    else:
        rows = [as_ids(row) for row in prompts]
    if not rows:
        raise UserError("prompts: at least one is needed")
    if mask is None:
        return rows
    mask = torch.as_tensor(mask)
    if not isinstance(prompts, Tensor) or mask.shape != prompts.shape:
        raise UserError("attention_mask: prompts must be a tensor, and the mask of its shape")
    kept = mask.bool().tolist()
    if any(sum(a != b for a, b in pairwise([False, *flags, False])) != 2 for flags in kept):
        raise UserError("attention_mask: a row's tokens must be adjacent, with padding at the ends")
    return [[t for t, k in zip(*pair, strict=True) if k] for pair in zip(rows, kept, strict=True)]


def _row_generators(
    device: torch.device,
    rows: list[list[int]],
    seed: int | None,
    generator: torch.Generator | None,
) -> list[torch.Generator]:
    """A source for each row, the same in any batch; copies of a prompt get different ones."""
    if seed is None:
        place = device if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=place))
    return [row_generator(device, s) for s in seeds_of(rows, seed)]


def seeds_of(prompts: Iterable[Sequence[int] | str], seed: int) -> list[int]:
    """Seeds of prompts: ``seed`` plus how many times the same prompt has come before."""
    seen: Counter[Hashable] = Counter()
    seeds = []
    for prompt in prompts:
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        seeds.append(seed + seen[key])
        seen[key] += 1
    return seeds
