import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt2.errors import UserError
from fastgpt2.evaluate import tasks
from fastgpt2.evaluate.continuations import Request, score_continuations
from fastgpt2.evaluate.tasks import TASKS, Example, fetch, is_published, read_examples, score_task
from fastgpt2.model import GPT
from fastgpt2.text import BytesTokenizer
from tests.evaluate.small import HELLASWAG, LAMBADA, byte_gpt, write_lines
from tests.loopback import content, serve


@torch.no_grad()
def slow(model: GPT, context: str, continuation: str) -> tuple[float, int, bool]:
    """Loss of a continuation, its number of tokens, and whether greedy decoding gives it."""
    block_size = model.config.block_size
    n = len(continuation.encode())
    ids = torch.tensor([*(context + continuation).encode()][-(block_size + 1) :])
    log_p = model.logits(ids[None, :-1])[0, -n:].double().log_softmax(-1)
    nll = -log_p[range(n), ids[-n:]].sum().item()
    return nll, n, bool((log_p.argmax(-1) == ids[-n:]).all())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_hellaswag_by_hand(tmp_path: Path, batch_size: int) -> None:
    path = write_lines(tmp_path / "h.jsonl", HELLASWAG)
    task, model = TASKS["hellaswag"], byte_gpt(3)
    best, best_norm = [], []
    for record in HELLASWAG:
        scores = [slow(model, record["ctx"], f" {ending}") for ending in record["endings"]]
        best.append(int(np.argmin([nll for nll, _, _ in scores])))
        best_norm.append(int(np.argmin([nll / n for nll, n, _ in scores])))
    # one answer that neither accuracy finds, and one that the second one alone finds
    labels = list(best_norm)
    both = next(i for i, (x, y) in enumerate(zip(best, best_norm, strict=True)) if x == y)
    labels[both] = (best[both] + 1) % 4
    examples = [
        replace(example, label=label)
        for example, label in zip(read_examples(task, path), labels, strict=True)
    ]
    metrics = score_task(
        task, examples, model, BytesTokenizer(), batch_size=batch_size, dtype=torch.float32
    )
    for name, chosen in (("accuracy", best), ("accuracy_norm", best_norm)):
        hits = np.equal(chosen, labels).astype(float)
        assert 0 < hits.mean() < 1
        assert metrics[name].value == pytest.approx(hits.mean())
        p = hits.mean()
        assert metrics[name].stderr == pytest.approx(math.sqrt(p * (1 - p) / (len(hits) - 1)))
    assert metrics["accuracy"].value < metrics["accuracy_norm"].value


def test_lambada_by_hand(tmp_path: Path) -> None:
    task, model = TASKS["lambada"], byte_gpt(3)
    path = write_lines(tmp_path / "l.jsonl", [{"text": text} for text in LAMBADA])
    examples = read_examples(task, path)
    assert examples[1] == Example('he said "no" and', (" left",), 0)
    # one word that the model does say next
    with torch.no_grad():
        said = int(model.logits(torch.tensor([[*b"We"]]))[0, -1].argmax())
    losses = [slow(model, e.context, e.continuations[0]) for e in examples]
    metrics = score_task(task, examples, model, BytesTokenizer(), batch_size=2, dtype=torch.float32)
    nll = np.array([loss for loss, _, _ in losses])
    assert metrics["perplexity"].value == pytest.approx(math.exp(nll.mean()), rel=1e-5)
    expected = math.exp(nll.mean()) * nll.std(ddof=1) / 2
    assert metrics["perplexity"].stderr == pytest.approx(expected, rel=1e-4)
    assert metrics["accuracy"].value == np.mean([greedy for _, _, greedy in losses])
    requests = [Request([*b"We"], [said]), Request([*b"We"], [said, (said + 1) % 257])]
    found = score_continuations(model, requests, batch_size=2, dtype=torch.float32)
    assert found.greedy.tolist()[0] is True
    assert found.tokens.tolist() == [1, 2]


def test_greedy_needs_every_token() -> None:
    model = byte_gpt(3)
    with torch.no_grad():
        first = int(model.logits(torch.tensor([[*b"We"]]))[0, -1].argmax())
        second = int(model.logits(torch.tensor([[*b"We", first]]))[0, -1].argmax())
    other = (second + 1) % 257
    requests = [
        Request([*b"We"], ids) for ids in ([first, second], [first, other], [other, second])
    ]
    greedy = score_continuations(model, requests, batch_size=3, dtype=torch.float32).greedy
    assert greedy.tolist() == [True, False, False]


def test_continuation_too_long() -> None:
    with pytest.raises(UserError, match=r"a continuation of 25 tokens does not fit .* of 24"):
        score_continuations(byte_gpt(), [Request([1], [2] * 25)], batch_size=1, dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("hellaswag", {"ctx": "a", "endings": ["b"] * 4}, "line 2: no 'label'"),
        ("hellaswag", HELLASWAG[0] | {"endings": ["b"] * 3}, "line 2: expected 4 endings"),
        ("hellaswag", HELLASWAG[0] | {"label": 4}, "line 2: expected 4 endings"),
        ("hellaswag", HELLASWAG[0] | {"label": "x"}, "line 2: invalid literal"),
        ("lambada", {"txt": "a b"}, "line 2: no 'text' .a lambada file is expected"),
        ("lambada", {"text": "word"}, "line 2: expected a text that ends in a word"),
        ("lambada", {"text": 3}, "line 2: text must be text, got 3"),
        ("lambada", {"text": "a \ud800"}, r"line 2: text must be text, got 'a \\ud800'"),
        ("hellaswag", HELLASWAG[0] | {"ctx": 5}, "line 2: ctx must be text, got 5"),
        ("hellaswag", HELLASWAG[0] | {"endings": "abcd"}, "line 2: expected 4 endings"),
        ("hellaswag", HELLASWAG[0] | {"endings": ["b"] * 3 + [None]}, "an ending must be text"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, record: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = HELLASWAG[0] if name == "hellaswag" else {"text": "a b"}
    path = write_lines(tmp_path / "x.jsonl", [good, record])
    with pytest.raises(UserError, match=message):
        read_examples(TASKS[name], path)
    assert len(read_examples(TASKS[name], path, limit=1)) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no examples"),
        (b"not json\n", "line 1: Expecting value"),
        (b'{"text": "a b"}\n[1]\n', "line 2: list indices"),
        (b'{"text": "\xff b"}\n', "not UTF-8"),
        (b"[" * 100_000, "line 1: nested too deeply"),
    ],
)
def test_not_json_lines(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_examples(TASKS["lambada"], tmp_path / "x")
    with pytest.raises(UserError, match="No such file"):
        read_examples(TASKS["lambada"], tmp_path / "y")


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "cache_dir", lambda: tmp_path)
    data = b'{"text": "a b"}\n'
    with serve() as site:
        url = site.add("/l.jsonl", content(data))
        digest = hashlib.sha256(data).hexdigest()
        remote = replace(TASKS["lambada"].remote, urls=(url,), sha256=digest, size=len(data))
        task = replace(TASKS["lambada"], remote=remote)
        with pytest.raises(UserError, match="is not there, and offline is set"):
            fetch(task, offline=True)
        assert fetch(task) == fetch(task, offline=True) == tmp_path / "tasks" / "lambada_test.jsonl"
        assert len(site.asked) == 1
        assert is_published(task, fetch(task)) and not is_published(TASKS["lambada"], fetch(task))
        wrong = replace(task, remote=replace(remote, sha256="0" * 64))
        with pytest.raises(UserError, match=r"lambada: .*expected sha256 0000.*--data FILE"):
            fetch(wrong)
