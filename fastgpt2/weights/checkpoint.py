"""Checkpoint: the form that every reader returns and every writer takes.

Its tensors have the names and the layout of ``GPT.state_dict()`` (nanoGPT's: ``nn.Linear`` weights
are (out, in)) and the unpadded vocabulary. The tied head is stored once, as the token embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastgpt2.config import GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.weights.metadata import shown
from fastgpt2.weights.tensors import LazyTensor

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor of a GPT, in the order of the module."""
    C = config.n_embd
    names: dict[str, tuple[int, ...]] = {
        WTE: (config.vocab_size, C),
        "transformer.wpe.weight": (config.block_size, C),
    }
    block = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    modules = {
        f"h.{i}.{name}": shape for i in range(config.n_layer) for name, shape in block.items()
    }
    for name, shape in (modules | {"ln_f": (C,)}).items():
        names[f"transformer.{name}.weight"] = shape
        if config.bias:
            names[f"transformer.{name}.bias"] = shape[:1]
    return names


def listed(names: list[str]) -> str:
    """The first names, and the number of the others."""
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown(name) for name in names[:8]) + rest


@dataclass(frozen=True)
class Checkpoint:
    """A GPT-2 in a file of any format.

    Args:
        config: shape of the model.
        tensors: every stored tensor by its canonical name; checked against ``config`` and put into
            the module's order.
        source: the file or folder, for messages.
        notes: what was left out or changed while reading, one line each.
        files: where the tensors are read from, sorted.
        quantization: how the file stores matrices: ``int8`` or None. ``tensors`` always has the
            dequantized weights.

    Raises:
        UserError: a tensor is missing or unexpected, or has a wrong shape or dtype; the message
            names the tensor.
    """

    config: GPTConfig
    tensors: Mapping[str, LazyTensor]
    source: Path
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    quantization: str | None = None

    def __post_init__(self) -> None:
        # a forged number of layers must not create billions of names
        if self.config.n_layer > len(self.tensors):
            raise UserError(
                f"{self.source}: n_layer is {self.config.n_layer}, "
                f"but there are only {len(self.tensors)} tensors"
            )
        shapes = parameter_shapes(self.config)
        if missing := [name for name in shapes if name not in self.tensors]:
            raise UserError(f"{self.source}: missing {listed(missing)}")
        if unexpected := [name for name in self.tensors if name not in shapes]:
            raise UserError(f"{self.source}: unexpected {listed(unexpected)}")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise UserError(
                    f"{self.source}: {name!r} has shape {tensor.shape}, expected {shape}"
                )
            if tensor.dtype not in STORED_DTYPES:
                raise UserError(
                    f"{self.source}: {name!r} has dtype {tensor.dtype}, "
                    "expected float32, float16 or bfloat16"
                )
        object.__setattr__(self, "tensors", {name: self.tensors[name] for name in shapes})

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def to(self, dtype: torch.dtype) -> "Checkpoint":
        """The same checkpoint with every tensor rounded to ``dtype``."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def with_biases(self) -> "Checkpoint":
        """The same function with explicit biases, zeros if the model has none."""
        if self.config.bias:
            return self
        config = replace(self.config, bias=True)
        tensors = {
            name: self.tensors.get(name, LazyTensor.zeros(shape, self.dtype))
            for name, shape in parameter_shapes(config).items()
        }
        note = "the model has no biases; they are written as zeros"
        return replace(self, config=config, tensors=tensors, notes=(*self.notes, note))

    def state_dict(self) -> "LazyStateDict":
        """The tensors; loading them one by one needs only the memory of one more."""
        return LazyStateDict(self.tensors, self.quantization)


class LazyStateDict(Mapping[str, Tensor]):
    """Name to tensor; each access reads the file and returns a new contiguous tensor.

    ``quantization`` says how the file stores matrices; None means unquantized.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor], quantization: str | None = None) -> None:
        self._tensors, self.quantization = tensors, quantization

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].read().clone(memory_format=torch.contiguous_format)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def drop_tied_head(tensors: dict[str, LazyTensor], source: Path) -> dict[str, LazyTensor]:
    """Keep one of ``lm_head.weight`` and the token embedding, which must hold the same bits.

    Raises:
        UserError: the head has its own weights; this is not a GPT-2.
    """
    head = tensors.pop(HEAD, None)
    if head is None:
        return tensors
    # files that store shared tensors once may have kept either name
    wte = tensors.setdefault(WTE, head)
    if head.shape != wte.shape or head.dtype != wte.dtype or not _same_bits(head, wte):
        raise UserError(f"{source}: {HEAD!r} differs from {WTE!r}: the head must be tied")
    return tensors


def _same_bits(a: LazyTensor, b: LazyTensor) -> bool:
    # as integers, because a NaN differs from itself
    return a is b or torch.equal(*(x.read().reshape(-1).view(torch.uint8) for x in (a, b)))
