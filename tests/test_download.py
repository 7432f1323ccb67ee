import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt2 import streams
from fastgpt2.download import DownloadError, cache_dir, download
from tests.loopback import Site, content, late, serve, status

DATA = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site() -> Iterator[Site]:
    with serve() as running:
        yield running


def get(
    urls: str | list[str],
    path: Path,
    *,
    sha256: str | None = SHA256,
    size: int | None = None,
    timeout: float = 5.0,
    retries: int = 0,
) -> Path:
    return download(
        urls, path, sha256=sha256, size=size, timeout=timeout, retries=retries, progress=False
    )


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_file_arrives_whole_and_is_fetched_once(site: Site, tmp_path: Path) -> None:
    url = site.add("/f", content(DATA))
    path = tmp_path / "new" / "folder" / "f.bin"
    assert get(url, path, size=len(DATA)) == path
    assert path.read_bytes() == DATA
    assert get(url, path, size=len(DATA)) == path
    assert len(site.asked) == 1
    assert leftovers(path.parent) == ["f.bin"]


def test_a_damaged_file_on_the_disk_is_replaced(site: Site, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA[:-1] + b"x")
    get(site.add("/f", content(DATA)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_wrong_content_is_removed_and_both_hashes_named(site: Site, tmp_path: Path) -> None:
    wrong = DATA + b"surprise"
    url = site.add("/f", content(wrong))
    with pytest.raises(DownloadError) as caught:
        get(url, tmp_path / "f", retries=3)
    message = str(caught.value)
    assert f"expected sha256 {SHA256}" in message
    assert f"got {hashlib.sha256(wrong).hexdigest()}" in message
    assert url in message and "\n" not in message
    assert leftovers(tmp_path) == []
    # asking again would bring the same
    assert len(site.asked) == 1


def test_wrong_size_is_named(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"expected 7 bytes, got {len(DATA)}"):
        get(site.add("/f", content(DATA)), tmp_path / "f", sha256=None, size=7)
    assert leftovers(tmp_path) == []


def test_missing_page_goes_to_the_next_mirror(site: Site, tmp_path: Path) -> None:
    urls = [site.add("/gone", status(404)), site.add("/f", content(DATA))]
    get(urls, tmp_path / "f", retries=3)
    assert [path for path, _ in site.asked] == ["/gone", "/f"]


def test_every_mirror_is_named_with_its_reason(site: Site, tmp_path: Path) -> None:
    urls = [site.add("/a", status(404)), site.add("/b", status(503))]
    with pytest.raises(DownloadError) as caught:
        get(urls, tmp_path / "f")
    assert f"{urls[0]}: HTTP 404 Not Found; {urls[1]}: HTTP 503" in str(caught.value)


def test_a_passing_fault_is_retried(site: Site, tmp_path: Path) -> None:
    get(site.add("/f", status(503), content(DATA)), tmp_path / "f", retries=1)
    assert len(site.asked) == 2


def test_dropped_connection_resumes_where_it_broke(site: Site, tmp_path: Path) -> None:
    url = site.add("/f", content(DATA, cut=1000), content(DATA))
    get(url, tmp_path / "f", retries=1)
    assert site.asked == [("/f", None), ("/f", "bytes=1000-")]
    assert (tmp_path / "f").read_bytes() == DATA


def test_truncated_body_is_an_error_and_a_later_call_resumes(site: Site, tmp_path: Path) -> None:
    url = site.add("/f", content(DATA, cut=1000), content(DATA))
    with pytest.raises(DownloadError, match=f"ended after 1000 of {len(DATA)} bytes"):
        get(url, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    get(url, tmp_path / "f")
    assert site.asked[-1] == ("/f", "bytes=1000-")
    assert (tmp_path / "f").read_bytes() == DATA


def test_without_a_hash_a_leftover_is_not_trusted(site: Site, tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(b"another day's")
    get(site.add("/f", content(DATA)), tmp_path / "f", sha256=None)
    assert (tmp_path / "f").read_bytes() == DATA


@pytest.mark.parametrize(
    ("etag", "resumed"), [('"one"', True), ('"two"', False), ("", False), ('W/"one"', False)]
)
def test_without_a_hash_the_server_vouches_for_the_rest(
    site: Site, tmp_path: Path, etag: str, resumed: bool
) -> None:
    before = etag if etag.startswith("W/") else '"one"'
    old = DATA if resumed else b"another" * 999
    url = site.add("/f", content(old, cut=1000, etag=before), content(DATA, etag=etag))
    with pytest.raises(DownloadError, match="the connection ended"):
        get(url, tmp_path / "f", sha256=None)
    get(url, tmp_path / "f", sha256=None)
    assert (tmp_path / "f").read_bytes() == DATA
    assert len(site.asked) == 2
    assert leftovers(tmp_path) == ["f"]


@pytest.mark.parametrize("resumes", [True, False])
@pytest.mark.parametrize("leftover", [DATA[:999], b"x" * 999, DATA, DATA + b"x" * 9])
def test_any_leftover_ends_well(site: Site, tmp_path: Path, leftover: bytes, resumes: bool) -> None:
    (tmp_path / "f.part").write_bytes(leftover)
    get(site.add("/f", content(DATA, resumes=resumes)), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert leftovers(tmp_path) == ["f"]
    # a beginning that fits costs no second request, whether the server resumes or not
    assert len(site.asked) == 1 or not DATA.startswith(leftover)


def test_server_that_never_answers_is_given_up(site: Site, tmp_path: Path) -> None:
    urls = [site.add("/dead", site.hang), site.add("/f", content(DATA))]
    start = time.monotonic()
    get(urls, tmp_path / "f", timeout=0.3)
    assert time.monotonic() - start < 3


def test_server_that_trickles_is_given_up(site: Site, tmp_path: Path) -> None:
    urls = [site.add("/slow", site.trickle(DATA, 0.02)), site.add("/f", content(DATA))]
    start = time.monotonic()
    get(urls, tmp_path / "f", timeout=0.3)
    assert time.monotonic() - start < 2.5
    # what had come is not fetched again
    assert site.asked[-1][1] is not None


def test_slow_start_is_not_a_failure(site: Site, tmp_path: Path) -> None:
    get(site.add("/f", late(0.2, content(DATA))), tmp_path / "f")


def test_name_resolution_cannot_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: site.closing.wait(30))
    start = time.monotonic()
    with pytest.raises(DownloadError, match=r"timed out after 0\.3 s"):
        get("http://nowhere.invalid/f", tmp_path / "f", timeout=0.3)
    assert time.monotonic() - start < 3


def test_unknown_host_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def unknown(*args: object, **kw: object) -> None:
        calls.append(args)
        raise socket.gaierror(socket.EAI_NONAME, "no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DownloadError, match="the host name cannot be resolved"):
        get("http://nowhere.invalid/f", tmp_path / "f", retries=5)
    assert len(calls) == 1


def test_nobody_listening(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match="refused"):
        get(f"http://127.0.0.1:{port}/f", tmp_path / "f")


def test_not_a_url(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="unknown url type"):
        get("no-url", tmp_path / "f")


def test_disk_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(DownloadError, match="cannot write"):
        get(site.add("/f", content(DATA)), tmp_path / "file" / "f")


@pytest.mark.skipif(os.name == "nt", reason="no file lock there")
def test_many_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    url = site.add("/f", late(0.1, content(DATA)))
    threads = [threading.Thread(target=get, args=(url, tmp_path / "f")) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(site.asked) == 1
    assert (tmp_path / "f").read_bytes() == DATA


# run in a process of its own, with the biggest file that it may write
FETCH = """
import sys, resource, signal
from fastgpt2.download import DownloadError, download
url, path, sha256, limit = sys.argv[1:]
if int(limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download(url, path, sha256=sha256, progress=False)
except DownloadError as error:
    sys.exit(str(error))
"""


def fetching(url: str, path: Path, limit: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, url, str(path), SHA256, str(limit)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="no limit of file sizes there")
def test_disk_that_fills_up_is_one_line_and_a_later_call_resumes(
    site: Site, tmp_path: Path
) -> None:
    url = site.add("/f", content(DATA))
    full = fetching(url, tmp_path / "f", limit=100_000)
    line = full.communicate(timeout=60)[1]
    assert full.returncode == 1 and line == f"cannot write {tmp_path / 'f'}: File too large\n"
    assert not (tmp_path / "f").exists()
    get(url, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA
    assert site.asked[1][1] == "bytes=100000-"


@pytest.mark.skipif(os.name == "nt", reason="no file lock there")
def test_two_processes_at_once_fetch_once(site: Site, tmp_path: Path) -> None:
    # the first waits for its answer until both have asked for the lock
    url = site.add("/f", late(1.0, content(DATA)))
    both = [fetching(url, tmp_path / "f") for _ in range(2)]
    assert [(p.communicate(timeout=60)[1], p.returncode) for p in both] == [("", 0)] * 2
    assert len(site.asked) == 1
    assert (tmp_path / "f").read_bytes() == DATA


def test_progress_bar_is_shown(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BAR_DELAY", 0.0)
    download(site.add("/f", content(DATA)), tmp_path / "name-of-file", sha256=SHA256)
    err = capsys.readouterr().err
    assert "name-of-file" in err and "100%" in err


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGPT2_CACHE", str(tmp_path / "ours"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "ours"
    monkeypatch.delenv("FASTGPT2_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "fastgpt2"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "fastgpt2"


@pytest.mark.skipif(os.name == "nt", reason="users without an entry")
def test_a_user_without_a_home_and_without_an_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container that is started with a number for a user."""
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "FASTGPT2_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cache_dir() == tmp_path / f"fastgpt2-{os.getuid()}"
