import json
import math
from pathlib import Path

import numpy as np

from fastgpt2.evaluate.perplexity import TextScore, WorstToken
from fastgpt2.evaluate.report import task_table, text_table, write_task_report, write_text_report
from fastgpt2.evaluate.tasks import Metric

PNG = b"\x89PNG\r\n\x1a\n"


def score(loss: float, worst: str = " the") -> TextScore:
    generator = np.random.default_rng(0)
    position = np.abs(generator.normal(40, 5, (3, 23)))
    calibration = np.array([[30.0] * 10, np.arange(10) * 3 + 1.5, np.arange(10) * 3.0])
    token = WorstToken(9.5, 7, "$x_1$ `a`\n猫", worst)
    return TextScore(920, 919, 2000, 190, loss, 24, 12, position, calibration, (token,))


def test_text_report(tmp_path: Path) -> None:
    scores = {"a|b": score(1.25), "two": score(800.0, "|"), "long" * 20: score(2.5)}
    write_text_report(tmp_path, {"task": "text", "data": "$x.txt"}, scores)
    record = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert record["protocol"] == {"task": "text", "data": "$x.txt"}
    first = record["models"]["a|b"]
    assert (first["loss"], first["context"], first["stride"]) == (1.25, 24, 12)
    assert first["perplexity"] == math.exp(1.25)
    assert first["bits_per_byte"] == 1.25 * 919 / 2000 / math.log(2)
    assert first["word_perplexity"] == math.exp(1.25 * 920 / 190)
    assert first["position_count"] == scores["a|b"].position[0].tolist()
    assert first["worst_tokens"][0]["before"] == "$x_1$ `a`\n猫"
    # JSON has no infinity
    assert record["models"]["two"]["perplexity"] is None
    text = (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert text_table(scores) in text and "- data: $x.txt" in text
    assert (tmp_path / "evaluation.png").read_bytes().startswith(PNG)


def test_text_table() -> None:
    lines = text_table({"a|b": score(1.25), "two": score(2.0)}).splitlines()
    head = "model context stride tokens bytes nats/token perplexity bits/byte word-perplexity"
    assert lines[0].replace("|", "").split() == head.split()
    assert lines[2].startswith("| a\\|b  |      24 |     12 |    919 | 2,000 |     1.2500 |")
    assert len({len(line) for line in lines}) == 1


def test_task_report(tmp_path: Path) -> None:
    results = {
        "one": {"accuracy": Metric(0.25, 0.1), "perplexity": Metric(40.0, math.nan)},
        "two": {"accuracy": Metric(0.5, 0.125), "perplexity": Metric(30.0, 2.0)},
    }
    write_task_report(tmp_path, {"task": "lambada"}, results, 0.25)
    record = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert record["models"]["two"]["accuracy"] == {"value": 0.5, "stderr": 0.125}
    assert record["models"]["one"]["perplexity"] == {"value": 40.0, "stderr": None}
    assert "| two   | 0.5000 ± 0.1250 | 30.0000 ± 2.0000 |" in task_table(results)
    assert task_table(results) in (tmp_path / "evaluation.md").read_text(encoding="utf-8")
    assert (tmp_path / "evaluation.png").read_bytes().startswith(PNG)
