"""The generators: ours, transformers, CTranslate2, nanoGPT; same weights, greedy."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals import PlainGPT, transformers_gpt2
from fastgpt2.config import GPTConfig
from fastgpt2.model import GPT

# (prompt (B, T), number of new tokens) -> (B, T + new)
Generate = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Place:
    """A model's shape, its device and dtype, and whether its weights are int8."""

    config: GPTConfig
    device: torch.device
    dtype: torch.dtype
    int8: bool = False

    def model(self, impl: str) -> GPT:
        """Ours, with the weights that all share."""
        torch.manual_seed(0)
        model = GPT(replace(self.config, impl=impl)).to(self.device, self.dtype).eval()
        return model.quantize("int8") if self.int8 else model


def ours(place: Place, impl: str = "auto", *, compile: bool = False) -> Generate:
    """Our ``generate``, on the kernels or on PyTorch's operators, or compiled."""
    model = place.model(impl)
    return lambda prompt, new: model.generate(prompt, new, temperature=0.0, compile=compile)


def _transformers_model(place: Place) -> Any:
    # rivals quantize themselves
    rival: Any = transformers_gpt2(replace(place, int8=False).model("auto").float())
    if rival is None:
        pytest.skip("transformers is not installed: pip install 'fastgpt2[bench]'")
    return rival.eval()


def hugging_face(place: Place) -> Generate:
    """transformers' ``generate``."""
    rival = _transformers_model(place).to(place.dtype)
    # random weights may choose the token that ends a text: ignore it
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def generate(prompt: Tensor, new: int) -> Tensor:
        mask = torch.ones_like(prompt)
        text: Tensor = rival.generate(prompt, max_new_tokens=new, attention_mask=mask, **options)
        return text

    return generate


class _Vocabulary:
    """All that CTranslate2's converter needs of a tokenizer: ids as texts."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bos_token = self.eos_token = self.unk_token = str(size - 1)

    def get_vocab(self) -> dict[str, int]:
        """Every id, named by its number."""
        return {str(token): token for token in range(self.size)}


def ctranslate2(place: Place) -> Generate:
    """CTranslate2's ``generate_batch``, on the converted model of transformers."""
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        pytest.skip("ctranslate2 is not installed: pip install 'fastgpt2[bench]'")
    vocabulary = _Vocabulary(place.config.vocab_size)

    class Converter(TransformersConverter):  # type: ignore[misc,unused-ignore]
        def load_tokenizer(self, *_: object, **__: object) -> _Vocabulary:
            return vocabulary

    compute_type = "float32" if place.dtype == torch.float32 else "bfloat16"
    compute_type = "int8" if place.int8 else compute_type
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "transformers"), Path(folder, "ctranslate2")
        _transformers_model(place).save_pretrained(source)
        Converter(str(source)).convert(str(target), quantization=compute_type)
        generator = ctranslate2.Generator(
            str(target),
            device=place.device.type,
            compute_type=compute_type,
            intra_threads=torch.get_num_threads(),
        )

    def generate(prompt: Tensor, new: int) -> Tensor:
        results = generator.generate_batch(
            [[str(token) for token in row] for row in prompt.tolist()],
            max_length=new,
            # do not end the text earlier
            min_length=new,
            # otherwise it reads the prompt token by token
            include_prompt_in_result=False,
        )
        tokens = torch.tensor([r.sequences_ids[0] for r in results], device=prompt.device)
        return torch.cat([prompt, tokens], dim=1)

    return generate


def nanogpt(place: Place) -> Generate:
    """nanoGPT's loop: without a cache, each token needs a forward pass over the whole text."""
    rival = PlainGPT(place.config).to(place.device, place.dtype).eval()
    rival.copy_weights(place.model("auto"))
    block_size, V = place.config.block_size, place.config.vocab_size

    @torch.no_grad()
    def generate(prompt: Tensor, new: int) -> Tensor:
        for _ in range(new):
            hidden = rival.hidden(prompt[:, -block_size:])
            logits = F.linear(hidden[:, -1], rival.wte.weight[:V])
            prompt = torch.cat([prompt, logits.argmax(dim=-1, keepdim=True)], dim=1)
        return prompt

    return generate


MAKERS: dict[str, Callable[[Place], Generate]] = {
    "fastgpt2": ours,
    "fastgpt2 compiled": lambda place: ours(place, compile=True),
    "fastgpt2 torch": lambda place: ours(place, "torch"),
    "transformers": hugging_face,
    "ctranslate2": ctranslate2,
    "nanogpt": nanogpt,
}
