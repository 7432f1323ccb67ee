import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.walkthrough.build import FULL_SIZE, HERE, NOTEBOOKS, build, main, page_name, sources
from docs.walkthrough.cells import execute, read_cells
from fastgpt2 import ladder

# smaller numbers for the cells named parameters
QUICK: dict[str, object] = {
    "VOCAB_SIZE": 300,
    "REPEATS": 1,
    "CONTEXTS": [32, 64],
    "NETWORKS": 2,
    "EPOCHS": 1,
    "CHARACTERS": 4000,
    "STEPS": 3,
    "TEXT": "python-docs",
    "TOKENIZER": "bytes",
    "SIZE": {"context_length": 64, "emb_dim": 24, "n_heads": 2, "n_layers": 1},
}
PAGES = [page_name(source) for source in sources()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walkthrough")
    build(folder, folder / "notebooks", QUICK, PAGES)
    return folder


def notebook(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def test_a_page_and_a_notebook_for_each_script(built: Path) -> None:
    assert len(PAGES) == 13
    assert sorted(p.stem for p in built.glob("*.md")) == sorted([*PAGES, "README"])
    assert sorted(p.stem for p in (built / "notebooks").glob("*.ipynb")) == PAGES
    records = (built / f"{FULL_SIZE}.jsonl").read_text(encoding="utf-8").splitlines()
    assert set(json.loads(records[0])) == {"step", "tokens", "train_loss", "val_loss"}


def test_the_long_page_is_made_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("docs.walkthrough.build.execute", lambda cells, parameters: {})
    build(tmp_path / "a", tmp_path / "a")
    assert {p.stem for p in (tmp_path / "a").glob("*.md")} == {*PAGES, "README"} - {FULL_SIZE}
    build(tmp_path / "b", tmp_path / "b", chosen=[FULL_SIZE])
    assert {p.stem for p in (tmp_path / "b").glob("*.md")} == {FULL_SIZE, "README"}
    assert main(["14-more"]) == 2
    assert "no page '14-more'; there are 01-words, " in capsys.readouterr().err


def test_links_lead_somewhere(built: Path) -> None:
    for page in (*built.glob("*.md"), *HERE.glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            # links out of the folder are those of the committed page
            base = HERE if target.startswith("..") or target == "sources" else page.parent
            assert (base / target).exists(), f"{page.name}: {target}"


def test_pictures_are_pictures(built: Path) -> None:
    pictures = {p.name: p.read_bytes() for p in (built / "images").iterdir()}
    assert {p.name for p in (HERE / "images").iterdir()} == set(pictures)
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())
    assert sum(p.stat().st_size for p in (HERE / "images").iterdir()) < 2_000_000


@pytest.mark.parametrize("source", sources(), ids=page_name)
def test_the_committed_notebook_is_the_script(source: Path) -> None:
    cells = read_cells(source)
    committed = notebook(NOTEBOOKS / f"{page_name(source)}.ipynb")["cells"]
    # `built` has run these cells: what it proves of the scripts holds for the notebooks
    assert [
        (
            cell["cell_type"],
            "".join(cell["source"]),
            "parameters" in cell["metadata"].get("tags", ()),
        )
        for cell in committed
    ] == [(cell.kind, cell.source, cell.is_parameters) for cell in cells]
    page = (HERE / f"{page_name(source)}.md").read_text(encoding="utf-8")
    assert all(cell.source in page for cell in cells)


def test_every_name_of_the_ladder_is_on_a_page() -> None:
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources())
    helpers = {"calc_loss_batch", "calc_loss_loader", "evaluate_model"}
    helpers |= {"text_to_token_ids", "token_ids_to_text", "FeedForward"}
    # the book's own names for what the pages build under ours
    helpers |= {"SelfAttention_v1", "SelfAttention_v2", "PyTorchMultiHeadAttention", "assign"}
    helpers |= {"create_dataloader_v1", "generate_and_print_sample", "plot_losses"}
    helpers |= {"download_and_load_gpt2", "load_gpt2_params_from_tf_ckpt"}
    missing = [n for n in ladder.__all__ if n not in helpers and not re.search(rf"\b{n}\b", text)]
    assert not missing


def test_a_notebook_runs_in_jupyter(built: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    executed = nbformat.read(built / "notebooks" / "01-words.ipynb", as_version=4)
    nbformat.validate(executed)
    expected = [[output.text for output in cell.get("outputs", ())] for cell in executed.cells]
    nbclient.NotebookClient(executed, timeout=60, kernel_name="python3").execute()
    got = [[output.text for output in cell.get("outputs", ())] for cell in executed.cells]
    assert got == expected


def test_notebooks_are_valid(built: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    for path in (*(built / "notebooks").iterdir(), *NOTEBOOKS.glob("*.ipynb")):
        nbformat.validate(nbformat.read(path, as_version=4))


def test_cells(tmp_path: Path) -> None:
    script = tmp_path / "x.py"
    script.write_text(
        "# %% [markdown]\n# # Title\n#\n# text\n\n# %% parameters\nN = 5\n\n"
        "# %%\nprint(N)\nN + 1\n",
        encoding="utf-8",
    )
    cells = read_cells(script)
    assert [cell.source for cell in cells] == ["# Title\n\ntext", "N = 5", "print(N)\nN + 1"]
    execute(cells, {"N": 2, "UNKNOWN": 3})
    assert (cells[2].printed, cells[2].value) == ("2\n", "3")
