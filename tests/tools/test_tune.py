"""The tuning table is rewritten where a candidate won, and nowhere else."""

from tools import tune

TABLE_SOURCE = """
TABLE: dict[str, tuple[Rule, ...]] = {
    "a": (Rule({"D": 64}, {"sm_80": config(4, 2, BLOCK=64)}), Rule({}, {"sm_80": config(4, 1)})),
    "b": (Rule({}, {"sm_80": config(1, 1), "sm_90": config(2, 2, BLOCK=32)}),),
}
"""


def test_rewriting_the_table() -> None:
    replaced = tune.rewrite(TABLE_SOURCE, "b", 0, "sm_90", "config(8, 3, BLOCK=128)")
    assert replaced == TABLE_SOURCE.replace("config(2, 2, BLOCK=32)", "config(8, 3, BLOCK=128)")
    added = tune.rewrite(TABLE_SOURCE, "a", 0, "sm_90", "config(8, 3, BLOCK=128)")
    old = '{"sm_80": config(4, 2, BLOCK=64)}'
    new = '{"sm_90": config(8, 3, BLOCK=128), "sm_80": config(4, 2, BLOCK=64)}'
    assert added == TABLE_SOURCE.replace(old, new)
