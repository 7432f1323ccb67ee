from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from fastgpt2.config import FP8_MULTIPLE, PRESETS, GPTConfig
from fastgpt2.errors import UserError
from fastgpt2.kernels.quantize_fp8 import MULTIPLE
from fastgpt2.model import GPT


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 0}, "GPTConfig: n_layer must be a positive integer, got 0"),
        # each block takes a while to make
        ({"n_layer": 2**31}, "GPTConfig: n_layer must be at most 16,384, got 2147483648"),
        ({"n_head": -1}, "GPTConfig: n_head must be a positive integer, got -1"),
        ({"vocab_size": 2.5}, "GPTConfig: vocab_size must be a positive integer, got 2.5"),
        ({"block_size": True}, "GPTConfig: block_size must be a positive integer, got True"),
        (
            {"n_embd": 100, "n_head": 3},
            "GPTConfig: n_embd must be a multiple of n_head, got 100 and 3",
        ),
        ({"dropout": 1.0}, "GPTConfig: dropout must be in [0, 1), got 1.0"),
        ({"dropout": None}, "GPTConfig: dropout must be in [0, 1), got None"),
        ({"attn_dropout": -0.1}, "GPTConfig: attn_dropout must be in [0, 1), got -0.1"),
        ({"resid_dropout": "0.1"}, "GPTConfig: resid_dropout must be in [0, 1), got '0.1'"),
        ({"embd_dropout": float("nan")}, "GPTConfig: embd_dropout must be in [0, 1), got nan"),
        ({"bias": 1}, "GPTConfig: bias must be True or False, got 1"),
        ({"fp32_residual": "no"}, "GPTConfig: fp32_residual must be True or False, got 'no'"),
        ({"fp8": 1}, "GPTConfig: fp8 must be True or False, got 1"),
        (
            {"fp8": True, "n_embd": 40, "n_head": 2},
            "GPTConfig: fp8 wants n_embd to be a multiple of 16, got 40",
        ),
        ({"fp8": True, "impl": "reference"}, "GPTConfig: fp8 has no reference implementation"),
        ({"gelu": "none"}, "GPTConfig: gelu must be one of tanh, erf, got 'none'"),
        ({"gelu": ["erf"]}, "GPTConfig: gelu must be one of tanh, erf, got ['erf']"),
        (
            {"impl": "cuda"},
            "GPTConfig: impl must be one of auto, triton, torch, reference, got 'cuda'",
        ),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig(**fields)
    assert str(error.value) == message


def test_fp8_wants_the_kernels_multiple() -> None:
    # written twice, because a configuration is read without PyTorch
    assert FP8_MULTIPLE == MULTIPLE


def test_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        GPTConfig().n_layer = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_releases_have_their_number_of_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.get_num_params(non_embedding=False) == count
    config = model.config
    assert model.get_num_params() == count - config.block_size * config.n_embd


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    config = GPTConfig.preset(name, vocab_size=65)
    assert (config.vocab_size, config.bias, config.dropout) == (65, True, 0.0)


@pytest.mark.parametrize(
    ("vocab_size", "padded"),
    [(50257, 50304), (50304, 50304), (65, 65), (257, 257), (4095, 4095), (4097, 4224)],
)
def test_only_a_large_vocabulary_is_padded(vocab_size: int, padded: int) -> None:
    assert GPTConfig(vocab_size=vocab_size).padded_vocab_size == padded


def test_each_dropout_overrides_the_common_rate() -> None:
    config = GPTConfig(dropout=0.2, attn_dropout=0.0, resid_dropout=0.5)
    assert (config.attn_p, config.embd_p, config.resid_p) == (0.0, 0.2, 0.5)


@pytest.mark.parametrize(
    ("preset", "fields", "message"),
    [
        ("gpt2-medum", {}, "model preset: unknown key 'gpt2-medum'; did you mean 'gpt2-medium'?"),
        ("gpt2", {"n_layers": 2}, "GPTConfig: unknown key 'n_layers'; did you mean 'n_layer'?"),
    ],
)
def test_an_unknown_key_names_the_nearest(
    preset: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        GPTConfig.preset(preset, **fields)
    assert str(error.value) == message


def test_a_key_like_no_other_lists_them_all() -> None:
    with pytest.raises(UserError, match=r"unknown key 'zzz'; known: block_size, vocab_size"):
        GPTConfig.preset("gpt2", zzz=1)
