import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt2 import runs
from fastgpt2.errors import UserError
from fastgpt2.files import sha256_of
from fastgpt2.model import GPT
from fastgpt2.train import checkpoint
from fastgpt2.train.intact import newest_intact
from tests.tiny_gpt import gradients, tiny_batch, tiny_gpt

# padded to 4224 rows in memory
V = 4100


def trained(steps: int = 2, seed: int = 0) -> tuple[GPT, torch.optim.AdamW]:
    model = tiny_gpt(seed, vocab_size=V, dropout=0.1)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    for step in range(steps):
        train_once(model, optimizer, step)
    return model, optimizer


def train_once(model: GPT, optimizer: torch.optim.AdamW, seed: int) -> torch.Tensor:
    loss = gradients(model, *tiny_batch(seed=seed))["loss"]
    optimizer.step()
    return loss


def save_empty(run: Path, step: int, loss: float | None = None) -> None:
    """A checkpoint as far as the bookkeeping is concerned."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    state = {"validation": None if loss is None else {"loss": loss}}
    (folder / runs.STATE).write_text(json.dumps(state), encoding="utf-8")


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, 2, model, optimizer, {})
    expected = [train_once(model, optimizer, seed) for seed in (7, 8)]
    torch.manual_seed(999)
    loaded = checkpoint.load_model(folder)
    loaded_optimizer = loaded.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    checkpoint.load_training_state(folder, loaded, loaded_optimizer)
    assert [train_once(loaded, loaded_optimizer, seed) for seed in (7, 8)] == expected
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_what_the_files_hold(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, 250, model, optimizer, {"elapsed": 1.5})
    assert folder == tmp_path / "checkpoints" / "step_00000250"
    assert sorted(path.name for path in folder.iterdir()) == [
        "gpt_config.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    weights = load_file(folder / "model.safetensors")
    assert weights["transformer.wte.weight"].shape == (V, 48)
    assert "lm_head.weight" not in weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    moments = load_file(folder / "optimizer.safetensors")
    assert moments["exp_avg.transformer.wte.weight"].shape == (V, 48)
    state = runs.read_state(folder)
    assert (state["format"], state["step"], state["elapsed"]) == (runs.FORMAT, 250, 1.5)
    assert set(state["sha256"]) == {runs.MODEL, runs.OPTIMIZER, runs.MODEL_CONFIG}
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_a_second_save_of_a_step_rewrites_its_state_alone(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, 2, model, optimizer, {"elapsed": 1.0})
    before = (folder / runs.MODEL).stat()
    checkpoint.save(tmp_path, 2, model, optimizer, {"elapsed": 2.0})
    assert runs.read_state(folder)["elapsed"] == 2.0
    assert (folder / runs.MODEL).stat() == before


def test_a_loaded_model_does_not_hold_on_to_its_file(tmp_path: Path) -> None:
    model, optimizer = trained()
    folder = checkpoint.save(tmp_path, 2, model, optimizer, {})
    loaded = checkpoint.load_model(folder, impl="reference", dropout=0.0)
    assert (loaded.config.impl, loaded.config.dropout) == ("reference", 0.0)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    again = checkpoint.load_model(folder)
    assert all(a.equal(b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_latest_and_best(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: no checkpoint in it"):
        runs.latest(tmp_path)
    for step, loss in ((10, 3.0), (5, 2.0), (100_000_000, 2.5), (7, None)):
        save_empty(tmp_path, step, loss)
    for name in ("step_x", "step_12", ".step_00000900"):
        (tmp_path / "checkpoints" / name).mkdir()
    # and one that a crash has left without its state
    (tmp_path / "checkpoints" / "step_00000999").mkdir()
    assert runs.saved_steps(tmp_path) == [5, 7, 10, 100_000_000]
    assert runs.latest(tmp_path).name == "step_100000000"
    assert runs.best(tmp_path).name == "step_00000005"


def test_a_loss_that_is_not_finite_is_not_the_best(tmp_path: Path) -> None:
    for step, loss in enumerate((math.nan, -math.inf, 3.0, 2.0, math.nan), start=1):
        save_empty(tmp_path, step, loss)
    assert runs.best(tmp_path).name == "step_00000004"


def test_best_is_the_newest_where_nothing_was_measured(tmp_path: Path) -> None:
    for step in (1, 2):
        save_empty(tmp_path, step)
    assert runs.best(tmp_path).name == "step_00000002"


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [2, 6]), (3, [2, 4, 5, 6])])
def test_pruning_keeps_the_best_and_the_newest(
    tmp_path: Path, keep_last: int, kept: list[int]
) -> None:
    for step, loss in enumerate((4.0, 1.0, 3.0, 2.0, 2.0, 2.5), start=1):
        save_empty(tmp_path, step, loss)
    (tmp_path / "checkpoints" / ".step_00000003").mkdir()
    checkpoint.prune(tmp_path, keep_last)
    assert runs.saved_steps(tmp_path) == kept
    # what crashes have left is gone too
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(kept)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def scribble(path: Path) -> None:
    path.write_bytes(b"\xff{]")


def empty_object(path: Path) -> None:
    path.write_text("{}", encoding="utf-8")


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(name for name in tensors if name.endswith("transformer.ln_f.weight"))]
    save_file(tensors, path)


def misshape_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("transformer.ln_f.weight"))
    save_file(tensors | {name: torch.zeros(3)}, path)


def misshape_a_matrix(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    save_file(tensors | {name: torch.zeros(3)}, path)


DAMAGES = [truncate, scribble, Path.unlink, drop_a_tensor, misshape_a_tensor, misshape_a_matrix]


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    return checkpoint.save(run, 2, *trained(), {})


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    for path in intact.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / runs.MODEL)
    with pytest.raises(UserError, match=f"^{folder}: cannot be loaded: "):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink, empty_object])
def test_a_damaged_shape_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / runs.MODEL_CONFIG)
    with pytest.raises(UserError, match=f"^{folder}: cannot be loaded: ") as error:
        checkpoint.load_model(folder)
    # PyTorch lists every tensor that does not fit
    assert len(str(error.value)) < 300 + len(str(folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_moments_are_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / runs.OPTIMIZER)
    model = checkpoint.load_model(folder)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    with pytest.raises(UserError, match=f"^{folder / runs.OPTIMIZER}: cannot be loaded: "):
        checkpoint.load_training_state(folder, model, optimizer)


@pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink])
def test_a_damaged_state_is_named(folder: Path, damage: Callable[[Path], None]) -> None:
    damage(folder / runs.STATE)
    with pytest.raises(UserError, match=f"^{folder / runs.STATE}: "):
        runs.read_state(folder)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", [runs.MODEL, runs.OPTIMIZER, runs.MODEL_CONFIG])
@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
def test_a_damaged_newest_falls_back(
    intact: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    said: list[str] = []
    for step in (1, 2):
        shutil.copytree(intact, runs.step_folder(tmp_path, step))
    assert newest_intact(tmp_path, said.append).name == "step_00000002"
    assert said == []
    damage(runs.step_folder(tmp_path, 2) / file)
    assert newest_intact(tmp_path, said.append).name == "step_00000001"
    assert len(said) == 1
    assert file in said[0] and said[0].endswith("going on from step_00000001 instead")
    # it is kept, but not as a checkpoint
    assert runs.saved_steps(tmp_path) == [1]
    assert (tmp_path / "checkpoints" / "damaged_step_00000002").is_dir()
    damage(runs.step_folder(tmp_path, 1) / file)
    with pytest.raises(UserError, match=file):
        newest_intact(tmp_path, said.append)
    assert runs.saved_steps(tmp_path) == [1]


def test_a_checkpoint_without_its_state_is_said_and_set_aside(intact: Path, tmp_path: Path) -> None:
    """Whoever resumes is told that it is gone, and its step can be saved again."""
    said: list[str] = []
    for step in (1, 2):
        shutil.copytree(intact, runs.step_folder(tmp_path, step))
    # one of that name is there from an earlier time
    (tmp_path / "checkpoints" / "damaged_step_00000002").mkdir()
    (runs.step_folder(tmp_path, 2) / runs.STATE).unlink()
    assert newest_intact(tmp_path, said.append).name == "step_00000001"
    assert len(said) == 1 and said[0].endswith(
        "state.json: cannot be read: it is missing; going on from step_00000001 instead"
    )
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        *("damaged_step_00000002", "damaged_step_00000002_2", "step_00000001")
    ]
    checkpoint.save(tmp_path, 2, *trained(), {})
    assert newest_intact(tmp_path, said.append).name == "step_00000002"


@pytest.mark.parametrize("content", ["", "[]", '{"sha256": []}', '{"step": 1'])
def test_an_older_damaged_state_ends_no_training(
    intact: Path, tmp_path: Path, content: str
) -> None:
    for step in (1, 2, 3):
        shutil.copytree(intact, runs.step_folder(tmp_path, step))
    (runs.step_folder(tmp_path, 1) / runs.STATE).write_text(content, encoding="utf-8")
    checkpoint.prune(tmp_path, 1)
    assert runs.saved_steps(tmp_path) == [3]
    for step in (1, 2):
        shutil.copytree(intact, runs.step_folder(tmp_path, step))
    (runs.step_folder(tmp_path, 3) / runs.STATE).write_text(content, encoding="utf-8")
    assert newest_intact(tmp_path, lambda _: None).name == "step_00000002"
    assert runs.saved_steps(tmp_path) == [1, 2]
    # which one is the best, nobody can know: whoever asks for it is told
    (runs.step_folder(tmp_path, 1) / runs.STATE).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"step_00000001/state\.json: "):
        runs.best(tmp_path)


def test_older_formats_are_read_and_newer_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / runs.STATE
    for older in ("{}", '{"format": 0}', '{"format": 1}'):
        path.write_text(older, encoding="utf-8")
        runs.read_state(tmp_path)
    path.write_text('{"format": 99}', encoding="utf-8")
    with pytest.raises(UserError, match="saved in format 99 by a newer fastgpt2; this one reads"):
        runs.read_state(tmp_path)


def test_a_newer_format_is_not_damage(intact: Path, tmp_path: Path) -> None:
    """Going on from the checkpoint before it would lose steps that are there."""
    for step in (1, 2):
        shutil.copytree(intact, runs.step_folder(tmp_path, step))
    path = runs.step_folder(tmp_path, 2) / runs.STATE
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(state | {"format": runs.FORMAT + 1}), encoding="utf-8")
    with pytest.raises(UserError, match="by a newer fastgpt2; this one reads up to"):
        newest_intact(tmp_path, lambda _: None)
    assert runs.saved_steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("file", [runs.STATE, runs.OPTIMIZER])
def test_what_cannot_be_read_now_is_not_damage(
    intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """No right to read it, too many open files, a server that is away: it may be whole."""
    for step in (1, 2):
        shutil.copytree(intact, runs.step_folder(tmp_path, step))
    reason = errno.EACCES

    def refused(path: Path) -> str:
        if path == runs.step_folder(tmp_path, 2) / file:
            raise OSError(reason, os.strerror(reason), str(path))
        return sha256_of(path)

    monkeypatch.setattr("fastgpt2.train.intact.sha256_of", refused)
    for reason in (errno.EACCES, errno.EMFILE, errno.ESTALE):
        with pytest.raises(OSError, match=os.strerror(reason)):
            newest_intact(tmp_path, lambda _: None)
    assert runs.saved_steps(tmp_path) == [1, 2]
    # a broken part of the disk is
    reason = errno.EIO
    assert newest_intact(tmp_path, lambda _: None).name == "step_00000001"


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(0)
    checkpoint.save(tmp_path, 1, model, optimizer, {})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(UserError, match=r"step_00000002: cannot be written: .*No space left"):
        checkpoint.save(tmp_path, 2, model, optimizer, {})
    assert runs.saved_steps(tmp_path) == [1]
