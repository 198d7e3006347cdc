"""Measure how long a user waits for the message about a wrong address, key or port, with the default settings.

    python benchmarks/first_contact.py

Runs `check-storage` and `run` as processes, once for each case, against a local S3 server where the case needs one, and prints a
Markdown table. The exit code is 1 if a message takes 15 s or longer, or does not name its cause.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import dev_s3  # noqa: E402

MOST_S = 15.0


class Always(BaseHTTPRequestHandler):
    """Give the same answer to everything."""

    protocol_version = "HTTP/1.1"
    answer = (200, "text/html", b"<!DOCTYPE html><title>Sign in</title>")

    def respond(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, kind, body = self.answer
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(code: str = "") -> Iterator[str]:
    """Yield the URL of a login page, or of a store that answers every request with the error `code`."""
    refusal = (403, "application/xml", f"<Error><Code>{code}</Code></Error>".encode())
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Always,), {"answer": refusal} if code else {}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def black_hole() -> Iterator[str]:
    """Yield the URL of a port whose queue of connections is full, so that the kernel drops further ones."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def measure(command: list[str], endpoint: str, cause: str) -> tuple[float, int, bool]:
    """Return the seconds until the process ended, its exit code, and whether its message names the cause."""
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "dev", "AWS_SECRET_ACCESS_KEY": "dev", "AWS_REGION": "us-east-1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "LORA_TRAINER_"))}
    environment = {**kept, **settings, "PYTHONPATH": str(ROOT)}
    started_s = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return time.monotonic() - started_s, done.returncode, cause in done.stdout + done.stderr


def main() -> int:
    with ExitStack() as stack:
        store = stack.enter_context(dev_s3.serve())
        cases = {
            "wrong host (does not resolve)": ("http://no-such-host.invalid:9000", "does not resolve"),
            "wrong port (refused)": (f"http://127.0.0.1:{unused_port()}", "nothing listens"),
            "black hole (no answer to a connection)": (stack.enter_context(black_hole()), "accepts no connection"),
            "login page": (stack.enter_context(serving()), "an HTML page"),
            "wrong key": (stack.enter_context(serving("InvalidAccessKeyId")), "does not know AWS_ACCESS_KEY_ID"),
            "wrong secret": (stack.enter_context(serving("SignatureDoesNotMatch")), "AWS_SECRET_ACCESS_KEY is not"),
            "HTTPS to an HTTP port": (store.endpoint_url.replace("http:", "https:"), "does not speak TLS"),
        }
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        places = [
            "--blood-type=A",
            "--data=s3://team/data/",
            "--output=s3://team/lora/",
            "--device=cpu",
            "--base-model=./examples/tiny-base",
        ]
        failed = False
        sys.stdout.write("| Case | check-storage | run |\n|---|---|---|\n")
        for number, (name, (endpoint, cause)) in enumerate(cases.items()):
            cells = []
            for command in ("check-storage", "run"):
                work_dir = f"--work-dir={scratch / str(number)}"
                arguments = [sys.executable, "-m", "entrypoint", command, *places, work_dir]
                took_s, code, named = measure(arguments, endpoint, cause)
                failed |= took_s >= MOST_S or not named
                cells.append(f"{took_s:.1f} s, exit {code}" + ("" if named else ", cause not named"))
            sys.stdout.write(f"| {name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
