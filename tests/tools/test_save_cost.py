import json

import pytest

from tools.save_cost import main


def test_the_record(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--n-layer=1 --n-embd=16 --block-size=8 --vocab-size=50 --batch-size=2 --saves=2"
    assert main([*tiny.split(), "--device=cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["tokens"] == 16
    assert min(record[x] for x in ("plain_step", "saving_step", "ratio", "waited_for")) > 0
    assert record["worst_ratio"] >= record["ratio"] and record["steps_while_writing"] >= 1
