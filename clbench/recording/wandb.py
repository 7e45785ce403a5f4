"""A run in Weights & Biases: kept in the run directory first, and sent by another process, for which nothing waits.

What was logged is in `wandb/logged.jsonl`, a JSON line each; the number of a line, from 0, is its step. A line is
written before wandb is told. wandb writes its own file, the fragment, by a process of its own and some seconds late,
and what a killed job had yet to write is lost. So a continued run removes the fragment of the process before it, and
logs all lines again into a new one: the same values at the same steps under the same id, whatever a server has got of
them already. Pictures stay in `wandb/pictures` for that. Where wandb fails, it is told nothing more, and our own file goes
on: `clbench wandb sync` tells all of it.

wandb's own files are in the run directory too, whatever the home folder is. A fragment names those of tables by their whole
paths: one of a directory that was moved is written anew before it is sent.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from clbench import digests
from clbench.errors import described
from clbench.metrics import continual
from clbench.metrics.continual import Matrix
from clbench.metrics.percentiles import MANY, PERCENTILES, percentiles, some
from clbench.recording.files import write_whole
from clbench.recording.heat_maps import write_picture
from clbench.recording.journal import Journal
from clbench.recording.recorder import Recorder, surviving
from clbench.recording.sending import answers, fragments, own_folders, send_live, sent

UNTOLD_END = "W&B is not told of the end of this run"
_LONGEST = 128  # characters of a name that W&B's server takes
_GRACE, _LEAST_GRACE = 0.03, 10.0  # share of a run's time, and s, that its end may wait until all is sent


class WandbRun(Recorder):
    """A recorder that writes a run for Weights & Biases.

    Keys over `stage`: `<category>/<metric>`, `mean/<metric>`, `forgetting/<metric>`, `maps/<category>`; over `epoch`:
    `training/loss`; at the end, tables `R/<metric>`, and of what models were chosen, `routing`; and as summary `final/*`,
    `memory/*`, `time/*`, `energy/*`, `operations/*`. Of more categories than can be read, `percentile_<percent>/<metric>` stand
    for those of categories, tables have a row for each stage that was evaluated, and heat maps are of a few.

    Args:
        directory: the run directory.
        settings: the `wandb` group of the config, its `mode` `online` or `offline`.
        config: the whole config as plain data, shown in W&B.
        names: names of the stream's categories.

    Raises:
        UserError: the run directory cannot be written; from every method.
    """

    wants_pictures = True

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], config: Mapping[str, Any], names: Sequence[str]
    ):
        # wandb tells its server of itself as the process ends, and waits some 10 s for one that hangs.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._begun = time.perf_counter()
        self._many, self._pictured = len(names) > MANY, set(some(names))
        self.id = run_id(directory)
        self.folder = directory / "wandb"
        self._pictures = self.folder / "pictures"
        self._file = Journal(self.folder / "logged.jsonl", lose_damaged=True)
        self._logged = {(line["key"], line["at"]) for line in self._file.entries}
        self._run: Any = (
            None  # the wandb.Run that is told; None where there is nothing to tell, or wandb failed
        )
        self._failure: str | None = None  # why wandb is not told all
        self._address = ""
        finished = ("finished", None) in self._logged  # by a process that was killed before the run's own end
        if not finished or not fragments(self.folder) or moved(self.folder):
            for left in [*fragments(self.folder), self.folder / "artifacts"]:
                shutil.rmtree(left, ignore_errors=True)
            _write_about(self.folder, {"id": self.id, "folder": str(self.folder.resolve())})
            with self._telling():
                self._run = _begin(directory, self.id, settings, config, names)
            for step, line in enumerate(self._file.entries):
                self._tell(step, line)
            for waiting in sorted(self._pictures.glob("[0-9]*/*")):  # a killed process had yet to log them
                self._log_pictures(int(waiting.parent.name), waiting.name)
        with self._telling():
            self._address = wandb.setup().settings.base_url
        self._sender = None
        if settings["mode"] == "online" and self._failure is None and not self._all_sent():
            self._sender = send_live(fragments(self.folder)[-1])

    def epoch(self, stage: int, epoch: int, loss: float) -> None:
        self._log("epoch", epoch, {"epoch": epoch, "training/loss": loss, "training/stage": stage})

    def pictures(self, stage: int, category: str, pictures: Sequence[np.ndarray]) -> None:
        if (f"maps/{category}", stage) in self._logged or category not in self._pictured:
            return
        part = self._pictures / "part"
        shutil.rmtree(part, ignore_errors=True)
        for number, picture in enumerate(pictures):
            write_picture(part / f"{number}.png", picture)
        waiting = self._pictures / str(stage) / category
        waiting.parent.mkdir(parents=True, exist_ok=True)
        part.rename(waiting)
        self._log_pictures(stage, category)

    def _log_pictures(self, stage: int, category: str) -> None:
        self._log(f"maps/{category}", stage, {"stage": stage})

    def stage(self, stage: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        values = {
            f"{name}/{metric}": value
            for name, metrics in (_of_many(results) if self._many else results).items()
            for metric, value in metrics.items()
            if value is not None
        }
        self._log("stage", stage, {"stage": stage, **values})

    def missing(self) -> str | None:
        return None if ("finished", None) in self._logged else UNTOLD_END

    def finish(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> str | None:
        if self._run is not None:
            with self._telling():
                self._end(summary, matrices)
            if self._failure is None and ("finished", None) not in self._logged:
                self._append("finished", None, {})
        if self._sender is not None and self._sender.poll() is None and answers(self._address):
            with suppress(subprocess.TimeoutExpired):
                self._sender.wait(max(_LEAST_GRACE, _GRACE * (time.perf_counter() - self._begun)))
        _end_process()
        command = f"clbench wandb sync {self.folder.parent}"
        if self._failure is not None:
            if self._sender is not None:
                self._sender.terminate()
            return f"W&B failed, and has not all of run {self.id} ({self._failure}): {command} completes it"
        if self._all_sent():
            return None
        if self._sender is None:
            return f"W&B run {self.id} is written, and not sent: {command} sends it"
        self._sender.terminate()
        return f"W&B run {self.id} is not all sent: {command} sends the rest"

    def _log(self, key: str, at: int, values: dict[str, Any]) -> None:
        """Log values under a key, at a stage or an epoch: once, however often a run comes by here."""
        if (key, at) not in self._logged:
            self._tell(*self._append(key, at, values))

    def _append(self, key: str, at: int | None, values: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Write a line; returns its number and the line."""
        line = {"key": key, "at": at, "values": values}
        self._logged.add((key, at))
        self._file.append(line)
        return self._file.count - 1, line

    def _all_sent(self) -> bool:
        """Whether W&B's server has all of the run so far."""
        return all(map(sent, fragments(self.folder)))

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, wandb is told something, and writes into the run directory; where it fails, it is told nothing more."""
        with surviving(self._fail), _writing_into(self.folder):
            yield

    def _fail(self, error: BaseException) -> None:
        self._run, self._failure = None, self._failure or described(error)

    # All that wandb is told goes through _begin, _tell and _end. It is imported where it is used: that takes a second.

    def _tell(self, step: int, line: Mapping[str, Any]) -> None:
        """Tell wandb a line of the file; the one of pictures with the pictures that wait for it."""
        import wandb

        key, values = line["key"], dict(line["values"])
        if self._run is None or key == "finished":
            return
        with self._telling():
            if key.startswith("maps/"):
                paths = sorted((self._pictures / str(line["at"]) / key.removeprefix("maps/")).glob("*.png"))
                values[key] = [wandb.Image(str(path)) for path in paths]
            self._run.log(values, step=step)

    def _end(self, summary: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> None:
        """Write the tables of R and the summary, and wait until wandb has written all."""
        import wandb

        categories = (
            [name for group in summary["categories"] for name in group] if "categories" in summary else []
        )
        columns, rows_of = ["stage", *(categories or summary["tasks"])], _whole
        if self._many:
            columns, rows_of = ["stage", *_NAMES, "mean"], _percentile_rows
        tables = {
            f"R/{metric}": wandb.Table(columns=columns, data=rows_of(R)) for metric, R in matrices.items()
        }
        if "routing" in summary and not self._many:
            tasks = summary["tasks"]
            rows = [
                [name, *(counts if isinstance(counts, list) else [counts.get(task, 0) for task in tasks])]
                for name, counts in summary["routing"].items()
            ]
            tables["routing"] = wandb.Table(columns=["category", *tasks], data=rows)
        self._run.log(tables, step=self._file.count - (("finished", None) in self._logged))
        for group in ("final", "forgetting", "memory", "time", "energy", "operations"):
            values = summary.get(group, {})  # runs of earlier versions lack the last two
            self._run.summary.update({f"{group}/{key}": value for key, value in values.items()})
        self._run.summary["average_forgetting_pct"] = summary["average_forgetting_pct"]
        self._run.finish()


_NAMES = [f"percentile_{percent}" for percent in PERCENTILES.values()]


def _of_many(results: Mapping[str, Mapping[str, float | None]]) -> dict[str, Mapping[str, float | None]]:
    """A stage's results with percentiles in place of categories: name -> metric -> value."""
    over = {name: results[name] for name in ("mean", "forgetting")}
    categories = [values for name, values in results.items() if name not in over]
    found = {
        metric: percentiles(values.get(metric) for values in categories).values() for metric in over["mean"]
    }
    by_name = zip(*found.values(), strict=True)
    return {
        **over,
        **{name: dict(zip(found, each, strict=True)) for name, each in zip(_NAMES, by_name, strict=True)},
    }


def _whole(R: Matrix) -> list[list[float | None]]:
    """A table's rows: of each stage its number and all of R."""
    return [[stage, *row] for stage, row in enumerate(R)]


def _percentile_rows(R: Matrix) -> list[list[float | None]]:
    """A table's rows: of each stage that was evaluated its number, percentiles and the mean."""
    return [
        [stage, *percentiles(R[stage]).values(), continual.mean(R[stage])] for stage in continual.evaluated(R)
    ]


def _begin(
    directory: Path,
    identity: str,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    names: Sequence[str],
) -> Any:
    """Begin a fragment; returns the wandb.Run that writes it.

    wandb's own process is another for each run: one that is there already keeps to the folders of the run before.
    """
    import wandb

    _end_process()
    run = wandb.init(
        mode="offline",
        dir=str(directory),
        id=identity,
        name=cut_name(directory.name),
        project=settings["project"],
        entity=settings["entity"],
        group=cut_name(config["experiment"]),
        tags=settings["tags"] or None,
        notes=settings["notes"],
        config=dict(config),
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,  # x_ marks what wandb may change in any version
            x_disable_meta=True,
        ),
    )
    for over in ("stage", "epoch"):
        run.define_metric(over)
    shown = _NAMES if len(names) > MANY else names
    plain = [name for name in shown if "*" not in name]  # which wandb takes for a pattern
    for name in (*plain, "mean", "forgetting", "maps"):
        run.define_metric(f"{name}/*", step_metric="stage", step_sync=False)
    run.define_metric("training/*", step_metric="epoch", step_sync=False)
    return run


def _end_process() -> None:
    """End wandb's own process, which other processes that this one starts would talk to, where there is one."""
    import wandb

    with suppress(Exception):
        wandb.teardown()


def run_id(directory: Path) -> str:
    """A run's id in Weights & Biases: made once for a run directory, and kept in its `wandb/id.json`."""
    about = _read_about(directory / "wandb")
    if "id" not in about:
        text = f"{directory.resolve()} {time.time_ns()}"
        about = {"id": digests.of_text(text)[:16]}
        _write_about(directory / "wandb", about)
    return str(about["id"])


def moved(folder: Path) -> bool:
    """Whether a fragment that is not all sent was written when the folder `wandb` of a run was elsewhere."""
    before = _read_about(folder).get("folder")
    return before not in (None, str(folder.resolve())) and not all(map(sent, fragments(folder)))


def _read_about(folder: Path) -> dict[str, Any]:
    """What `wandb/id.json` holds: `id`, and the `folder` that it was in; empty where it is missing or damaged."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / "id.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _write_about(folder: Path, about: Mapping[str, str]) -> None:
    """Write `wandb/id.json`.

    Raises:
        UserError: the disk is full or may not be written.
    """
    text = json.dumps(dict(about)) + "\n"  # in ASCII, whatever bytes a folder's name has
    write_whole(folder / "id.json", lambda part: part.write_text(text, encoding="utf-8"))


def cut_name(name: str) -> str:
    """A name as W&B's server takes it: one that is cut ends in a hash of the whole, and stays distinct."""
    if len(name) <= _LONGEST:
        return name
    digest = digests.of_text(name)[:8]
    return f"{name[: _LONGEST - len(digest) - 1]}~{digest}"


@contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    """Inside, wandb writes into this folder, see `own_folders`."""
    inside = own_folders(folder)
    before = {name: os.environ.get(name) for name in inside}
    os.environ.update(inside)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
