"""Recomputed activations: the same bits, less memory."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastgpt2.train.remat import REMATS
from tests.tiny_gpt import gradients, tiny_batch
from tests.train.tiny_run import make_trainer, tiny_train_config

pytestmark = pytest.mark.usefixtures("no_picture")


def measured(data: Path, run: Path, remat: str) -> tuple[dict[str, Tensor], int]:
    """Gradients of one batch with dropout, and the bytes that the forward pass keeps."""
    config = tiny_train_config(data, remat=remat, n_layer=4, n_embd=32)
    model = make_trainer(config, run).model.train()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with saved_tensors_hooks(pack, lambda x: x):
        torch.manual_seed(1)
        grads = gradients(model, *tiny_batch(B=8))
    return grads, sum(size for pointer, size in kept.items() if pointer not in weights)


def test_the_same_gradients_from_less_memory(data: Path, tmp_path: Path) -> None:
    results = {remat: measured(data, tmp_path / remat, remat) for remat in REMATS}
    for remat in REMATS[1:]:
        for name, expected in results["none"][0].items():
            assert results[remat][0][name].equal(expected), (remat, name)
    # 16 widths a token and layer are kept, 8 of them by the MLP; of a block its input alone
    none, mlp, block = (results[remat][1] for remat in REMATS)
    assert mlp < 0.7 * none and block < 0.45 * none
