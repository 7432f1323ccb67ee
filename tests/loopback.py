"""A web server on this machine for the tests, which behaves as badly as it is told to."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread

Handler = BaseHTTPRequestHandler
Behaviour = Callable[[Handler], None]


class Site:
    """The running server: ``pages`` maps a path to what answers it, ``asked`` is what came in."""

    def __init__(self, port: int, closing: Event) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.closing = closing
        self.pages: dict[str, Behaviour] = {}
        # the path and the Range header, or None, of each request
        self.asked: list[tuple[str, str | None]] = []

    def add(self, path: str, *behaviours: Behaviour) -> str:
        """The URL of a page that does the first behaviour at the first request, and so on."""
        queue = list(behaviours)
        self.pages[path] = lambda handler: (queue.pop(0) if len(queue) > 1 else queue[0])(handler)
        return self.url + path

    def hang(self, handler: Handler) -> None:
        """Never answer."""
        self.closing.wait(30)

    def trickle(self, data: bytes, seconds: float) -> Behaviour:
        """Promise ``data``, send one byte of it at a time, and hang up after four seconds."""

        def behave(handler: Handler) -> None:
            head(handler, 200, len(data))
            for byte in data[: int(4 / seconds)]:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if self.closing.wait(seconds):
                    return

        return behave


@contextmanager
def serve() -> Iterator[Site]:
    """Run a server for the length of the ``with`` block."""
    closing = Event()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append((self.path, self.headers["Range"]))
            site.pages.get(self.path, status(404))(self)

        def do_HEAD(self) -> None:
            site.pages.get(f"HEAD {self.path}", status(404))(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.daemon_threads = True
        site = Site(server.server_address[1], closing)
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield site
        finally:
            closing.set()
            server.shutdown()
            thread.join()


def head(handler: Handler, code: int, length: int, **headers: str) -> None:
    """Status line and headers."""
    handler.send_response(code)
    handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def status(code: int) -> Behaviour:
    """Answer with a status and no content."""
    return lambda handler: head(handler, code, 0)


def content(
    data: bytes, *, resumes: bool = True, cut: int | None = None, etag: str = ""
) -> Behaviour:
    """Send ``data``, or what the request's Range asks of it; ``cut`` hangs up after so many bytes.

    With ``resumes=False``, or an If-Range other than ``etag``, the Range is ignored.
    """

    def behave(handler: Handler) -> None:
        start = 0
        asked = handler.headers["Range"]
        if asked and resumes and handler.headers["If-Range"] in (None, etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return head(handler, 416, 0)
            spread = f"bytes {start}-{len(data) - 1}/{len(data)}"
            head(handler, 206, len(data) - start, Content_Range=spread)
        else:
            head(handler, 200, len(data), **({"ETag": etag} if etag else {}))
        handler.wfile.write(data[start : None if cut is None else start + cut])
        return None

    return behave


def late(seconds: float, behaviour: Behaviour) -> Behaviour:
    """Answer after a while."""

    def behave(handler: Handler) -> None:
        time.sleep(seconds)
        behaviour(handler)

    return behave
