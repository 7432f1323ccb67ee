"""lm-eval through the drop-in, on a task of local files: its numbers are ours."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastgpt2.evaluate.__main__ import main
from fastgpt2.text import GPT2Tokenizer
from fastgpt2.weights import load, save
from tests.evaluate.small import LAMBADA, byte_gpt, save_run, write_lines
from tests.text.tiny import tiny_files

# lm-eval's lambada_openai, from a file
TASK = """
task: local_lambada
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def harness(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fastgpt2.evaluate.harness", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")
def test_equals_ours(tmp_path: Path) -> None:
    encoder, merges = tiny_files()
    vocab_size = GPT2Tokenizer(encoder, merges).vocab_size
    run = save_run(byte_gpt(vocab_size=vocab_size, block_size=64), tmp_path / "run")
    folder = save(load(run), tmp_path / "hf", "hf")
    end = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<|endoftext|>"} | end
    for name, text in (
        ("vocab.json", encoder),
        ("merges.txt", merges),
        ("tokenizer_config.json", json.dumps(config)),
    ):
        (folder / name).write_text(text, encoding="utf-8")
    data = write_lines(tmp_path / "lambada.jsonl", [{"text": text} for text in LAMBADA])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    result = harness(
        *("run", "--model", "fastgpt2", "--model_args", f"pretrained={folder}"),
        *("--tasks", "local_lambada", "--include_path", str(tmp_path / "tasks")),
        *("--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "theirs.json")),
        **{"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    files = [*tmp_path.glob("theirs*.json"), *(tmp_path / "theirs.json").glob("**/*.json")]
    record = json.loads(next(f for f in files if f.is_file()).read_text(encoding="utf-8"))
    theirs = record["results"]["local_lambada"]
    arguments = [str(folder), "--task", "lambada", "--data", str(data), "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "ours")]) == 0
    ours = json.loads((tmp_path / "ours" / "evaluation.json").read_text(encoding="utf-8"))
    metrics = ours["models"][str(folder)]
    assert theirs["perplexity,none"] == pytest.approx(metrics["perplexity"]["value"], rel=1e-4)
    assert theirs["acc,none"] == metrics["accuracy"]["value"]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_says_what_is_missing() -> None:
    result = harness("--help")
    assert result.returncode == 1
    assert "needs lm-eval" in result.stderr and "Traceback" not in result.stderr
