"""Kernels are compiled before a training step needs them, and nothing else changes."""

from collections.abc import Callable

import pytest
import torch

from fastgpt2.kernels import warm
from fastgpt2.train import compiled
from tests.tiny_gpt import tiny_gpt


@pytest.mark.parametrize("eot", [None, 60])
def test_nothing_but_kernels_is_left_behind(
    eot: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int | None] = []

    def play(step: Callable[[], object], workers: int | None) -> int:
        step()
        calls.append(workers)
        return 17

    monkeypatch.setattr(compiled, "compile_ahead", play)
    model = tiny_gpt(impl="triton", dropout=0.1, n_layer=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random_numbers = torch.get_rng_state()
    assert compiled.compile_kernels(model, 2, torch.float32, eot=eot, jobs=3) == 17
    assert calls == [3]
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    # where no kernel of ours runs, no step is played
    assert compiled.compile_kernels(tiny_gpt(impl="torch"), 2, torch.float32) == 0
    assert calls == [3]


def test_without_a_gpu_there_is_nothing_to_warm(capsys: pytest.CaptureFixture[str]) -> None:
    assert warm.main(["--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "kernels.warm: error: nothing to compile: the ops run on torch" in said
    assert len(said.splitlines()) == 1
