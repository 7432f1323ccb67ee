"""Write the page of a finished run: what was run, what was measured, its curves and a sample.

    python docs/runs/build.py RUN NAME

makes ``docs/runs/NAME.md`` with ``NAME.png`` and ``NAME.jsonl`` beside it, from RUN alone.
"""

import platform
import shutil
import sys
from pathlib import Path

import torch

from fastgpt2 import runs
from fastgpt2.generate.stream import stream_text
from fastgpt2.text import load_tokenizer
from fastgpt2.train import checkpoint
from fastgpt2.train.config import TrainConfig
from fastgpt2.train.config_file import read_config
from fastgpt2.train.metrics import read_metrics

HERE = Path(__file__).parent


def build(run: Path, name: str, prompt: str) -> None:
    """Write the three files."""
    records = read_metrics(run)
    config = TrainConfig.from_layers(read_config(str(run / "config.toml")))
    training = [r for r in records if "train_loss" in r]
    validation = [r for r in records if "val_loss" in r]
    model = checkpoint.load_model(runs.latest(run))
    tokenizer = load_tokenizer(run)
    sample = prompt + "".join(
        stream_text(model, tokenizer, prompt, 120, temperature=0.8, top_k=50, seed=1337)
    )
    last, minutes = training[-1], records[-1]["elapsed"] / 60
    rows = "\n".join(
        f"| {r['step']:,} | {r['tokens']:,} | {r['val_loss']:.4f} | {r['val_perplexity']:.2f} | "
        f"{r['val_bits_per_byte']:.4f} |"
        for r in validation
    )
    page = f"""# {name}

{model.get_num_params(non_embedding=False):,} parameters, tokenizer {tokenizer.name},
{last["step"]:,} steps of {last["tokens"] // last["step"]:,} tokens in {minutes:.1f} minutes on
{_machine()}. Training loss at the end: **{last["train_loss"]:.4f}** nats per token.

![loss, learning rate and speed]({name}.png)

| step | tokens | validation loss (nats/token) | perplexity | bits/byte |
|---|---|---|---|---|
{rows}

A sample of the last checkpoint (temperature 0.8, top-k 50):

```text
{sample.strip()}
```

The configuration; every record of the run is in [{name}.jsonl]({name}.jsonl).

```toml
{config.to_toml().strip()}
```

This page was made from the run's folder by `python docs/runs/build.py RUN {name}`.
"""
    (HERE / f"{name}.md").write_text(page, encoding="utf-8")
    shutil.copy(run / "loss.png", HERE / f"{name}.png")
    shutil.copy(run / "metrics.jsonl", HERE / f"{name}.jsonl")


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(": ")[2]
            break
    return f"{torch.get_num_threads()} threads of {cpu}, PyTorch {torch.__version__}"


if __name__ == "__main__":
    folder, title = Path(sys.argv[1]), sys.argv[2]
    build(folder, title, read_config(str(folder / "config.toml"))["sample_prompt"])
