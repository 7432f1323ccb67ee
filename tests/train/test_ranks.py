"""Several processes train what one does; they stop, fail and speak as one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastgpt2 import runs
from fastgpt2.model import GPT
from fastgpt2.train.__main__ import main as train_command
from fastgpt2.train.guard import BAD_STEP
from fastgpt2.train.intact import newest_intact
from fastgpt2.weights import load, save
from tests.train.tiny_run import assert_same_training, measured, saved_tensors

ROOT = Path(__file__).parents[2]

KINDS = [(optimizer, kind) for optimizer in ("adamw", "muon") for kind in ("--no-shard", "--shard")]

# what two GPUs run
ON_GPUS = (
    *(f"{optimizer} {kind}" for optimizer, kind in KINDS),
    *("adamw alone", "muon alone", "killed", "hangs"),
)

# a step of four micro-batches, by one process and by two
ALONE, PAIR = "adamw alone", "adamw --no-shard"


class Ranks:
    """The results of all scenarios."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: dict[str, Any] = {
            path.parent.name: json.loads(path.read_text(encoding="utf-8"))
            for path in folder.glob("*/outcome.json")
        }

    def run(self, name: str) -> Path:
        outcome = self.outcomes[name]
        assert set(outcome["codes"]) == {0}, outcome
        return self.folder / name / "run"

    def complaints(self, name: str) -> list[str]:
        return [line for text in self.outcomes[name]["err"] for line in text.splitlines()]


def run_scenarios(data: Path, folder: Path, *names: str, device: str = "cpu") -> Ranks:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, "-m", "tests.train.rank_scenarios", str(data), str(folder), *names]
    # a process that has asked CUDA how many GPUs there are cannot be forked; NVML may be asked
    environment = os.environ | {"RANKS_DEVICE": device, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr
    return Ranks(folder)


@pytest.fixture(scope="module")
def ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_scenarios(data, tmp_path_factory.mktemp("ranks"))


def saved_weights(run: Path) -> dict[str, Tensor]:
    """The weights of the newest checkpoint, in any form."""
    return {name: tensor.read() for name, tensor in load(runs.latest(run)).tensors.items()}


def assert_weights_close(run: Path, expected: Path) -> None:
    ours, theirs = (saved_weights(path) for path in (run, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # the gradient of a key's bias is only rounding, which AdamW turns into full steps
        if name.endswith("c_attn.bias"):
            C = weight.shape[0] // 3
            ours[name][C : 2 * C] = weight[C : 2 * C]
        # Muon scales a gradient's rounding up to the size of the gradient: its step is 0.02
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-4, msg=name)


def assert_equal_to_rounding(run: Path, expected: Path) -> None:
    assert_weights_close(run, expected)
    losses = [[r["train_loss"] for r in measured(x) if "train_loss" in r] for x in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    validation = [[r["val_loss"] for r in measured(x) if "val_loss" in r] for x in (run, expected)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    assert len(losses[0]) == 4 and len(validation[0]) == 2


@pytest.mark.parametrize("name", ["4x1", "4x1 --shard"])
def test_four_ranks_equal_one_process(ranks: Ranks, name: str) -> None:
    assert_equal_to_rounding(ranks.run(name), ranks.run(ALONE))


@pytest.mark.parametrize(("optimizer", "kind"), KINDS)
def test_replicated_and_sharded_equal_one_process(ranks: Ranks, optimizer: str, kind: str) -> None:
    assert_equal_to_rounding(ranks.run(f"{optimizer} {kind}"), ranks.run(f"{optimizer} alone"))


@pytest.mark.parametrize(("optimizer", "kind"), KINDS)
def test_a_signal_to_one_rank_stops_all_and_resuming_is_exact(
    ranks: Ranks, optimizer: str, kind: str
) -> None:
    stopped = ranks.outcomes[f"{optimizer} {kind} parts"]
    assert stopped["codes"] == [143, 143]
    assert "stopped by SIGTERM: step 2 is saved" in stopped["out"][0]
    ranks.run(f"{optimizer} {kind} dropout")
    parts = ranks.folder / f"{optimizer} {kind} parts" / "run"
    assert ranks.outcomes[f"{optimizer} {kind} parts, resumed"]["codes"] == [0, 0]
    assert_same_training(parts, ranks.folder / f"{optimizer} {kind} dropout" / "run")


def test_compiled_ranks_equal_one_process(ranks: Ranks) -> None:
    assert_equal_to_rounding(ranks.run("compiled"), ranks.run(ALONE))
    said = ranks.outcomes["compiled"]["out"][0]
    assert "compile: on" in said and "training without it" not in said


def test_a_padded_vocabulary_goes_from_shards_to_one_file_and_back(ranks: Ranks) -> None:
    """Two ranks, then one process, then two ranks; the head is the padded embedding."""
    run = ranks.run("padded")
    for name in ("padded, alone", "padded, sharded again"):
        assert set(ranks.outcomes[name]["codes"]) == {0}, ranks.outcomes[name]
    forms = [(runs.step_folder(run, step) / runs.SHARDS).is_dir() for step in (1, 2, 3, 4)]
    assert forms == [True, True, False, True]
    # of 4,201 rows in files, each of two ranks holds half of 4,224
    shards = sorted((runs.step_folder(run, 4) / runs.SHARDS).glob("*00001-of-00002*"))
    rows = [load_file(shard)["model.transformer.wte.weight"].shape[0] for shard in shards]
    assert rows == [2112, 2112]
    assert_weights_close(run, ranks.run("padded alone"))
    losses = [
        [r["train_loss"] for r in measured(path) if "train_loss" in r]
        for path in (run, ranks.run("padded alone"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


def test_every_command_opens_shards(ranks: Ranks, tmp_path: Path) -> None:
    run = ranks.run("adamw --shard")
    weights = saved_weights(run)
    save(load(run), tmp_path / "whole", "fastgpt2")
    copy = runs.latest(tmp_path / "whole")
    assert (copy / runs.MODEL).is_file() and not (copy / runs.SHARDS).exists()
    assert all(x.equal(weights[name]) for name, x in load_file(copy / runs.MODEL).items())
    model = GPT.from_pretrained(str(run))
    assert all(x.equal(weights[name]) for name, x in model.named_parameters())


@pytest.mark.parametrize("damage", ["changed", "cut off", "gone", "of another run", "foreign"])
def test_a_damaged_shard_falls_back_to_the_checkpoint_before(
    ranks: Ranks, tmp_path: Path, damage: str
) -> None:
    run = shutil.copytree(ranks.run("adamw --shard"), tmp_path / "run")
    assert runs.read_state(runs.latest(run))["format"] == 2
    shard = min((runs.latest(run) / runs.SHARDS).iterdir())
    other = runs.latest(ranks.run("adamw --shard dropout")) / runs.SHARDS / shard.name
    content, reason = shard.read_bytes(), "damaged: its sha256 is not the saved one"
    if damage == "gone":
        shard.unlink()
        reason = "cannot be read: No such file or directory"
    elif damage == "foreign":
        shard = shard.with_name("left_over.safetensors")
        shard.write_bytes(content)
        reason = "not a file of this checkpoint"
    else:
        changed = {"changed": content[:-1] + b"?", "cut off": content[:-9]}
        shard.write_bytes(changed.get(damage, other.read_bytes()))
    said: list[str] = []
    assert newest_intact(run, said.append).name == "step_00000002"
    assert len(said) == 1 and f"{shard}: {reason}" in said[0]
    assert said[0].endswith("going on from step_00000002 instead")


@pytest.mark.parametrize(
    ("name", "saved", "reason"),
    [
        ("full disk", [2], "No space left on device"),
        ("read-only", [], "Read-only file system"),
        ("full disk of rank 0", [], "No space left on device"),
    ],
)
def test_the_disk_of_one_rank_fails(ranks: Ranks, name: str, saved: list[int], reason: str) -> None:
    """The failed rank says so, once; a checkpoint exists for all ranks or for none."""
    outcome, run = ranks.outcomes[name], ranks.folder / name / "run"
    assert outcome["codes"] == [2, 2]
    errors = [line for line in ranks.complaints(name) if "error" in line]
    assert len(errors) == 1 and reason in errors[0] and "cannot be written" in errors[0]
    rank = 0 if name.endswith("rank 0") else 1
    assert errors[0] in outcome["err"][rank]
    # earlier checkpoints remain and are resumed
    if name != "full disk":
        assert runs.saved_steps(run) == saved
        assert not list((run / "checkpoints").glob(".*"))
        return
    assert ranks.outcomes["full disk, resumed"]["codes"] == [0, 0]
    assert "training: 4 steps (2 done)" in ranks.outcomes["full disk, resumed"]["out"][0]
    assert_same_training(run, ranks.run("adamw --shard"))


def test_validation_data_that_one_rank_cannot_read_lose_nothing(ranks: Ranks) -> None:
    """The finished step is saved, though it was not scored; resuming scores it."""
    assert ranks.outcomes["unreadable"]["codes"] == [2, 2]
    errors = [line for line in ranks.complaints("unreadable") if "rror" in line]
    assert errors == ["fastgpt2 train: error: val.tokens: Stale file handle"]
    assert "training: 4 steps (2 done)" in ranks.outcomes["unreadable, resumed"]["out"][0]
    assert ranks.outcomes["unreadable, resumed"]["codes"] == [0, 0]
    assert_same_training(ranks.folder / "unreadable" / "run", ranks.run("adamw --shard"))


def test_each_rank_has_its_own_dropout(ranks: Ranks) -> None:
    tensors = saved_tensors(ranks.run("adamw --no-shard dropout"))
    assert not tensors["rng.cpu"].equal(tensors["rng.cpu.1"])


def test_other_processes_and_micro_batches_go_on_with_the_same_tokens(ranks: Ranks) -> None:
    """Two, one, three and four, sharded and not; of a mixture of packed documents."""
    resumed = ("changed, one", "changed, three", "changed, four")
    for name in (*resumed, "steady, more", "steady, last"):
        assert set(ranks.outcomes[name]["codes"]) == {0}, ranks.outcomes[name]
    run, expected = ranks.run("changed"), ranks.run("steady")
    states = [runs.read_state(runs.latest(path)) for path in (run, expected)]
    assert [state["loader"]["position"] for state in states] == [8 + 8 + 9 + 8] * 2
    assert_weights_close(run, expected)
    losses = [[r["train_loss"] for r in measured(x) if "train_loss" in r] for x in (run, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


def test_torchrun_starts_a_killed_job_again(ranks: Ranks) -> None:
    assert_same_training(ranks.run("elastic"), ranks.run("adamw --shard"))
    assert "training: 4 steps (2 done)" in ranks.outcomes["elastic"]["out"][0]


def test_a_spike_takes_shards_back(ranks: Ranks) -> None:
    ranks.run("spike")
    assert "gone back to step 30" in ranks.outcomes["spike"]["out"][0]
    state = runs.read_state(runs.latest(ranks.run("spike")))
    # steps 31 to 34 were computed twice, with other data
    assert (state["step"], state["loader"]["position"]) == (36, (36 + 4) * 4)


def test_a_sharded_run_that_diverges_names_the_module_and_keeps_the_step(
    ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks.outcomes["diverged"]["codes"] == [2, 2]
    errors = [line for line in ranks.complaints("diverged") if "error" in line]
    kept = ranks.folder / "diverged" / "run" / BAD_STEP
    found = "not finite first: the output of transformer.h.0.mlp; --replay"
    assert len(errors) == 1 and f"{found} {kept}" in errors[0]
    # without the fault of that rank, its step is finite
    assert train_command(["--replay", str(kept), "--device=cpu"]) == 0
    assert "everything is finite" in capsys.readouterr().out


def test_a_rank_that_hangs_is_named_with_its_stack(ranks: Ranks) -> None:
    assert ranks.outcomes["hangs"]["codes"] == [75, 75]
    said = "\n".join(ranks.complaints("hangs"))
    assert "rank 1 has not moved on for 5 s" in said and "rank 0 has not" not in said
    assert "in hang" in said


def test_a_reader_that_hangs_is_shown_with_its_stack(ranks: Ranks) -> None:
    assert ranks.outcomes["reader hangs"]["codes"] == [75, 75]
    said = "\n".join(ranks.complaints("reader hangs"))
    assert "rank 1 has not moved on for 5 s" in said and "rank 0 has not" not in said
    assert "its reader is here" in said.partition("rank 1 has not")[2] and "in hang" in said


def test_a_saver_that_hangs_is_shown_with_its_stack(ranks: Ranks) -> None:
    """The other rank has written its part, and waits: both have come equally far."""
    assert ranks.outcomes["saver hangs"]["codes"] == [75, 75]
    said = "\n".join(ranks.complaints("saver hangs"))
    stack = said.partition("rank 1 has not moved on for 10 s")[2]
    assert "its saver is here" in stack and "in hang" in stack


def test_the_estimate_of_the_memory_of_two_ranks(ranks: Ranks) -> None:
    """Replicated and sharded, with AdamW and with Muon."""
    assert ranks.outcomes["memory"]["codes"] == [0, 0], ranks.outcomes["memory"]
    for said in ranks.outcomes["memory"]["out"]:
        for case in json.loads(said):
            assert case["estimate"] == pytest.approx(case["measured"], rel=0.15), case


def test_one_rank_speaks(ranks: Ranks) -> None:
    ranks.run(PAIR)
    first, second = ranks.outcomes[PAIR]["out"]
    assert "training: 4 steps" in first and "validation loss" in first
    assert second == ""
    assert ranks.outcomes[PAIR]["err"][1] == ""


def test_minutes_end_a_sharded_run_as_a_signal_does(ranks: Ranks) -> None:
    """The last step is scored and saved, and a resumed run has the rest of its minutes."""
    run = ranks.run("minutes")
    assert set(ranks.outcomes["minutes, more"]["codes"]) == {0}, ranks.outcomes["minutes, more"]
    said = [ranks.outcomes[name]["out"][0] for name in ("minutes", "minutes, more")]
    first = int(said[0].partition("trained ")[2].split()[0])
    assert f"({first} done)" in said[1]
    last = runs.read_state(runs.latest(run))
    assert last["step"] > first and first in runs.saved_steps(run)
    assert last["validation"] and last["elapsed"] >= 0.02 * 60


def test_a_second_signal_in_a_save_ends_all_at_once(ranks: Ranks) -> None:
    """The checkpoint before it is whole, and half a checkpoint has no checkpoint's name."""
    assert ranks.outcomes["second signal"]["codes"] == [2, 130]
    errors = [line for line in ranks.complaints("second signal") if "error" in line]
    assert len(errors) == 1 and "has ended without a word" in errors[0]
    resumed = ranks.outcomes["second signal, resumed"]
    assert resumed["codes"] == [0, 0] and "training: 4 steps (2 done)" in resumed["out"][0]
    assert_same_training(ranks.folder / "second signal" / "run", ranks.run("adamw --shard"))


def test_sigusr1_to_one_rank_saves_once(ranks: Ranks) -> None:
    assert runs.saved_steps(ranks.run("usr1")) == [1, 2, 4]
    assert ranks.outcomes["usr1"]["out"][0].count("step 1 is saved") == 1


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("mistake", 2, "a mistake on this rank"),
        ("taken", 2, "not empty; give --resume or --overwrite"),
        ("unknown flag", 2, "unrecognized arguments: --no-such-flag"),
        ("other data", 2, "data: process 1 (on "),
        ("own disks", 2, "--out run: process 1 (on "),
    ],
)
def test_a_mistake_is_said_once(ranks: Ranks, name: str, code: int, message: str) -> None:
    assert ranks.outcomes[name]["codes"] == [code, code]
    errors = [line for line in ranks.complaints(name) if "rror" in line]
    assert len(errors) == 1 and message in errors[0], ranks.outcomes[name]


def test_a_fault_has_one_traceback(ranks: Ranks) -> None:
    assert ranks.outcomes["fault"]["codes"] == [1, 1]
    said = "\n".join(ranks.complaints("fault"))
    assert said.count("Traceback") == 1 and "ZeroDivisionError: a fault of ours" in said


def test_a_rank_that_is_killed_ends_the_others(ranks: Ranks) -> None:
    assert ranks.outcomes["killed"]["codes"] == [2, -9]
    errors = [line for line in ranks.complaints("killed") if "rror" in line]
    assert len(errors) == 1 and "has ended without a word" in errors[0]


def test_a_machine_that_dies_with_the_store_is_said(ranks: Ranks) -> None:
    assert ranks.outcomes["machine"]["codes"] == [2, -9]
    # PyTorch says more, in C++
    errors = [line for line in ranks.complaints("machine") if "fastgpt2 train: error" in line]
    assert len(errors) == 1 and "has ended without a word" in errors[0]


def assert_two_devices_equal_one(ranks: Ranks) -> None:
    for optimizer, kind in KINDS:
        run, alone = (ranks.run(f"{optimizer} {form}") for form in (kind, "alone"))
        assert_equal_to_rounding(run, alone)
    assert ranks.outcomes["killed"]["codes"][1] == -9
    assert ranks.outcomes["hangs"]["codes"] == [75, 75]


def test_the_gpu_form_is_sound_on_cpus(ranks: Ranks) -> None:
    """What the next test asserts of GPUs and NCCL, of the same scenarios on CPUs and gloo."""
    assert set(ON_GPUS) <= set(ranks.outcomes)
    assert_two_devices_equal_one(ranks)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_equal_one(data: Path, tmp_path: Path) -> None:
    assert_two_devices_equal_one(run_scenarios(data, tmp_path, *ON_GPUS, device="cuda"))
