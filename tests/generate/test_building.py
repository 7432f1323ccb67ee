"""The library of the step in C++: once for each source, compiler and processor."""

import shutil
from pathlib import Path

import pytest
import torch

from fastgpt2.compiler import host_compiler
from fastgpt2.generate import Generator
from fastgpt2.generate import library as library_module
from fastgpt2.generate.library import pays
from fastgpt2.generate.slots import Slots
from fastgpt2.kernels.cpu import build
from tests.generate.compiled_step import compiled_slots, needs_compiler
from tests.tiny_gpt import tiny_gpt

pytestmark = pytest.mark.usefixtures("libraries")


@needs_compiler
def test_it_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_slots(tiny_gpt(), 1, 8)
    library_module._loaded.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    compiled_slots(tiny_gpt(), 1, 8)
    assert len(list(folder.iterdir())) == 1


@needs_compiler
def test_another_source_or_processor_is_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = host_compiler()
    here = build.library_path("decode_step", compiler, tmp_path)
    assert build.library_path("decode_step", compiler, tmp_path) == here
    run = build._run
    monkeypatch.setattr(build, "_run", lambda c: run(c).replace(b"__VERSION__", b"__OTHER__"))
    assert build.library_path("decode_step", compiler, tmp_path) != here
    monkeypatch.setattr(build, "_run", run)
    # and of what is included
    code = [*build.source("decode_step").parent.glob("*.[ch]*")]
    assert len(code) > 1
    copies = [Path(shutil.copy(path, tmp_path)) for path in code]
    monkeypatch.setattr(build, "source", lambda name: tmp_path / f"{name}.cpp")
    for path in copies:
        assert build.library_path("decode_step", compiler, tmp_path) == here
        before = path.read_text("utf-8")
        path.write_text(before + "\n// changed\n", "utf-8")
        assert build.library_path("decode_step", compiler, tmp_path) != here
        path.write_text(before, "utf-8")


@needs_compiler
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(library_module, "_folder", lambda: tmp_path / "file" / "compiled")
    compiled_slots(tiny_gpt(), 1, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false", "broken"])
def test_without_a_compiler_it_goes_on(
    compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    script = "#!/bin/sh\necho 'x.cpp: In function f:' >&2\necho 'x.cpp:1: error: no' >&2\nexit 1\n"
    broken.write_text(script, "utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken) if compiler == "broken" else compiler)
    lines: list[str] = []
    model = tiny_gpt().eval()
    engine = Generator(model, batch_size=1, compile=True, notify=lines.append)
    assert len(lines[-1].splitlines()) == 1 and "generating without it" in lines[-1]
    assert ("error: no" in lines[-1]) == (compiler == "broken")
    text = engine.submit([1, 2], 5, temperature=0.0).wait().ids
    assert text == model.generate([[1, 2]], 5, temperature=0.0)[0][2:]
    assert not pays(model, 10**12)


def test_what_it_does_not_know_goes_on_without_it() -> None:
    lines: list[str] = []
    slots = Slots(tiny_gpt().eval().half(), 1, 8, compile=True, notify=lines.append)
    assert slots.compiled is None and len(lines) == 1 and "fp32, bf16 or int8" in lines[0]


@needs_compiler
def test_it_pays_for_long_texts_or_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gpt()
    compiled_slots(model, 1, 8)
    assert pays(model, 1)
    monkeypatch.setattr(library_module, "_folder", lambda: tmp_path)
    assert not pays(model, 1000) and pays(model, 10**12)


@needs_compiler
def test_floating_point_stays_what_it_was() -> None:
    # loading what was compiled with -ffast-math makes a thread flush denormals to zero
    compiled_slots(tiny_gpt(), 1, 8)
    assert (torch.tensor([1e-38]) / 1000).item() > 0
