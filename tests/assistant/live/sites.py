"""A web server on loopback that says what a test tells it to, and notes what it was asked."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Handler = Callable[[BaseHTTPRequestHandler], None]
LOOPBACK = ["127.0.0.0/8"]


@dataclass
class Site:
    """What it says by path, and the requests that came: path and headers."""

    address: str = ""
    pages: dict[str, Any] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def paths(self) -> list[str]:
        """The paths that were asked for, without robots.txt."""
        return [path for path, _ in self.asked if path != "/robots.txt"]

    def headers(self, path: str) -> dict[str, str]:
        """Those of the last request for a path."""
        return next(headers for asked, headers in reversed(self.asked) if asked == path)


@contextlib.contextmanager
def site_on(host: str = "127.0.0.1", port: int = 0) -> Iterator[Site]:
    """A site, whose each page is a text, bytes, ``(status, headers, body)``, or a function of the request's handler."""
    site = Site()

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            page = site.pages.get(self.path, site.pages.get(self.path.partition("?")[0], (404, {}, b"")))
            if callable(page):
                page(self)
                return
            status, headers, body = page if isinstance(page, tuple) else (200, {}, page)
            content = body.encode() if isinstance(body, str) else body
            etag = headers.get("ETag")
            if etag is not None and self.headers.get("If-None-Match") == etag:
                status, content = 304, b""
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Whoever asked has gone."""

    server = Server((host, port), Answers)
    site.address = f"http://{host}:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def rss(*entries: tuple[str, str, str, str]) -> str:
    """A feed of entries: id, title, text, date."""
    items = "".join(
        f"<item><guid>{key}</guid><link>/{key}</link><title>{title}</title><pubDate>{date}</pubDate>"
        f"<description><![CDATA[{text}]]></description></item>"
        for key, title, text, date in entries
    )
    return f'<?xml version="1.0"?><rss version="2.0"><channel><title>News</title>{items}</channel></rss>'


def sitemap(*pages: tuple[str, str]) -> str:
    """A site map of pages: address, date."""
    urls = "".join(f"<url><loc>{address}</loc><lastmod>{date}</lastmod></url>" for address, date in pages)
    return f'<?xml version="1.0"?><urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">{urls}</urlset>'
