"""Blocks that hold their own parameters: FSDP2 on each block, in two real processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

# blocks shared out one by one, and the root with the tied, padded embedding; dropout is off
SCRIPT = """
import os
import sys
from functools import partial
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tests.tiny_gpt import tiny_batch, tiny_gpt
from tools.forked import fork_rank

folder = Path(sys.argv[1])

def step(rank):
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
        torch.save(found, folder / "gradients.pt")
    dist.destroy_process_group()
    return 0

ranks = [fork_rank(partial(step, rank), rank, 2, port=None, said=folder) for rank in range(2)]
assert not any(os.waitpid(rank, 0)[1] for rank in ranks)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_sharded_blocks_have_the_gradients_of_whole_ones(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=240, check=False)
    said = [file.read_text(encoding="utf-8") for file in tmp_path.glob("err.*")]
    assert done.returncode == 0, said
    idx, targets = tiny_batch(B=4)
    expected = gradients(tiny_gpt(vocab_size=4100), idx, targets.clamp(min=0))
    del expected["loss"]
    found = torch.load(tmp_path / "gradients.pt")
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)
