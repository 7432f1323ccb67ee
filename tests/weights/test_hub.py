"""Downloading the releases, against a server on this machine that behaves badly."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt2.config import GPTConfig
from fastgpt2.download import DownloadError, cache_dir
from fastgpt2.errors import UserError
from fastgpt2.model import GPT
from fastgpt2.weights import hub, load, load_pretrained, save
from tests.loopback import Behaviour, Site, content, head, serve, status
from tests.weights.conftest import random_checkpoint, same_bits

CONFIG = GPTConfig(block_size=32, vocab_size=65, n_layer=1, n_head=2, n_embd=32)
HUB, OPENAI = "/openai-community/gpt2/resolve/main", "/models/124M"
WEIGHTS = f"{HUB}/model.safetensors"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same small model as OpenAI and as Hugging Face publish one."""
    base = tmp_path_factory.mktemp("release")
    checkpoint = random_checkpoint(CONFIG)
    for format in ("openai", "hf"):
        save(checkpoint, base / format, format)
    for names in (("openai/encoder.json", "openai/vocab.bpe"), ("hf/vocab.json", "hf/merges.txt")):
        for name in names:
            (base / name).write_text("{}", "utf-8")
    path = base / "hf" / "config.json"
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.1)
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | rates), "utf-8")
    return base


def announce(data: bytes, *, hash: str | None = None) -> Behaviour:
    """The hub's answer to HEAD: the commit, and a tag that is the sha256 of a large file."""
    tag = hash or hashlib.sha256(data).hexdigest()
    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": "0" * 40}
    return lambda handler: head(handler, 200, len(data), **headers)


@pytest.fixture
def site(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with serve() as site:
        for format, place in (("hf", HUB), ("openai", OPENAI)):
            for path in (release / format).iterdir():
                site.add(f"{place}/{path.name}", content(path.read_bytes()))
                # a small file's tag is git's sha1
                hash = None if path.suffix == ".safetensors" else "a" * 40
                site.add(f"HEAD {place}/{path.name}", announce(path.read_bytes(), hash=hash))
        monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "HUB_MIRRORS", (site.url,))
        monkeypatch.setattr(hub, "OPENAI_MIRRORS", (f"{site.url}/models",))
        yield site


def weights(release: Path) -> bytes:
    return (release / "hf" / "model.safetensors").read_bytes()


def test_hugging_face_first(site: Site, release: Path) -> None:
    config, state = load_pretrained("gpt2")
    # the releases have no dropout, whichever source they came from
    assert load(hub.fetch("gpt2")).config.dropout == 0.1
    assert config == CONFIG
    assert same_bits(load(hub.fetch("gpt2")), load(release / "hf"))
    assert list(state) == list(load(release / "openai").tensors)
    # what is in the cache needs no server
    site.pages.clear()
    assert load_pretrained("openai-community/gpt2", offline=True)[0] == CONFIG
    assert GPT.from_pretrained("gpt2").config == CONFIG


def test_slow_server(site: Site, release: Path) -> None:
    config = (release / "hf" / "config.json").read_bytes()
    site.add(f"{HUB}/config.json", site.trickle(config, 0.001))
    assert hub.fetch("gpt2").parent.name == "huggingface"


def test_dropped_connection_is_resumed(site: Site, release: Path) -> None:
    data = weights(release)
    site.add(WEIGHTS, content(data, cut=1000), content(data))
    assert (hub.fetch("gpt2") / "model.safetensors").read_bytes() == data
    assert [given for path, given in site.asked if path == WEIGHTS] == [None, "bytes=1000-"]


def test_download_that_was_interrupted_yesterday(site: Site, release: Path) -> None:
    part = cache_dir() / "models/huggingface/gpt2/model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights(release)[:500])
    assert (hub.fetch("gpt2") / "model.safetensors").read_bytes() == weights(release)
    assert (WEIGHTS, "bytes=500-") in site.asked


@pytest.mark.parametrize("mood", ["404", "wrong hash", "truncated", "cut"])
def test_openai_when_hugging_face_fails(site: Site, release: Path, mood: str) -> None:
    data = weights(release)
    if mood == "404":
        site.add(f"HEAD {WEIGHTS}", status(404))
    elif mood == "wrong hash":
        site.add(f"HEAD {WEIGHTS}", announce(data, hash="f" * 64))
    elif mood == "truncated":
        # a server that does not know that its file is half
        site.add(WEIGHTS, content(data[: len(data) // 2]))
    else:
        site.add(WEIGHTS, content(data, cut=100, resumes=False))
    folder = hub.fetch("gpt2", timeout=5.0)
    assert folder.parent.name == "openai"
    assert same_bits(load(folder), load(release / "openai"))
    assert not (cache_dir() / "models/huggingface/gpt2/model.safetensors").exists()
    assert load_pretrained("gpt2", offline=True)[0] == CONFIG


def test_second_mirror(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HUB_MIRRORS", ("http://127.0.0.1:9", site.url))
    assert hub.fetch("gpt2", timeout=5.0).parent.name == "huggingface"


def test_second_mirror_of_openai(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HUB_MIRRORS", ())
    monkeypatch.setattr(hub, "OPENAI_MIRRORS", (f"{site.url}/gone", f"{site.url}/models"))
    assert hub.fetch("gpt2", timeout=5.0).parent.name == "openai"


def test_without_huggingface_hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert hub.fetch("gpt2").parent.name == "openai"
    with pytest.raises(
        DownloadError, match="gpt2-medium: huggingface_hub is not installed; cannot"
    ):
        hub.fetch("gpt2-medium", timeout=2.0)


def test_nothing_answers(site: Site) -> None:
    site.pages.clear()
    with pytest.raises(DownloadError) as error:
        hub.fetch("gpt2", timeout=2.0)
    message = str(error.value)
    # every address that was tried, and what it said
    assert f"{site.url}{HUB}/config.json: HfHubHTTPError: Client error '404" in message
    assert f"{site.url}{OPENAI}/checkpoint: HTTP 404" in message
    assert "\n" not in message


def test_damaged_values_are_noticed_whoever_sent_them(
    site: Site, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # OpenAI publishes no hash: the checkpoint's own CRC serves
    monkeypatch.setattr(hub, "HUB_MIRRORS", ())
    name = "model.ckpt.data-00000-of-00001"
    data = (release / "openai" / name).read_bytes()
    site.add(f"{OPENAI}/{name}", content(data[:-1] + b"\x01"))
    with pytest.raises(UserError, match="'model/wte' have a wrong CRC-32C"):
        GPT.from_pretrained("gpt2")


def test_names_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="gpt2-large is not in the cache"):
        load_pretrained("gpt2-large", offline=True)
    with pytest.raises(
        UserError, match="gpt3: no such file or folder, and not one of gpt2, gpt2-m"
    ):
        load_pretrained("gpt3")
    # a folder of the name of a release is the user's
    monkeypatch.chdir(tmp_path)
    save(random_checkpoint(CONFIG), "gpt2", "hf")
    assert load_pretrained("gpt2")[0] == CONFIG
