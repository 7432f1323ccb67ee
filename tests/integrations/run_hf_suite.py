"""Run transformers' own common model tests on its GPT-2, and on the same classes of ours.

    python tests/integrations/run_hf_suite.py           # fetch, run, compare: the one command
    python tests/integrations/run_hf_suite.py --whose ours --source transformers-VERSION [-k NAME]

The first form fails if any test that passes for theirs does not pass for ours. It runs ours, and
for theirs only the tests that did not pass for ours. Their models compare ``sdpa`` with eager
attention in many of these tests; for ours that is our attention.

The source distribution of the installed version has the common tests (``ModelTesterMixin``) but not
the folders below. What is imported from those is an empty mixin here, or the real one if
``--source`` is a full checkout. Needs a package registry and ``parameterized``.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastgpt2

MIXINS = {
    "exporters.test_export": "ExportTesterMixin",
    "generation.test_utils": "GenerationTesterMixin",
}
NAMES = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)
# their tests live in packages, so they get one; another name than `tests`, which is ours
PACKAGE = "hf_tests"


def their_tests(source: Path) -> Any:
    """``tests.test_modeling_common`` of that folder, its absent neighbours stubbed."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(source / "tests")]
    sys.modules[PACKAGE] = package
    for name, mixin in MIXINS.items():
        if not (source / "tests" / f"{name.replace('.', '/')}.py").exists():
            stub = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(stub, mixin, type(mixin, (), {}))
            sys.modules[stub.__name__] = stub
            parent = stub.__name__.rpartition(".")[0]
            sys.modules.setdefault(parent, types.ModuleType(parent))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


def accelerated(base: Any) -> Any:
    """A subclass that accelerates itself when it is made, under the name that tests look up."""
    if base is transformers.GPT2LMHeadModel:
        return fastgpt2.GPT2LMHeadModel

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        fastgpt2.accelerate(self)

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})


class Tester:
    """The small model and its inputs, by the attributes that the common tests read."""

    batch_size = 13
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    num_choices = 4
    num_labels = 3
    is_training = True

    def get_config(self) -> Any:
        options: dict[str, Any] = {"num_labels": self.num_labels}
        return transformers.GPT2Config(
            vocab_size=self.vocab_size,
            n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers,
            n_head=self.num_attention_heads,
            n_inner=37,
            n_positions=512,
            bos_token_id=98,
            eos_token_id=98,
            pad_token_id=97,
            **options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": torch.randint(0, 97, shape),
            "token_type_ids": torch.randint(0, 16, shape),
            "attention_mask": torch.ones(shape, dtype=torch.long),
        }
        return self.get_config(), inputs


def make_case(source: Path, classes: tuple[Any, ...]) -> type[unittest.TestCase]:
    """Their common tests, bound to these classes."""
    common = their_tests(source)

    class GPT2ModelTest(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):  # type: ignore[misc, name-defined]
        all_model_classes = classes
        test_missing_keys = False
        # written for this version's own file layout
        __module__ = f"{PACKAGE}.models.gpt2.test_modeling_gpt2"

        def setUp(self) -> None:
            self.model_tester = Tester()

        def _prepare_for_class(
            self, inputs: Any, model_class: Any, return_labels: bool = False
        ) -> Any:
            inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
            if return_labels and model_class.__name__ == "GPT2DoubleHeadsModel":
                tester = self.model_tester
                shape = (tester.batch_size, tester.num_choices, tester.seq_length)
                zeros = torch.zeros(shape, dtype=torch.long)
                inputs |= dict.fromkeys(("input_ids", "token_type_ids", "labels"), zeros)
                inputs["attention_mask"] = torch.ones_like(zeros)
                inputs["mc_token_ids"] = zeros[..., 0]
                inputs["mc_labels"] = zeros[:, 0, 0]
            return inputs

        def check_training_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
            # as in their file for GPT-2: the labels of these tests leave the second head out
            self.all_model_classes = tuple(c for c in classes if "Double" not in c.__name__)
            super().check_training_gradient_checkpointing(*args, **kwargs)

    return GPT2ModelTest


class Plugin:
    """Gives pytest the one test case, without the tests ``left_out``, and records what passes."""

    def __init__(self, case: type[unittest.TestCase], left_out: set[str]) -> None:
        self.case, self.left_out = case, left_out
        self.outcomes: dict[str, str] = {}

    def pytest_collect_file(self, parent: Any, file_path: Path) -> Any:
        if file_path == Path(__file__).resolve():
            module = pytest.Module.from_parent(parent, path=file_path)
            module._obj = types.ModuleType("gpt2_suite")
            module._obj.GPT2ModelTest = self.case
            return module
        return None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.name not in self.left_out]

    def pytest_runtest_logreport(self, report: Any) -> None:
        # a failure counts in every phase, also one of a subtest; a skip reports no call
        name = report.nodeid.rpartition("::")[2]
        if report.when == "call" or not report.passed:
            known = self.outcomes.get(name)
            self.outcomes[name] = known if known == "failed" else report.outcome


def passed(outcomes: Path) -> set[str]:
    """Names of the tests that passed, from a file of ``--outcomes``."""
    results = json.loads(outcomes.read_text(encoding="utf-8"))
    return {name for name, outcome in results.items() if outcome == "passed"}


def run(
    source: Path, whose: str, outcomes: Path | None, left_out: Path | None, options: list[str]
) -> int:
    """Run the suite in this process; pytest's code."""
    classes = tuple(getattr(transformers, name) for name in NAMES)
    if whose == "ours":
        classes = tuple(accelerated(base) for base in classes)
    plugin = Plugin(make_case(source, classes), set() if left_out is None else passed(left_out))
    arguments = [__file__, "-q", "-p", "no:cacheprovider", f"--rootdir={source}", *options]
    code = int(pytest.main(arguments, plugins=[plugin]))
    if outcomes is not None:
        outcomes.write_text(json.dumps(plugin.outcomes), encoding="utf-8")
    return code


def fetch(folder: Path) -> Path:
    """The source distribution of the installed version, unpacked into ``folder``."""
    wanted = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", folder, wanted], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"transformers-{transformers.__version__}"


def compare(folder: Path) -> int:
    """Run ours, then of theirs what ours did not pass; 1 if any of that passes for theirs."""
    source = fetch(folder)
    ours, theirs = folder / "ours.json", folder / "theirs.json"
    print(f"the tests of transformers {transformers.__version__}: minutes", flush=True)
    runs: dict[str, list[str]] = {"ours": [], "theirs": ["--left-out", str(ours)]}
    for whose, options in runs.items():
        command = [sys.executable, __file__, "--source", str(source), "--whose", whose, *options]
        with (folder / f"{whose}.log").open("wb") as log:
            outcomes = ["--outcomes", str(folder / f"{whose}.json")]
            subprocess.run([*command, *outcomes], stdout=log, stderr=log, check=False)
        # the last line of the log is pytest's count
        print(f"{whose}: {(folder / f'{whose}.log').read_text('utf-8').splitlines()[-1]}")
    lost = sorted(passed(theirs))
    if lost:
        print((folder / "ours.log").read_text(encoding="utf-8"))
    print(f"pass for ours: {len(passed(ours))}; only for theirs: {lost or 0}")
    return int(bool(lost) or not passed(ours))


def main() -> int:
    parser = argparse.ArgumentParser(description="transformers' own GPT-2 tests, on ours, too")
    parser.add_argument("--source", type=Path, help="transformers, unpacked [fetched]")
    parser.add_argument("--whose", choices=("theirs", "ours"), help="run one [compare]")
    parser.add_argument("--outcomes", type=Path, help="JSON file for the outcomes")
    parser.add_argument("--left-out", type=Path, help="leave out what passed in these outcomes")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.whose is None:
            return compare(folder)
        source = fetch(folder) if args.source is None else args.source.resolve()
        return run(source, args.whose, args.outcomes, args.left_out, options)


if __name__ == "__main__":
    sys.exit(main())
