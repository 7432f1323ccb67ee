"""Generation with a key/value cache, side by side: the prompt (prefill) and each token after it.

All have the same random weights and prompts, choose greedily, and must write the same text (in
fp32, where ties do not occur) before anything is timed: the text of transformers, or of our
reference if it is not installed. In int8 only ours is checked, against our uncompiled form, because
each program rounds weights differently. ``prefill`` is one new token after a prompt of T tokens,
``decode`` many after a short prompt.
nanoGPT races on a small model, where the host's work is all there is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.generators import MAKERS, Generate, Place, ours
from benchmarks.harness import Lane, Race, Scale, Settings, compute_dtype
from benchmarks.timing import Ceilings, Work
from fastgpt2.config import GPTConfig
from fastgpt2.train.summary import dtype_name

# length of the text that all must write, in tokens
CHECKED_TOKENS = {Scale.CUDA: 128, Scale.CPU: 128, Scale.DRY: 6}
SMALL = GPTConfig(block_size=256, vocab_size=65, n_layer=4, n_head=4, n_embd=128)


@dataclass(frozen=True)
class Sizes:
    """Batch sizes B, T tokens of a prompt to prefill, tokens to decode after a short prompt."""

    prefills: tuple[int, ...]
    decodes: tuple[int, ...]
    T: int
    short: int
    new: int


SIZES = {
    Scale.CUDA: Sizes((1, 8, 64), (1, 8, 64), 512, 32, 256),
    Scale.CPU: Sizes((1,), (1, 8), 512, 32, 32),
    Scale.DRY: Sizes((1, 2), (1, 2), 5, 1, 3),
}


@dataclass
class Players:
    """The generators made and checked so far, with the same weights; all races share them."""

    place: Place
    checked_tokens: int
    checked: dict[str, Generate] = field(default_factory=dict)
    expected: Tensor | None = None

    def get(self, name: str) -> Generate:
        """The generator of that name, checked against the reference's text.

        Raises:
            AssertionError: it writes something else.
        """
        if name not in self.checked:
            exact = replace(self.place, dtype=torch.float32)
            prompt, count = self.prompt(1, 4), self.checked_tokens
            if self.expected is None:
                self.expected = self._reference(exact)(prompt, count)
            player = MAKERS[name](exact)
            if not self.place.int8 or name.startswith("fastgpt2"):
                text = player(prompt, count)
                assert torch.equal(text, self.expected), f"{name} writes another text: {text}"
            self.checked[name] = player if exact == self.place else MAKERS[name](self.place)
        return self.checked[name]

    @staticmethod
    def _reference(exact: Place) -> Generate:
        if exact.int8 or find_spec("transformers") is None:
            return ours(exact, "reference")
        return MAKERS["transformers"](exact)

    def prompt(self, B: int, T: int) -> Tensor:
        """Random tokens (B, T), the same every time."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.place.config.vocab_size, (B, T), generator=generator)
        return tokens.to(self.place.device)


class GenerateRace(Race):
    """Prefill or decoding at one batch size, with all generators."""

    def __init__(self, players: Players, phase: str, B: int, sizes: Sizes, last: bool) -> None:
        self.players, self.phase, self.B, self.last = players, phase, B, last
        self.T, self.new = (sizes.T, 1) if phase == "prefill" else (sizes.short, sizes.new)
        place = players.place
        self.dtype = dtype_name(place.dtype)
        kind = "int8" if place.int8 else self.dtype
        size = "small " if place.config == SMALL else ""
        self.group = f"{size}{phase} {kind} B{B} T{self.T}+{self.new}"
        on_gpu = place.device.type == "cuda"
        # on a CPU, ours always uses PyTorch's operators
        absent = set() if on_gpu else {"fastgpt2 torch"}
        # prompts are not compiled, and a dry run does not wait for a compiler
        dry = place.config.n_layer == 1
        absent |= {"fastgpt2 compiled"} if phase == "prefill" or dry else set()
        absent |= {"transformers"} if place.int8 else set()
        # without a cache, a model of the full size would take most of the time
        absent |= set() if size else {"nanogpt"}
        self.contenders = tuple(name for name in MAKERS if name not in absent)

    def prepare(self, name: str, settings: Settings) -> Work:
        """A generator that writes the right text."""
        generate, prompt = self.players.get(name), self.players.prompt(self.B, self.T)

        def work() -> Tensor:
            return generate(prompt, self.new)

        shape = tuple(work().shape)
        assert shape == (self.B, self.T + self.new), f"{name} writes {shape}"
        return work

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Tokens per second: of the prompts, or new ones."""
        tokens = self.B * (self.T if self.phase == "prefill" else self.new)
        flops = 2.0 * self.players.place.model("auto").get_num_params() * tokens
        return {
            "phase": self.phase,
            "dtype": self.dtype,
            "B": self.B,
            "T": self.T,
            "new_tokens": self.new,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "flops": flops,
            "TFLOP_per_s": flops / seconds / 1e12,
            "matmul_share": flops / seconds / ceilings.flops[self.dtype],
        }

    def close(self) -> None:
        """Free the models after the last race."""
        if self.last:
            self.players.checked.clear()


def races(settings: Settings) -> list[Race]:
    """Prefill and decode at each batch size, also in int8; on a CPU in fp32 and bf16.

    Where bf16 is slow, it is timed for one row only.
    """
    dry, on_gpu = settings.scale is Scale.DRY, settings.scale is Scale.CUDA
    tiny = GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
    config = tiny if dry else GPTConfig.preset("gpt2")
    sizes, checked = SIZES[settings.scale], CHECKED_TOKENS[settings.scale]
    exact = Place(config, settings.device, torch.float32)
    half = replace(exact, dtype=torch.bfloat16)
    few = sizes.decodes[:1]
    narrow = replace(half if on_gpu else exact, int8=True)
    rounds: list[tuple[Place, str, int]] = []
    if on_gpu:
        rounds += [(half, "prefill", B) for B in sizes.prefills]
        rounds += [(half, "decode", B) for B in sizes.decodes]
    else:
        rounds += [(exact, "prefill", B) for B in sizes.prefills]
        rounds += [(exact, "decode", B) for B in sizes.decodes]
        fast = compute_dtype(settings.scale) == torch.bfloat16
        rounds += [(half, "decode", B) for B in (sizes.decodes if fast else few)]
    rounds += [(narrow, "decode", B) for B in (few if dry else sizes.decodes)]
    if not dry:
        rounds.append((replace(exact, config=SMALL), "decode", 1))
    players = {place: Players(place, checked) for place, _, _ in rounds}
    last = {place: at for at, (place, _, _) in enumerate(rounds)}
    return [
        GenerateRace(players[place], phase, B, sizes, last[place] == at)
        for at, (place, phase, B) in enumerate(rounds)
    ]


def test_generate(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One contender in one phase at one batch size."""
    record(lane)
