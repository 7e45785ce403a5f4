"""What Weights & Biases costs a run when its server refuses, hangs or answers errors: at most a twentieth."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from rich.table import Table

_JOB = ("method=stfpm", "strategy=finetune", "method.epochs=25")  # long enough for seconds not to matter


class _Errors(http.server.BaseHTTPRequestHandler):
    """Answers everything with an error of its own."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def _server(kind: str) -> Iterator[str]:
    """The address of a server of this kind."""
    if kind == "answers errors":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Errors)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        return
    with socket.socket() as listening:  # nobody ever accepts: it hangs
        listening.bind(("127.0.0.1", 0))
        if kind == "hangs":
            listening.listen(64)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def table(checkpoint: str | None = None, root: str | None = None) -> Table:
    """Seconds of one and the same run, with no server and with each kind of broken one."""
    built = Table(title="a run that logs to Weights & Biases", title_justify="left")
    for title in ("server", "s", "longer"):
        built.add_column(title, justify="right" if title != "server" else "left")
    with tempfile.TemporaryDirectory() as folder:
        _seconds(folder, "warms the cache", None, ["method.epochs=1"])
        alone = _seconds(folder, "offline", None, ["wandb=offline"])
        built.add_row("none: offline", f"{alone:.1f}", "")
        for kind in ("refuses", "hangs", "answers errors"):
            with _server(kind) as address:
                seconds = _seconds(folder, kind, address, ["wandb=online"])
            built.add_row(kind, f"{seconds:.1f}", f"{100 * (seconds / alone - 1):.1f} %")
        again = _seconds(folder, "offline again", None, ["wandb=offline"])
        built.add_row("none, once more", f"{again:.1f}", f"{100 * (again / alone - 1):.1f} %")
    return built


def _seconds(folder: str, experiment: str, address: str | None, settings: list[str]) -> float:
    words = [sys.executable, "train.py", *_JOB, *settings]
    words += [f"experiment={experiment.replace(' ', '_')}", f"outputs={folder}", f"cache={folder}/cache"]
    environment = {**os.environ, "WANDB_API_KEY": 40 * "0"}
    if address is not None:
        environment["WANDB_BASE_URL"] = address
    begin = time.perf_counter()
    subprocess.run(words, check=True, capture_output=True, env=environment)
    return time.perf_counter() - begin
