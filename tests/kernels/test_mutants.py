"""The mutant runner kills what a test notices, reports what survives, refuses stale lists."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fastgpt2 import kernels
from tests.kernels.mutants import Mutant, StaleMutant, gelu, mutate, run
from tests.kernels.mutants.run import judge_all, load_mutants
from tests.spread import spread

TEST = "tests/test_double.py::test_double"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository in small: one function, one test."""
    for folder in ("kernels", "tests"):
        (tmp_path / folder).mkdir()
    source = "def double(x):\n    y = x * 2\n    return y + 0\n"
    (tmp_path / "kernels" / "double.py").write_text(source, encoding="utf-8")
    test = "from kernels.double import double\n\ndef test_double():\n    assert double(3) == 6\n"
    (tmp_path / "tests" / "test_double.py").write_text(test, encoding="utf-8")
    return tmp_path


def _mutant(name: str, old: str, new: str, test: str = TEST) -> Mutant:
    return Mutant(name, "kernels/double.py", old, new, (test,))


def test_killed_survived_and_broken(tree: Path) -> None:
    mutants = [
        _mutant("wrong", "x * 2", "x * 3"),
        _mutant("crashing", "x * 2", "__import__('os').abort()"),
        _mutant("harmless", "y + 0", "y - 0"),
        _mutant("no_such_test", "x * 2", "x * 4", "tests/test_double.py::test_gone"),
    ]
    verdicts = list(judge_all({"double": mutants}, 2, tree))
    outcomes = {verdict.name: verdict.outcome for verdict in verdicts}
    assert outcomes["wrong"] == "killed"
    assert outcomes["crashing"] == "killed"
    assert {f"by {TEST}", "by a crash, SIGABRT"} <= {verdict.detail for verdict in verdicts}
    assert outcomes["harmless"] == "SURVIVED"
    # the unmutated run asks for the missing test, too
    assert outcomes["no_such_test"] == outcomes["(unmutated)"] == "ERROR"
    assert "x * 2" in (tree / "kernels" / "double.py").read_text(encoding="utf-8")


def test_failing_before_any_edit_is_an_error(tree: Path) -> None:
    (tree / "kernels" / "double.py").write_text("def double(x): return 0  # one\n", "utf-8")
    verdicts = judge_all({"double": [_mutant("wrong", "# one", "# two")]}, 1, tree)
    assert next(verdicts).outcome == "ERROR"


@pytest.mark.parametrize(
    ("old", "new"), [("absent", "x"), ("x", "y"), ("x * 2", "x * 2")], ids=["gone", "twice", "same"]
)
def test_stale_mutants_are_refused(old: str, new: str) -> None:
    with pytest.raises(StaleMutant, match="stale: "):
        mutate(_mutant("stale", old, new), "y = x * 2 + x")


def test_committed_lists_are_fresh_and_name_tests_that_exist() -> None:
    mutants = load_mutants()
    for op, listed in mutants.items():
        assert len(listed) >= 5, f"{op} has only {len(listed)} mutants"
        assert len({mutant.name for mutant in listed}) == len(listed), f"{op}: names repeat"
        for mutant in listed:
            assert mutant.tests, f"{op}: {mutant.name} names no test"
            for test in mutant.tests:
                path, _, function = test.partition("::")
                source = Path(path).read_text(encoding="utf-8")
                # a path alone stands for all tests of the file
                found = not function or f"def {function.partition('[')[0]}(" in source
                assert found, f"{mutant.name}: {test}"


def test_unknown_op_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--op", "no_such_op"]) == 2
    assert capsys.readouterr().err.startswith("error: no mutants for no_such_op; there are ")


def test_a_stale_list_and_a_wrong_call_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gelu, "MUTANTS", [replace(gelu.MUTANTS[0], old="text of long ago")])
    assert run.main(["--op", "gelu"]) == 2
    assert "'text of long ago' occurs 0 times in kernels/" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run.main(["--sample", "some"])
    assert ended.value.code == 2


def test_every_op_has_mutants() -> None:
    ops = {getattr(kernels, name) for name in kernels.__all__} - {kernels.Impl}
    homes = {op.__module__.rpartition(".")[2] for op in ops} - {"backend"}
    # attention has one more implementation than the others, linear_fp8 rounds by a kernel of its
    # own, and the steps of decoding are not ops
    parts = {"blocked_attention", "quantize_fp8", "decode_step", "gpu_step"}
    assert homes | parts == set(load_mutants())


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        (["passes", "killed"], 0),
        (["passes", "killed", "SURVIVED"], 1),
        (["passes", "SURVIVED", "ERROR"], 2),
    ],
)
def test_exit_codes(
    outcomes: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def verdicts(*arguments: object) -> Iterator[run.Verdict]:
        for outcome in outcomes:
            yield run.Verdict("gelu", outcome, outcome)
            # a campaign that is killed has said all that it knew
            assert capsys.readouterr().out.split() == ["gelu", outcome, outcome]

    monkeypatch.setattr(run, "judge_all", verdicts)
    assert run.main(["--op", "gelu"]) == code
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_sample_spreads_over_the_list() -> None:
    mutants = [_mutant(str(i), "a", "b") for i in range(6)]
    assert [mutant.name for mutant in spread(mutants, 2)] == ["0", "3"]
    assert len(spread(mutants, 9)) == 6
