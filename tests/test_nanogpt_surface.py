"""Every call that nanoGPT's train.py, sample.py and bench.py make on a model."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt2 import GPT, GPTConfig

# its names and types, dropout as bench.py's integer too
MODEL_ARGS: dict[str, Any] = dict(
    n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, vocab_size=50304, dropout=0
)
SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
Context = Callable[[], AbstractContextManager[Any]]


def batches(model: nn.Module, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    while True:
        tokens = torch.randint(200, (4, 17))
        yield tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def estimate_loss(model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], ctx: Context) -> float:
    model.eval()
    losses = torch.zeros(2)
    for k in range(2):
        x, y = next(data)
        with ctx():
            _logits, loss = model(x, y)
        losses[k] = loss.item()
    model.train()
    return float(losses.mean())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int, dtype: torch.dtype, seed: int
) -> float:
    """Its loop: accumulation, scaler, clipping; returns the last loss."""
    ctx: Context = nullcontext
    if dtype != torch.float32:
        ctx = lambda: torch.amp.autocast(device_type="cpu", dtype=dtype)  # noqa: E731
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    data = batches(model, seed)
    x, y = next(data)
    for it in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        for _ in range(2):
            with ctx():
                _logits, loss = model(x, y)
                loss = loss / 2
            x, y = next(data)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if it == 1:
            assert math.isfinite(estimate_loss(model, data, ctx))
    return float(loss.item()) * 2


def test_model_and_optimizer_as_train_py_makes_them() -> None:
    model = GPT(GPTConfig(**MODEL_ARGS))
    assert {k: getattr(model.config, k) for k in SHAPE_KEYS} == {
        k: MODEL_ARGS[k] for k in SHAPE_KEYS
    }
    model.crop_block_size(8)
    model.to("cpu")
    optimizer = model.configure_optimizers(1e-1, 6e-4, (0.9, 0.95), "cpu")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-1, 0.0]
    # bench.py names its arguments
    optimizer = model.configure_optimizers(
        weight_decay=1e-2, learning_rate=1e-4, betas=(0.9, 0.95), device_type="cpu"
    )
    mfu = model.estimate_mfu(4 * 2, 0.1)
    assert isinstance(mfu, float)
    # it is printed; a device whose peak nobody knows has none
    assert f"{mfu * 100:.2f}%" == "nan%"


def test_the_vocabulary_that_bench_py_leaves_to_the_default() -> None:
    config = GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=32, dropout=0, bias=False)
    assert config.vocab_size == 50304 and GPTConfig.preset("gpt2").vocab_size == 50257
    # with real_data=False it draws tokens and targets up to there
    last = torch.full((2, 16), 50303)
    _logits, loss = GPT(config)(last, last)
    assert loss is not None
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_training_loop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # a smaller vocabulary, still padded: fp16 is slow on a CPU
    model = GPT(GPTConfig(**MODEL_ARGS | {"dropout": 0.1, "vocab_size": 4100}))
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), "cpu")
    before = estimate_loss(model, batches(model, 9), nullcontext)
    assert before == pytest.approx(math.log(4100), abs=0.1)
    train(model, optimizer, steps=4, dtype=dtype, seed=1)
    assert estimate_loss(model, batches(model, 9), nullcontext) < before - 0.01


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpoint_and_resume(tmp_path: Path, compiled: bool) -> None:
    torch.manual_seed(0)
    model: Any = GPT(GPTConfig(**MODEL_ARGS))
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), "cpu")
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    train(model, optimizer, steps=2, dtype=torch.float32, seed=1)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": MODEL_ARGS,
            "iter_num": 2,
            "best_val_loss": torch.tensor(1.0),
            "config": {"dataset": "shakespeare_char"},
        },
        tmp_path / "ckpt.pt",
    )
    checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu", weights_only=True)
    resumed = GPT(GPTConfig(**checkpoint["model_args"]))
    state = checkpoint["model"]
    assert all(key.startswith("_orig_mod.") for key in state) is compiled
    resumed.load_state_dict({k.removeprefix("_orig_mod."): v for k, v in state.items()})
    optimizer2 = resumed.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), "cpu")
    optimizer2.load_state_dict(checkpoint["optimizer"])
    expected = train(model, optimizer, steps=2, dtype=torch.float32, seed=2)
    assert train(resumed, optimizer2, steps=2, dtype=torch.float32, seed=2) == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_sampling(compiled: bool) -> None:
    model: Any = GPT(GPTConfig(**MODEL_ARGS))
    model.eval()
    model.to("cpu")
    if compiled:
        model = torch.compile(model, backend="aot_eager")
    x = torch.tensor([1, 2, 3], dtype=torch.long)[None, ...]
    with torch.no_grad(), torch.amp.autocast(device_type="cpu", dtype=torch.bfloat16):
        y = model.generate(x, 20, temperature=0.8, top_k=200)
    assert y.shape == (1, 23)
    assert y[0, :3].tolist() == [1, 2, 3]


def test_pretrained_as_it_loads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    source = GPT(GPTConfig(**MODEL_ARGS))
    loaded = source.config, source.state_dict()
    monkeypatch.setattr("fastgpt2.weights.load_pretrained", lambda name: loaded)
    model = GPT.from_pretrained("gpt2", dict(dropout=0.1))
    assert {k: getattr(model.config, k) for k in SHAPE_KEYS} == {
        k: MODEL_ARGS[k] for k in SHAPE_KEYS
    }
    if 8 < model.config.block_size:
        model.crop_block_size(8)
    assert model.config.block_size == 8


def test_distributed_wrapper(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path / 'meeting'}"
    distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = GPT(GPTConfig(**MODEL_ARGS))
        optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.95), "cpu")
        wrapped = DistributedDataParallel(model)
        wrapped.require_backward_grad_sync = False
        x, y = next(batches(wrapped))
        wrapped(x, y)[1].backward()
        wrapped.require_backward_grad_sync = True
        train(wrapped, optimizer, steps=2, dtype=torch.float32, seed=1)
        assert wrapped.module.state_dict().keys() == model.state_dict().keys()
    finally:
        distributed.destroy_process_group()
