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

_JOB = ("method=stfpm", "strategy=finetune", "method.epochs=3")  # long enough for seconds not to matter
_ROUNDS = (
    3  # in turn, and the fastest of each counts: a machine that is shared drifts by as much as is looked for
)

_BROKEN = ("refuses", "hangs", "answers errors")


class _Errors(http.server.BaseHTTPRequestHandler):
    """Answers everything with an error of its own."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def _server(kind: str) -> Iterator[str | None]:
    """The address of a server of this kind, None for none."""
    if kind not in _BROKEN:
        yield None
        return
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
    for title in ("server", "fastest, s", *(_ROUNDS - 2) * ("",), "slowest", "longer"):
        built.add_column(title, justify="right" if title != "server" else "left")
    seconds: dict[str, list[float]] = {kind: [] for kind in ("none: offline", *_BROKEN)}
    with tempfile.TemporaryDirectory() as folder:
        _seconds(folder, "warm", None)
        for number in range(_ROUNDS):
            for index, kind in enumerate(seconds):
                with _server(kind) as address:
                    seconds[kind].append(_seconds(folder, f"round_{number}_{index}", address))
    alone = min(seconds["none: offline"])
    for kind, taken in seconds.items():
        longer = "" if kind not in _BROKEN else f"{100 * (min(taken) / alone - 1):.1f} %"
        built.add_row(kind, *(f"{least:.1f}" for least in sorted(taken)), longer)
    return built


def _seconds(folder: str, experiment: str, address: str | None) -> float:
    words = [sys.executable, "train.py", *_JOB, f"wandb={'offline' if address is None else 'online'}"]
    words += [f"experiment={experiment}", f"outputs={folder}", f"cache={folder}/cache"]
    environment = {**os.environ, "WANDB_API_KEY": 40 * "0"}
    if address is not None:
        environment["WANDB_BASE_URL"] = address
    begin = time.perf_counter()
    result = subprocess.run(words, check=False, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise SystemExit(result.stderr)
    return time.perf_counter() - begin
