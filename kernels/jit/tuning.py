"""Which tiles a kernel runs with: a table keyed by kernel, shape class and architecture.

A pure look-up, no measuring: ``benchmarks/on_gpu.sh tune`` tries the candidates on a GPU and
rewrites the rows. A rule of the table applies to a launch if every quantity it names is at most
the limit it gives; the first rule that applies is taken, the last one names no limit.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from fastgpt2.kernels.backend import INTERPRETED

# sm_80 stands for every NVIDIA GPU that has no column of its own, so its tiles must fit in the
# 99 KB of shared memory of an sm_86, sm_89 or sm_120; gfx942 stands for every AMD GPU
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# the architecture that the candidates are made for: there they are compiled, too
TUNED = "sm_90"
# the interpreter's column: small tiles, so that small shapes span several of them
INTERPRET = "interpret"


@dataclass(frozen=True)
class Config:
    """Tiles, warps and pipeline stages of one launch; ``meta()`` is what the launch is given."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """Keyword arguments of the launch: every block size, num_warps and num_stages."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __getitem__(self, block: str) -> int:
        """The size of one block, for the grid: ``config["BLOCK_M"]``."""
        return dict(self.blocks)[block]

    @property
    def label(self) -> str:
        """``128x64 w8 s3``: blocks in order, warps, stages."""
        sizes = "x".join(str(size) for _, size in self.blocks)
        return f"{sizes} w{self.num_warps} s{self.num_stages}".lstrip()


def config(num_warps: int, num_stages: int, **blocks: int) -> Config:
    """A ``Config``, written as the table's rows are: ``config(8, 3, BLOCK_M=128, BLOCK_N=64)``."""
    return Config(tuple(blocks.items()), num_warps, num_stages)


@dataclass(frozen=True)
class Rule:
    """One shape class: its limits, its config per architecture, and what the tuner may try.

    Attributes:
        limits: largest value of each quantity named, such as ``{"D": 64, "dropout": 0}``.
        configs: architecture (and ``interpret``) -> config; ``sm_80`` for one not named.
        candidates: further configs that the tuner tries.
    """

    limits: Mapping[str, int]
    configs: Mapping[str, Config]
    candidates: tuple[Config, ...] = field(default=())

    def applies(self, shape_class: Mapping[str, int]) -> bool:
        """Whether every limited quantity is within its limit."""
        return all(shape_class[name] <= limit for name, limit in self.limits.items())

    def on(self, arch: str) -> Config:
        """The config of this shape class on ``arch``."""
        return self.configs.get(arch, self.configs["sm_80"])

    def compiled(self, arch: str) -> list[Config]:
        """What the compile matrix covers: the config, and the candidates where they are for."""
        tried = self.candidates if arch == TUNED else ()
        return list(dict.fromkeys([self.on(arch), *tried]))


# kernel -> rules, narrow ones first
TABLE: dict[str, tuple[Rule, ...]] = {
    # 16-bit numbers at head size 64 without options, then with masks and dropout, then wide heads
    "attention_fwd": (
        Rule(
            {"bytes": 2, "D": 64, "dropout": 0, "masked": 0},
            {
                "sm_80": config(4, 3, BLOCK_M=128, BLOCK_N=64),
                "sm_90": config(8, 3, BLOCK_M=128, BLOCK_N=64),
                "gfx942": config(4, 2, BLOCK_M=128, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16),
            },
            (
                config(4, 3, BLOCK_M=128, BLOCK_N=64),
                config(8, 3, BLOCK_M=128, BLOCK_N=128),
                config(4, 2, BLOCK_M=64, BLOCK_N=128),
                config(4, 2, BLOCK_M=64, BLOCK_N=64),
            ),
        ),
        Rule(
            {"bytes": 2, "D": 64},
            {
                "sm_80": config(8, 2, BLOCK_M=128, BLOCK_N=64),
                "gfx942": config(4, 2, BLOCK_M=64, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32),
            },
        ),
        Rule(
            {"bytes": 2, "D": 128},
            {
                "sm_80": config(8, 2, BLOCK_M=128, BLOCK_N=64),
                "gfx942": config(4, 2, BLOCK_M=64, BLOCK_N=32),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32),
            },
        ),
        Rule(
            {},
            {
                "sm_80": config(8, 2, BLOCK_M=32, BLOCK_N=32),
                "gfx942": config(4, 1, BLOCK_M=32, BLOCK_N=32),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16),
            },
        ),
    ),
    "attention_bwd_dq": (
        Rule(
            {"bytes": 2, "D": 64, "dropout": 0, "masked": 0},
            {
                "sm_80": config(8, 2, BLOCK_M=128, BLOCK_N=64),
                "sm_90": config(8, 3, BLOCK_M=128, BLOCK_N=64),
                "gfx942": config(4, 2, BLOCK_M=64, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16),
            },
            (config(4, 2, BLOCK_M=64, BLOCK_N=64), config(8, 2, BLOCK_M=128, BLOCK_N=128)),
        ),
        Rule(
            {"bytes": 2, "D": 64},
            {
                "sm_80": config(4, 2, BLOCK_M=64, BLOCK_N=32),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32),
            },
        ),
        Rule(
            {"bytes": 2, "D": 128},
            {
                "sm_80": config(8, 2, BLOCK_M=64, BLOCK_N=64),
                "sm_90": config(4, 2, BLOCK_M=64, BLOCK_N=32),
                "gfx942": config(4, 2, BLOCK_M=64, BLOCK_N=32),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32),
            },
        ),
        Rule(
            {},
            {
                "sm_80": config(4, 2, BLOCK_M=32, BLOCK_N=16),
                "gfx942": config(4, 1, BLOCK_M=32, BLOCK_N=32),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16),
            },
        ),
    ),
    "attention_bwd_dkv": (
        Rule(
            {"bytes": 2, "D": 64, "dropout": 0, "masked": 0},
            {
                "sm_80": config(8, 3, BLOCK_M=32, BLOCK_N=128),
                "sm_90": config(4, 3, BLOCK_M=64, BLOCK_N=64),
                "gfx942": config(4, 2, BLOCK_M=32, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32),
            },
            (config(8, 3, BLOCK_M=32, BLOCK_N=128), config(8, 2, BLOCK_M=64, BLOCK_N=128)),
        ),
        Rule(
            {"bytes": 2, "D": 64},
            {
                "sm_80": config(4, 2, BLOCK_M=32, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16),
            },
        ),
        Rule(
            {"bytes": 2, "D": 128},
            {
                "sm_80": config(8, 2, BLOCK_M=64, BLOCK_N=64),
                "sm_90": config(8, 2, BLOCK_M=32, BLOCK_N=128),
                "gfx942": config(4, 2, BLOCK_M=32, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16),
            },
        ),
        Rule(
            {},
            {
                "sm_80": config(8, 2, BLOCK_M=32, BLOCK_N=32),
                "gfx942": config(4, 1, BLOCK_M=32, BLOCK_N=32),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32),
            },
        ),
    ),
    "decode_attention": (
        Rule(
            {"D": 64},
            {
                "sm_80": config(4, 1, BLOCK_N=64),
                INTERPRET: config(4, 1, BLOCK_N=16),
            },
            (config(4, 1, BLOCK_N=128), config(4, 1, BLOCK_N=32), config(8, 1, BLOCK_N=128)),
        ),
        Rule(
            {},
            {"sm_80": config(4, 1, BLOCK_N=32), INTERPRET: config(4, 1, BLOCK_N=32)},
            (config(8, 1, BLOCK_N=64),),
        ),
    ),
    "decode_attention_merge": (Rule({}, {"sm_80": config(4, 1)}),),
    "layer_norm_fwd": (
        Rule(
            {"C": 1024, "dropout": 0},
            {"sm_80": config(4, 1, BLOCK_N=4), INTERPRET: config(4, 1, BLOCK_N=4)},
            (config(1, 1, BLOCK_N=1), config(4, 1, BLOCK_N=2)),
        ),
        Rule(
            {"C": 1024},
            {"sm_80": config(4, 1, BLOCK_N=2), INTERPRET: config(4, 1, BLOCK_N=4)},
        ),
        Rule(
            {},
            {"sm_80": config(8, 1, BLOCK_N=1), INTERPRET: config(8, 1, BLOCK_N=2)},
            (config(4, 1, BLOCK_N=1),),
        ),
    ),
    "layer_norm_bwd": (
        Rule(
            {"C": 1024, "dropout": 0},
            {"sm_80": config(4, 1, BLOCK_N=2), INTERPRET: config(4, 1, BLOCK_N=4)},
            (config(4, 1, BLOCK_N=1),),
        ),
        Rule(
            {"C": 1024},
            {"sm_80": config(4, 1, BLOCK_N=1), INTERPRET: config(4, 1, BLOCK_N=4)},
        ),
        Rule(
            {},
            {"sm_80": config(8, 1, BLOCK_N=1), INTERPRET: config(8, 1, BLOCK_N=2)},
            (config(16, 1, BLOCK_N=1),),
        ),
    ),
    "cross_entropy_fwd": (
        # few, wide blocks: the rows under way should stay in L2 until their gradient is written
        Rule(
            {},
            {"sm_80": config(16, 1, BLOCK_V=8192), INTERPRET: config(8, 1, BLOCK_V=128)},
            (config(8, 1, BLOCK_V=4096), config(8, 1, BLOCK_V=8192), config(16, 1, BLOCK_V=16384)),
        ),
    ),
    "cross_entropy_bwd": (
        Rule(
            {},
            {"sm_80": config(8, 1, BLOCK_V=4096), INTERPRET: config(8, 1, BLOCK_V=128)},
            (config(8, 1, BLOCK_V=8192),),
        ),
    ),
    "add_branch_fwd": (
        Rule(
            {},
            {
                "sm_80": config(4, 1, BLOCK_N=4, BLOCK_C=1024),
                INTERPRET: config(4, 1, BLOCK_N=16, BLOCK_C=32),
            },
            (config(4, 1, BLOCK_N=2, BLOCK_C=1024), config(4, 1, BLOCK_N=8, BLOCK_C=256)),
        ),
    ),
    "add_branch_bwd": (
        Rule(
            {},
            {
                "sm_80": config(4, 1, BLOCK_N=4, BLOCK_C=256),
                INTERPRET: config(4, 1, BLOCK_N=4, BLOCK_C=32),
            },
            (config(4, 1, BLOCK_N=8, BLOCK_C=256), config(4, 1, BLOCK_N=4, BLOCK_C=1024)),
        ),
    ),
    "gelu_fwd": (
        Rule(
            {},
            {
                "sm_80": config(4, 1, BLOCK_N=4, BLOCK_F=1024),
                INTERPRET: config(4, 1, BLOCK_N=16, BLOCK_F=32),
            },
            (config(4, 1, BLOCK_N=2, BLOCK_F=1024), config(4, 1, BLOCK_N=8, BLOCK_F=512)),
        ),
    ),
    "gelu_bwd": (
        Rule(
            {},
            {
                "sm_80": config(4, 1, BLOCK_N=2, BLOCK_F=1024),
                INTERPRET: config(4, 1, BLOCK_N=4, BLOCK_F=32),
            },
            (config(4, 1, BLOCK_N=4, BLOCK_F=1024), config(4, 1, BLOCK_N=4, BLOCK_F=512)),
        ),
    ),
    "linear_gelu_fwd": (
        Rule(
            {"bytes": 2},
            {
                "sm_80": config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, GROUP_M=8),
                "sm_90": config(8, 3, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8),
                "sm_100": config(8, 3, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP_M=8),
                "gfx942": config(8, 2, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8),
                INTERPRET: config(4, 1, BLOCK_M=32, BLOCK_N=16, BLOCK_K=16, GROUP_M=2),
            },
            (config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8),),
        ),
        Rule(
            {},
            {
                "sm_80": config(8, 2, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, GROUP_M=8),
                INTERPRET: config(4, 1, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP_M=2),
            },
        ),
    ),
    "embedding_fwd": (
        Rule({}, {"sm_80": config(4, 1, BLOCK_N=4), INTERPRET: config(4, 1, BLOCK_N=4)}),
    ),
    # few tokens a row of the table, but a thousand and more of the most frequent ones
    "segment_sum": (
        Rule(
            {},
            {
                "sm_80": config(4, 1, BLOCK_N=16, BLOCK_C=256),
                INTERPRET: config(4, 1, BLOCK_N=4, BLOCK_C=64),
            },
            (config(4, 1, BLOCK_N=32, BLOCK_C=128), config(8, 1, BLOCK_N=8, BLOCK_C=1024)),
        ),
    ),
    "column_sum": (
        Rule(
            {},
            {
                "sm_80": config(4, 1, BLOCK_P=256, BLOCK_C=16),
                INTERPRET: config(4, 1, BLOCK_P=8, BLOCK_C=32),
            },
            (config(4, 1, BLOCK_P=128, BLOCK_C=32),),
        ),
    ),
}

# (op, architecture) -> {(C, F): measurement}: where a matrix product of ours, with its epilogue,
# has been measured faster than the library's with a pointwise kernel behind it; none has been yet
FUSED: dict[tuple[str, str], dict[tuple[int, int], str]] = {}

# set by `overriding`
_overrides: dict[str, Config] = {}


def rule_of(op: str, **shape_class: int) -> Rule:
    """The rule that a launch of this shape class runs by: the first that applies."""
    return next(rule for rule in TABLE[op] if rule.applies(shape_class))


def pick(op: str, arch: str, **shape_class: int) -> Config:
    """The config of kernel ``op`` on ``arch`` for a launch of this shape class.

    >>> pick("attention_fwd", "sm_90", D=64, dropout=0).meta()
    """
    if op in _overrides:
        return _overrides[op]
    return rule_of(op, **shape_class).on(arch)


def candidates(op: str, **shape_class: int) -> list[Config]:
    """What the tuner tries for such a launch: what is in the table, then the rule's candidates."""
    rule = rule_of(op, **shape_class)
    chosen = [c for arch, c in rule.configs.items() if arch != INTERPRET]
    return list(dict.fromkeys([*chosen, *rule.candidates]))


def fused(op: str, device: torch.device, C: int, F: int) -> bool:
    """Whether ``op`` runs as one kernel at this shape: only where that was measured faster."""
    return (C, F) in FUSED.get((op, arch_of(device)), {})


# what torch.compiler.assume_constant_result does, without importing Dynamo, and Triton with it
fused._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def overriding(op: str, choice: Config) -> Iterator[None]:
    """Within the block, kernel ``op`` runs with ``choice`` (the tuner's and the tests' way in)."""
    _overrides[op] = choice
    try:
        yield
    finally:
        del _overrides[op]


@lru_cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def arch_of(device: torch.device) -> str:
    """The table's column for a device: ``interpret`` under TRITON_INTERPRET=1, else its GPU's."""
    return INTERPRET if INTERPRETED else _architecture(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors (compute units) a device has; the interpreter plays one of two."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
