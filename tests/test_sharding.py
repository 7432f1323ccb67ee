"""Blocks that hold their own parameters: FSDP2 on each block, in two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

# blocks shared out one by one, and the root with the tied, padded embedding; dropout is off
SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.tiny_gpt import tiny_batch, tiny_gpt

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = tiny_gpt(vocab_size=4100)
for block in model.transformer.h:
    fully_shard(block.mlp)
    fully_shard(block)
fully_shard(model)
idx, targets = tiny_batch(B=4)
mine = slice(2 * rank, 2 * rank + 2)
for _ in range(2):
    model.zero_grad()
    model(idx[mine], targets[mine].clamp(min=0))[1].backward()
found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    torch.save(found, f"{folder}/gradients.pt")
dist.destroy_process_group()
"""


def test_sharded_blocks_have_the_gradients_of_whole_ones(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 0, stderr
    idx, targets = tiny_batch(B=4)
    expected = gradients(tiny_gpt(vocab_size=4100), idx, targets.clamp(min=0))
    del expected["loss"]
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
