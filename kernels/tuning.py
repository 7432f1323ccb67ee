"""Which tiles a kernel runs with: a table keyed by kernel, shape class and architecture.

The table is data, ``tuning.json``; this is a pure look-up that measures nothing. A tool tries the
candidates on a GPU and rewrites the rows. A rule of the table applies to a launch if every quantity
that it limits is at most its limit. The first rule that applies is taken; the last has no limits.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fastgpt2.kernels.backend import INTERPRETED, amd_architecture, capability
from fastgpt2.kernels.gpus import ARCHITECTURES

# the architecture whose tiles NVIDIA GPUs of a generation that is not listed run with
FALLBACK = "sm_80"
# the architecture that the candidates are made for: they are compiled only for this one
TUNED = "sm_90"
# the interpreter's column: small tiles, so that small shapes span several of them
INTERPRET = "interpret"
TABLE_FILE = Path(__file__).with_name("tuning.json")


@dataclass(frozen=True)
class Config:
    """Tiles, warps and pipeline stages of one launch; ``meta()`` are its keyword arguments.

    ``per_sm`` is how many blocks the launch gives each multiprocessor, for kernels whose blocks
    walk over the rows. All of them must be resident at a time: the compile matrix checks that.
    """

    blocks: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    per_sm: int = 0

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


def config(num_warps: int, num_stages: int, per_sm: int = 0, **blocks: int) -> Config:
    """A ``Config`` in one line: ``config(8, 3, BLOCK_M=128, BLOCK_N=64)``."""
    return Config(tuple(blocks.items()), num_warps, num_stages, per_sm)


@dataclass(frozen=True)
class Rule:
    """One shape class: its limits, its config per architecture, and what the tuner may try.

    Attributes:
        limits: largest value of each quantity named, such as ``{"D": 64, "dropout": 0}``.
        configs: architecture (and ``interpret``) -> config, or None where every tile spills and
            the kernel is refused; one that is not named uses the config of the one it is ``like``.
        candidates: further configs that the tuner tries.
    """

    limits: Mapping[str, int]
    configs: Mapping[str, Config | None]
    candidates: tuple[Config, ...]

    def applies(self, shape_class: Mapping[str, int]) -> bool:
        """Whether every limited quantity is within its limit."""
        return all(shape_class[name] <= limit for name, limit in self.limits.items())

    def on(self, arch: str) -> Config | None:
        """The config of this shape class on ``arch``, None where the kernel is refused."""
        while arch not in self.configs:
            arch = ARCHITECTURES[arch].like if arch in ARCHITECTURES else FALLBACK
        return self.configs[arch]

    def compiled(self, arch: str) -> list[Config]:
        """What the compile matrix covers: the config, and on ``TUNED`` the candidates."""
        tried = self.candidates if arch == TUNED else ()
        return [c for c in dict.fromkeys([self.on(arch), *tried]) if c is not None]


def read_table(text: str) -> dict[str, tuple[Rule, ...]]:
    """The rules of every kernel from the table's JSON, in its order: narrow rules first."""
    kernels: dict[str, list[dict[str, Any]]] = json.loads(text)
    return {
        kernel: tuple(
            Rule(
                rule["limits"],
                {arch: row and config(**row) for arch, row in rule["configs"].items()},
                tuple(config(**row) for row in rule.get("candidates", ())),
            )
            for rule in rules
        )
        for kernel, rules in kernels.items()
    }


def as_json(table: Mapping[str, list[dict[str, Any]]]) -> str:
    """The table's file: one line per config, so that a change shows as one."""

    def block(rule: dict[str, Any]) -> str:
        parts = []
        for name, value in rule.items():
            if name == "configs":
                rows = (f"    {json.dumps(arch)}: {json.dumps(row)}" for arch, row in value.items())
                text = "{\n" + ",\n".join(rows) + "\n   }"
            elif name == "candidates":
                text = "[\n" + ",\n".join(f"    {json.dumps(row)}" for row in value) + "\n   ]"
            else:
                text = json.dumps(value)
            parts.append(f"   {json.dumps(name)}: {text}")
        return "  {\n" + ",\n".join(parts) + "\n  }"

    kernels = (
        f" {json.dumps(kernel)}: [\n" + ",\n".join(map(block, rules)) + "\n ]"
        for kernel, rules in table.items()
    )
    return "{\n" + ",\n".join(kernels) + "\n}\n"


TABLE = read_table(TABLE_FILE.read_text(encoding="utf-8"))

# set by `overriding`
_overrides: dict[str, Config] = {}


def rule_of(op: str, **shape_class: int) -> Rule:
    """The rule for a launch of this shape class: the first that applies."""
    return next(rule for rule in TABLE[op] if rule.applies(shape_class))


def pick(op: str, arch: str, **shape_class: int) -> Config:
    """The config of kernel ``op`` on ``arch`` for a launch of this shape class.

    >>> pick("attention_fwd", "sm_90", D=64, bytes=2, dropout=0, masked=0).meta()
    """
    if op in _overrides:
        return _overrides[op]
    chosen = rule_of(op, **shape_class).on(arch)
    assert chosen is not None, f"{op}: refused on {arch}"
    return chosen


def refusal(op: str, arch: str, **shape_class: int) -> str | None:
    """Why ``op`` must not run on ``arch`` for a launch of this shape class, or None if it may."""
    if rule_of(op, **shape_class).on(arch) is not None:
        return None
    return f"every tile of {op} needs more registers than {arch} has"


def candidates(op: str, **shape_class: int) -> list[Config]:
    """What the tuner tries for such a launch: the table's config, then the rule's candidates."""
    rule = rule_of(op, **shape_class)
    chosen = [c for arch, c in rule.configs.items() if arch != INTERPRET and c is not None]
    return list(dict.fromkeys([*chosen, *rule.candidates]))


@contextmanager
def overriding(op: str, choice: Config) -> Iterator[None]:
    """Within the block, kernel ``op`` runs with ``choice``: for the tuner and the tests."""
    _overrides[op] = choice
    try:
        yield
    finally:
        del _overrides[op]


def nvidia_architecture(major: int, minor: int) -> str:
    """The listed architecture of this compute capability: of its generation, and not newer.

    >>> nvidia_architecture(8, 7)
    'sm_86'
    """
    found = FALLBACK
    for name in ARCHITECTURES:
        number = name.removeprefix("sm_")
        if number.isdigit() and divmod(int(number), 10) <= (major, minor):
            found = name if int(number) // 10 == major else found
    return found


@lru_cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return amd_architecture(device.index)
    return nvidia_architecture(*capability(device.index))


def arch_of(device: torch.device) -> str:
    """The table's column for a device: ``interpret`` under TRITON_INTERPRET=1, else its GPU's."""
    return INTERPRET if INTERPRETED else _architecture(device)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors (compute units) a device has; the interpreter pretends to have 2."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
