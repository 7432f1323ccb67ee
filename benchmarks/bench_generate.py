"""Generation with a key/value cache, side by side: the prompt (prefill) and each token after it.

All have the same random weights and prompts, choose greedily, and must write the reference's text
(in fp32, where no tie decides) before anything is timed. ``prefill`` is one new token after a
prompt of T tokens, ``decode`` many after a prompt of one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.generators import MAKERS, Generate, Place, ours
from benchmarks.harness import Lane, Race, Scale, Settings
from benchmarks.timing import Ceilings, Work
from fastgpt2.config import GPTConfig
from fastgpt2.train.summary import dtype_name

CHECKED_TOKENS = 6


@dataclass(frozen=True)
class Sizes:
    """Batch sizes B, T tokens of a prompt to prefill, tokens to decode after a prompt of one."""

    batches: tuple[int, ...]
    T: int
    new: int


SIZES = {
    Scale.CUDA: Sizes((1, 8, 64), 512, 256),
    Scale.CPU: Sizes((1, 8, 64), 32, 16),
    Scale.DRY: Sizes((1, 2), 5, 3),
}


@dataclass
class Players:
    """Everyone who has been made and checked so far, on the same weights; all races share them."""

    place: Place
    checked: dict[str, Generate] = field(default_factory=dict)
    expected: Tensor | None = None

    def get(self, name: str) -> Generate:
        """One that writes what the reference writes.

        Raises:
            AssertionError: it writes something else.
        """
        if name not in self.checked:
            exact = replace(self.place, dtype=torch.float32)
            prompt = self.prompt(2, 4)
            if self.expected is None:
                self.expected = ours(exact, "reference")(prompt, CHECKED_TOKENS)
            player = MAKERS[name](exact)
            text = player(prompt, CHECKED_TOKENS)
            assert torch.equal(text, self.expected), f"{name} writes {text}, not {self.expected}"
            self.checked[name] = player if exact == self.place else MAKERS[name](self.place)
        return self.checked[name]

    def prompt(self, B: int, T: int) -> Tensor:
        """Random tokens (B, T), the same every time."""
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.place.config.vocab_size, (B, T), generator=generator)
        return tokens.to(self.place.device)


class GenerateRace(Race):
    """Everyone's prefill, or everyone's decoding, at one batch size."""

    def __init__(self, players: Players, phase: str, B: int, sizes: Sizes, last: bool) -> None:
        self.players, self.phase, self.B, self.last = players, phase, B, last
        self.T, self.new = (sizes.T, 1) if phase == "prefill" else (1, sizes.new)
        self.dtype = dtype_name(players.place.dtype)
        self.group = f"{phase} {self.dtype} B{B} T{self.T}+{self.new}"
        # on a CPU, ours is on PyTorch's operators anyway
        on_gpu = players.place.device.type == "cuda"
        self.contenders = tuple(name for name in MAKERS if on_gpu or name != "fastgpt2 torch")

    def prepare(self, name: str, settings: Settings) -> Work:
        """One that writes the right text."""
        generate, prompt = self.players.get(name), self.players.prompt(self.B, self.T)

        def work() -> Tensor:
            return generate(prompt, self.new)

        shape = tuple(work().shape)
        assert shape == (self.B, self.T + self.new), f"{name} writes {shape}"
        return work

    def facts(self, name: str, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
        """Tokens per second: those of the prompts, or the new ones."""
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
        """The models go with the last race."""
        if self.last:
            self.players.checked.clear()


def races(settings: Settings) -> list[Race]:
    """Prefill and decode at each batch size."""
    dry, on_gpu = settings.scale is Scale.DRY, settings.scale is Scale.CUDA
    tiny = GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)
    config = tiny if dry else GPTConfig.preset("gpt2")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    players, sizes = Players(Place(config, settings.device, dtype)), SIZES[settings.scale]
    rounds = [(phase, B) for phase in ("prefill", "decode") for B in sizes.batches]
    return [GenerateRace(players, *each, sizes, each == rounds[-1]) for each in rounds]


def test_generate(lane: Lane, record: Callable[[Lane], None]) -> None:
    """One contender in one phase at one batch size."""
    record(lane)
