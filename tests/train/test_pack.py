"""Training with ``--pack`` and on mixtures: resumed bit for bit, and refused where it cannot be."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from fastgpt2.errors import UserError
from fastgpt2.train.validation import validate
from tests.train.test_resume import on_call, send
from tests.train.tiny_run import TEXT, assert_same_training, make_trainer, tiny_train_config, train

pytestmark = pytest.mark.usefixtures("no_picture")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Short documents."""
    (tmp_path / "texts").mkdir()
    lines = TEXT.splitlines(keepends=True)
    for number in range(0, 60, 2):
        text = "".join(lines[number : number + 2])
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return tmp_path / "texts"


@pytest.mark.parametrize("kind", ["pack", "mixture"])
def test_resuming_is_exact(kind: str, folder: Path, data: Path, tmp_path: Path) -> None:
    config = tiny_train_config(folder, pack=True)
    if kind == "mixture":
        config = replace(config, data=(f"{folder}:0.3", f"{data}:0.7"))
    whole = tmp_path / "whole"
    assert train(config, whole).exit_code == 0
    first = make_trainer(config, tmp_path / "run")
    step = first.training_step
    step.forward = on_call(7, lambda: send(signal.SIGTERM), step.forward)
    assert first.run().exit_code == 143
    assert train(config, tmp_path / "run", resume=True).exit_code == 0
    assert_same_training(tmp_path / "run", whole)


def test_the_shares_are_said(folder: Path, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = replace(tiny_train_config(folder), data=(f"{folder}:1", f"{data}:3"))
    trainer = make_trainer(config, tmp_path / "run")
    trainer.console.notify = said.append
    trainer.run()
    # 7 steps of 8 blocks
    blocks = trainer.loader.blocks_of(56)  # type: ignore[attr-defined]
    assert sum(blocks) == 56 and abs(blocks[0] - 14) <= 2
    lines = [line for line in said if line.startswith("mixture: ")]
    assert len(lines) == 2
    assert lines[0].startswith(f"mixture: {folder}: 25.0% of the blocks, ")
    assert lines[1].startswith(f"mixture: {data}: 75.0% of the blocks, ")


def test_documents_are_validated_alone(folder: Path, tmp_path: Path) -> None:
    results = []
    for pack in (False, True):
        trainer = make_trainer(tiny_train_config(folder, pack=pack), tmp_path / str(pack))
        results.append(
            validate(
                trainer.model,
                trainer.dataset,
                batch_size=4,
                dtype=trainer.dtype,
                poll=lambda: None,
                eot=trainer.eot,
            )
        )
    plain, alone = results
    assert plain is not None and alone is not None
    val = trainer.dataset.val
    assert val is not None
    ends = int((val[:-1] == 256).sum())
    assert ends > 0 and alone.targets == plain.targets - ends
    assert alone.loss != plain.loss
    # bytes of the tokens that are scored, and of the very first one
    ids = val[:].tolist()
    first = sum(before == 256 for before in ids[:-1])
    assert plain.text_bytes == trainer.dataset.val_bytes
    assert alone.text_bytes == plain.text_bytes - first


def test_no_end_of_text_no_documents(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pack: the tokenizer char has no end-of-text id"):
        make_trainer(tiny_train_config(data, tokenizer="char", pack=True), tmp_path)
