"""``python -m tools.scaling``: how fast a GPT-2 trains on 8 to 1,024 GPUs, on paper.

Prints the tables of ``docs/scaling.md``; ``--write`` puts them there. A step is a sum of intervals:
computation, and communication that is not hidden behind computation.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from fastgpt2.cli import Parser
from fastgpt2.cli import run as run_command
from fastgpt2.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python -m tools.scaling --write -->\n", "<!-- end of tables -->\n"

# GPT-2's vocabulary, padded as it is trained, and its context
VOCAB, T = 50304, 1024


@dataclass(frozen=True)
class Machine:
    """A node of GPUs and the network between nodes.

    Attributes:
        peak: FLOP/s of dense bf16 products, per GPU.
        efficiency: share of the peak that one GPU reaches in forward and backward pass.
        memory: bytes/s of the GPU's memory that an optimizer step reaches.
        local: GPUs in a node.
        inside: bytes/s that a GPU sends to the others of its node in a collective operation.
        outside: bytes/s that a GPU sends to other nodes.
        latency: seconds before the first byte of a collective operation, per doubling of the
            number of GPUs.
    """

    peak: float = 989.4e12
    efficiency: float = 0.50
    memory: float = 2.7e12
    local: int = 8
    inside: float = 360e9
    outside: float = 45e9
    latency: float = 6e-6


@dataclass(frozen=True)
class Model:
    """A GPT-2: L layers of width C."""

    name: str
    layers: int
    width: int

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return 12 * self.width**2 + 13 * self.width

    @property
    def root(self) -> int:
        """Parameters outside the blocks: both embeddings and the last LayerNorm."""
        return (VOCAB + T + 2) * self.width

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.block + self.root

    @property
    def flops_per_token(self) -> float:
        """Forward and backward: 6 N, and 6 L C T for causal attention."""
        return 6.0 * self.parameters + 6.0 * self.layers * self.width * T


MODELS = (
    Model("124M", 12, 768),
    Model("355M", 24, 1024),
    Model("774M", 36, 1280),
    Model("1558M", 48, 1600),
)
# sequences in a micro-batch of a GPU
MICRO_BATCH = 16


def travel(size: float, gpus: int, machine: Machine) -> float:
    """Seconds of a reduce-scatter, or of an all-gather, of ``size`` bytes over ``gpus`` GPUs.

    First inside each node, then between the GPUs with the same number in all nodes.
    """
    if gpus == 1:
        return 0.0
    local, nodes = min(gpus, machine.local), max(1, gpus // machine.local)
    inside = size * (local - 1) / local / machine.inside
    outside = size / local * (nodes - 1) / nodes / machine.outside
    return inside + outside + machine.latency * math.log2(gpus)


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step."""

    compute: float
    exposed: float
    update: float
    tokens: int

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.exposed + self.update

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all GPUs together."""
        return self.tokens / self.seconds


def ddp(model: Model, gpus: int, tokens: int, machine: Machine) -> Step:
    """A step of DDP: a block's gradients are sent while earlier blocks are still computed.

    The embedding's gradient is complete only at the end, so nothing hides its transfer.
    """
    compute = tokens / gpus * model.flops_per_token / (machine.peak * machine.efficiency)
    micro_batches = max(1.0, tokens / gpus / (MICRO_BATCH * T))
    backward = compute / micro_batches * 2 / 3
    blocks = model.layers * 2 * travel(4.0 * model.block, gpus, machine)
    root = 2 * travel(4.0 * model.root, gpus, machine)
    hidden = min(blocks, backward * (model.layers - 1) / model.layers)
    update = 28.0 * model.parameters / machine.memory
    return Step(compute, blocks - hidden + root, update, tokens)


def fsdp(model: Model, gpus: int, tokens: int, machine: Machine) -> Step:
    """A step of FSDP2: each micro-batch gathers the weights twice in bf16, one block ahead.

    Gradients are sent in fp32, only in the last micro-batch of a step.
    """
    compute = tokens / gpus * model.flops_per_token / (machine.peak * machine.efficiency)
    micro_batches = max(1.0, tokens / gpus / (MICRO_BATCH * T))
    forward = compute / micro_batches / 3 / model.layers
    gather = travel(2.0 * model.block, gpus, machine)
    scatter = travel(4.0 * model.block, gpus, machine)
    # a block's transfer hides behind the computation of the one before it
    late = max(0.0, gather - forward) + max(0.0, gather - 2 * forward)
    last = max(0.0, gather - forward) + max(0.0, gather + scatter - 2 * forward)
    root = travel(2.0 * model.root, gpus, machine)
    exposed = (micro_batches - 1) * (model.layers * late + root) + model.layers * last + root
    exposed += travel(4.0 * model.root, gpus, machine)
    update = 28.0 * model.parameters / gpus / machine.memory
    return Step(compute, exposed, update, tokens)


def memory(model: Model, gpus: int, *, sharded: bool) -> float:
    """Bytes of weights, gradients and AdamW's moments per GPU, in fp32, without activations.

    A sharded model also holds its root and two blocks whole, in bf16.
    """
    if not sharded:
        return 16.0 * model.parameters
    return 16.0 * model.parameters / gpus + 2.0 * (model.root + 2 * model.block)


def scaling_table(machine: Machine) -> list[str]:
    """Tokens/s, and the share of a step that computes, with one micro-batch per GPU."""
    lines = [
        "| model | GPUs | tokens per step | DDP: tokens/s | share computing | FSDP2: tokens/s | "
        "share computing | memory per GPU, DDP / FSDP2 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for gpus in (8, 16, 64, 256, 1024):
            tokens = gpus * MICRO_BATCH * T
            cells = []
            for step in (ddp(model, gpus, tokens, machine), fsdp(model, gpus, tokens, machine)):
                cells.append(f"{step.tokens_per_second / 1e6:.2f} M")
                cells.append(f"{step.compute / step.seconds:.1%}")
            sizes = " / ".join(
                f"{memory(model, gpus, sharded=sharded) / 1e9:.1f} GB" for sharded in (False, True)
            )
            name = model.name if gpus == 8 else ""
            lines.append(f"| {name} | {gpus:,} | {tokens:,} | {' | '.join(cells)} | {sizes} |")
    return lines


@dataclass(frozen=True)
class Published:
    """A published measurement on 8 H100."""

    name: str
    source: str
    parameters: float
    flops_per_token: float
    tokens_per_step: int
    tokens_per_second: float


PUBLISHED = (
    Published(
        "llm.c, 1558M",
        "[log in discussion 677](https://github.com/karpathy/llm.c/discussions/677), 2.75 s a step",
        MODELS[3].parameters,
        MODELS[3].flops_per_token,
        1_048_576,
        381_400,
    ),
    Published(
        "nanochat d34, 2217M",
        "[its page](https://huggingface.co/karpathy/nanochat-d34): 47.40 % MFU, FLOPs per token",
        2.217e9,
        1.426509e10,
        524_288,
        0.4740 * 8 * 989e12 / 1.426509e10,
    ),
)


def predicted(run: Published, machine: Machine) -> float:
    """Predicted tokens/s of a published run: bf16 gradients, the optimizer sharded over 8 GPUs."""
    compute = run.tokens_per_step / 8 * run.flops_per_token / (machine.peak * machine.efficiency)
    exposed = 2 * travel(2.0 * run.parameters, 8, machine)
    update = 28.0 * run.parameters / 8 / machine.memory
    return run.tokens_per_step / (compute + exposed + update)


def check_table(machine: Machine) -> list[str]:
    """The predictions beside the measured runs."""
    lines = [
        "| run on 8 H100 | measured tokens/s | on paper | difference | source |",
        "|---|---|---|---|---|",
    ]
    for run in PUBLISHED:
        speed = predicted(run, machine)
        lines.append(
            f"| {run.name} | {run.tokens_per_second:,.0f} | {speed:,.0f} | "
            f"{speed / run.tokens_per_second - 1:+.0%} | {run.source} |"
        )
    return lines


def tables(machine: Machine | None = None) -> str:
    """Both tables, as Markdown."""
    machine = machine or Machine()
    return "\n".join([*check_table(machine), "", *scaling_table(machine), ""])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(prog="python -m tools.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write them into {PAGE.name}")
    options = parser.parse_args(argv)
    return run_command("scaling", _write if options.write else lambda: print(tables()))


def _write() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}{tables()}{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    raise SystemExit(main())
