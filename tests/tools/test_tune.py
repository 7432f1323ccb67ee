"""The tuning table is rewritten where a candidate won, and nowhere else."""

import json
from typing import Any

from fastgpt2.kernels import tuning
from tools import tune

TABLE: dict[str, list[dict[str, Any]]] = {
    "a": [
        {"why": "narrow", "limits": {"D": 64}, "configs": {"sm_80": {"BLOCK": 64, "num_warps": 4}}},
        {"limits": {}, "configs": {"sm_80": {"num_warps": 4}}, "candidates": [{"num_warps": 8}]},
    ],
    "b": [{"limits": {}, "configs": {"sm_80": {"num_warps": 1}, "sm_90": {"num_warps": 2}}}],
}


def test_rewriting_the_table() -> None:
    source = tuning.as_json(TABLE)
    assert json.loads(source) == TABLE
    winner = {"BLOCK": 128, "num_warps": 8}
    replaced = tune.rewrite(source, "b", 0, "sm_90", winner)
    assert replaced == source.replace('{"num_warps": 2}', json.dumps(winner))
    added = json.loads(tune.rewrite(source, "a", 0, "sm_90", winner))
    assert added["a"][0]["configs"].pop("sm_90") == winner
    assert added == TABLE


def test_the_committed_table_is_written_as_the_tool_writes_it() -> None:
    source = tuning.TABLE_FILE.read_text(encoding="utf-8")
    assert tuning.as_json(json.loads(source)) == source


def test_every_kernel_has_a_rule_for_every_launch() -> None:
    for kernel, rules in tuning.TABLE.items():
        assert not rules[-1].limits, kernel
        assert all(tuning.FALLBACK in rule.configs for rule in rules), kernel
