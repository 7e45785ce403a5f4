"""Sweeps: what is started, what is left out, and what one failure does to the rest."""

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Train, command, run_directories
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig
from rich.console import Console

from clbench import assembly, cli, experiment
from clbench.commands.run import main
from clbench.config import sources
from clbench.methods import tables
from clbench.recording.run_directory import RunDirectory
from clbench.sweeps.launchers import LocalLauncher
from clbench.sweeps.runs import SweepRun, suited
from clbench.sweeps.tables import sweep_table
from clbench.terminal import SHOWN, Display

FAILING = (
    "-m",
    "method=stfpm",
    "strategy=finetune",
    "method.epochs=2",
    "method.batch_size=2",
    "method.learning_rate=0.1,1e30",
)

SMALL_STFPM = ("method=stfpm", "method.epochs=1", "method.batch_size=2")


def status(directory: Path) -> str:
    return json.loads((directory / "summary.json").read_text())["status"]


def test_a_failed_run_is_shown_leaves_the_others_and_is_tried_again(train: Train, tmp_path: Path) -> None:
    result = train(*FAILING, "seed=0,1")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert sorted(map(status, run_directories(tmp_path))) == ["complete"] * 2 + ["failed"] * 2
    said = " ".join(result.stdout.split())
    assert said.count("run 1 of 4: ") == said.count("run 4 of 4: ") == 1
    assert said.count("failed") >= 2 and "the loss became" not in said
    (line,) = result.stderr.splitlines()
    assert "error: 2 runs (method.learning_rate=1e+30, seed=0; method" in line
    assert "): task 1/3 brick: the loss became" in line

    assert "0 would be started" in train(*FAILING, "seed=0,1", "only=missing", "dry_run=true").stdout
    planned = train(*FAILING, "seed=0,1", "only=failed", "dry_run=true")
    assert planned.returncode == 0 and "4 runs: 2 finished, 2 would be started" in planned.stdout
    assert planned.stdout.count("try again") == 2 and planned.stdout.count("stay") == 2

    again = train(*FAILING, "seed=0,1", "only=missing")
    assert again.returncode == 0 and "tried again" not in again.stdout
    again = train(*FAILING, "seed=0")
    assert again.returncode == 1
    assert again.stdout.count("finished already, skipped") == 1
    assert again.stdout.count("failed before, tried again") == 1 and "the loss became" in again.stdout


def test_a_dry_run_starts_nothing_and_knows_what_finished_runs_took(train: Train, tmp_path: Path) -> None:
    sweep = ("-m", "method=patchcore,padim", "seed=0,1")
    planned = train(*sweep, "dry_run=true")
    assert planned.returncode == 0 and "4 runs: 0 finished, 4 would be started" in planned.stdout
    assert not (tmp_path / "outputs").exists()
    # What a GPU must hold of images of 48 x 48 pixels: those of a task of 4, or of all 12, with a buffer of 5 or none.
    settings = ("method=stfpm", "strategy=finetune,joint", "dry_run=true")
    rows = [line for line in train("-m", *settings).stdout.splitlines() if "strategy=" in line]
    rows += [
        line
        for line in train("method=stfpm", "replay.size=5", "dry_run=true").stdout.splitlines()
        if "missing" in line
    ]
    megabytes = [3 * 48 * 48 * count / 1e6 for count in (4, 12, 4 + 5)]
    assert [f" {images:.1f} " in row for images, row in zip(megabytes, rows, strict=True)] == [True] * 3
    assert train("-m", "method=padim", "seed=0").returncode == 0
    planned = train(*sweep, "dry_run=true")
    assert "4 runs: 1 finished, 3 would be started" in planned.stdout
    (directory,) = run_directories(tmp_path)
    peak = json.loads((directory / "summary.json").read_text())["memory"]["peak_mb"]
    rows = [line for line in planned.stdout.splitlines() if "method=" in line]
    assert [f"{peak:.0f}" in row for row in rows] == ["padim" in row for row in rows]


def test_a_finished_run_is_known_without_composing_until_conf_changes(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("-m", "method=padim", "seed=0,1").returncode == 0
    composed: list[list[str]] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, shared: DictConfig, overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return compose(self, shared, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    again = train("-m", "method=padim", "seed=0,1")
    assert again.returncode == 0 and again.stdout.count("finished already, skipped") == 2 and not composed
    summary = run_directories(tmp_path)[0] / "summary.json"
    summary.write_text(summary.read_text().replace('"composed_from": "', '"composed_from": "0'))
    assert train("-m", "method=padim", "seed=0,1").stdout.count("finished already") == 2
    assert len(composed) == 1


SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
SWEEPS.remove("order_study")  # which needs a finished run: see test_protocols.py


@pytest.mark.parametrize("name", SWEEPS)
def test_every_ready_made_sweep_can_be_started(
    name: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assembly, "model_bytes", lambda config: 0.0)  # tests/test_dry_run.py asks for them
    count = {
        "backbones": 4,
        "bank_memory": 12,
        "demo": 14,
        "equal_memory": 22,
        "strategies": 39,
        "foundation": 27,
        "paper_bounds": 14,
        "paper_native": 4,
        "paper_replay": 15,
        "task_orders": 15,
        "mvtec_protocols": 5,
        "visa_protocols": 4,
    }[name]
    words = ["-m", f"sweep={name}", "dry_run=true", f"outputs={tmp_path}", f"cache={tmp_path}/cache"]
    protocols = name.endswith("_protocols")
    words += [f"dataset.root={folder}"] * (protocols or name.startswith(("paper", "foundation")))
    words += ["method=efficientad"] * protocols  # one of the seven, for the time that checking them takes
    if protocols or name in ("paper_bounds", "paper_replay"):  # before any of the runs that need no teacher
        assert main(words) == 2 and "method.teacher" in capsys.readouterr().err
        words.append("method.teacher=random")
    assert main(words) == 0
    assert f"{count} runs: 0 finished, {count} would be started" in capsys.readouterr().out


def test_settings_of_the_command_line_take_the_place_of_a_sweep_s(train: Train, tmp_path: Path) -> None:
    result = train("-m", "sweep=task_orders", "method=padim", "seed=3,4", "experiment=mine")
    assert result.returncode == 0, result.stderr
    directories = run_directories(tmp_path, "mine")
    assert len(directories) == 2
    for directory in directories:
        config = yaml.safe_load((directory / "config.yaml").read_text())
        assert config["method"]["name"] == "padim" and config["seed"] in (3, 4)
        assert config["task_order"]["kind"] == "random"


def test_an_unfinished_run_of_another_version_is_refused_and_a_finished_one_is_not(
    train: Train, tmp_path: Path
) -> None:
    assert train().returncode == 0
    (directory,) = run_directories(tmp_path)
    config, summary = directory / "config.yaml", directory / "summary.json"
    stored = yaml.safe_load(config.read_text())
    stored["made_by"]["clbench"] = "0.0.1"
    config.write_text(yaml.safe_dump(stored))
    about = json.loads(summary.read_text())
    summary.write_text(json.dumps({**about, "composed_from": None}))
    assert "finished already" in train().stdout
    summary.write_text(json.dumps({**about, "status": "running"}))
    refused = train()
    assert refused.returncode == 2
    assert "an unfinished run of clbench 0.0.1" in refused.stderr and "overwrite=true" in refused.stderr


def test_a_sweep_s_own_settings_are_checked_though_its_runs_are_finished(train: Train) -> None:
    assert train("-m", "method=padim").returncode == 0
    for override, reason in (
        ("only=faild", "only=faild: input should be 'failed' or 'missing'"),
        ("dry_run=maybe", "dry_run=maybe: input should be a valid boolean"),
        ("checkpoint_s=-1", "checkpoint_s=-1: input should be greater than or equal to 0"),
        ("outputs=", "outputs=: string should have at least 1 character"),
        ("dry_run=true,false", "dry_run=true,false: runs that differ in it alone would be one run"),
        ("seed=range(0)", "asks for no run"),
    ):
        refused = train("-m", "method=padim", override)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert reason in refused.stderr


def test_long_runs_are_told_apart_in_tables_and_flags_stand_anywhere(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "task_order.tasks=[brick,[cloth,plate]]", f"dataset.root={folder}"
    words = command(folder, tmp_path, *long, "backbone.name=resnet18", "method.epsilon=0.5,0.6", "gpu=cpu")[
        2:
    ]
    words.insert(4, "-m")
    assert main([*words, "seed=0,1"]) == 0
    said = capsys.readouterr().out
    for seed in (0, 1):
        for epsilon in (0.5, 0.6):
            assert f"method.epsilon={epsilon}, seed={seed}" in said


@pytest.mark.parametrize("width", [80, 110, 200])
def test_a_sweep_s_table_is_read_in_any_terminal(width: int, tmp_path: Path) -> None:
    runs = []
    for method in ("efficientad", "fastflow"):
        directory = RunDirectory(tmp_path / f"method={method},strategy=finetune")
        directory.create()
        summary = {
            "status": "complete",
            "tasks": ["brick"],
            "final": dict.fromkeys(SHOWN, 0.8765),
            "average_forgetting_pct": -133.3,
            "memory": {"additional_mb": 1541.0, "peak_mb": 4492.0},
            "time": {"train_s": 1440.9, "eval_s": 204.9, "inference_ms_per_image": 136.9},
        }
        (directory.path / "summary.json").write_text(json.dumps(summary))
        runs.append(SweepRun([f"method={method}", "strategy=finetune"], directory, "finished"))
    printed = Console(width=width, record=True, file=io.StringIO())
    printed.print(sweep_table(runs, width))
    lines = printed.export_text().splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    for method in ("efficientad", "fastflow"):
        (row,) = (line for line in lines if f"method={method}" in line)
        assert row.count("0.876") == {80: 4, 110: 5, 200: 5}[width] and "-133.3 %" in row
    assert ("204.9" in row) == (width == 200)


def test_what_happens_now_is_seen_beside_a_long_heading() -> None:
    display = Display("run")
    display.console.width = 80
    display.heading("method=fastflow,replay.size=20," * 5)
    display.progress("reading images", 3, 9, "bottle")
    (bar,) = display._bar.tasks
    assert "…: reading images (bottle)" in bar.description and len(bar.description) <= 80 - 24 - 15


def test_overwriting_starts_anew_once_and_a_run_of_it_continues(
    folder: Path, train: Train, tmp_path: Path
) -> None:
    long = ("method=stfpm", "strategy=finetune", "method.epochs=30", "method.batch_size=2")
    long += ("task_order.tasks=[brick,cloth]",)
    stale = tmp_path / "outputs" / "default" / "stale"
    words = command(folder, tmp_path, *long, "overwrite=true", "checkpoint_s=0")

    def stopped() -> str:
        """What it says when it is asked to stop, once a training is under way."""
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        while not [path for path in checkpoints() if path.stat().st_mtime > stale.stat().st_mtime]:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.communicate(timeout=60)[0]

    def checkpoints() -> list[Path]:
        return list((tmp_path / "outputs").glob("default/*/checkpoint/learning-0000-*.json"))

    stale.parent.mkdir(parents=True)
    stale.touch()
    assert "the same command without overwrite=true continues here" in stopped()
    stale.touch()
    assert "continuing" not in stopped()
    again = train(*long)
    assert again.returncode == 0 and "continuing in stage 1 of 2" in again.stdout


@pytest.mark.long
def test_a_local_run_whose_process_is_killed_every_time_fails_and_the_others_finish(
    folder: Path, tmp_path: Path
) -> None:
    long = ("method=stfpm", "strategy=finetune", "method.epochs=20", "method.batch_size=2")
    long += ("task_order.tasks=[brick,cloth]",)
    words = command(folder, tmp_path, "-m", *long, "seed=0,1", "hydra/launcher=local")
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kills = 0
    while process.poll() is None:
        for lock in (tmp_path / "outputs").glob("default/*seed=1*/run.lock"):
            words_of_lock = lock.read_text().split()
            if len(words_of_lock) > 1 and kills < 2:
                number = int(words_of_lock[1])
                assert number != process.pid  # a run never is the sweep's own process
                os.kill(number, signal.SIGKILL)
                lock.write_text("")
                kills += 1
        time.sleep(0.05)
    output, errors = process.communicate()
    assert kills == 2 and process.returncode == 1
    assert "its process was killed, for its memory perhaps" in errors
    found = {path.name.rpartition("seed=")[2][:1]: path for path in run_directories(tmp_path)}
    assert status(found["0"]) == "complete"
    assert "just learned" in output


def test_a_detector_that_gives_no_numbers_is_named(train: Train, tmp_path: Path) -> None:
    given = (
        "method=stfpm",
        "strategy=finetune",
        "method.batch_size=5",
        "method.epochs=1",
        "method.patience=null",
    )
    result = train(*given, "method.learning_rate=1e30")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "task 1/3 brick" in result.stderr and "lower method.learning_rate" in result.stderr
    assert [status(path) for path in run_directories(tmp_path)] == ["failed"]


def test_a_setting_of_some_of_the_swept_methods_goes_to_those_that_have_it(
    train: Train, tmp_path: Path
) -> None:
    sweep = (
        "sweep=paper_replay",
        "method.teacher=random",
        "backbone=small",
        "dataset.resize=256",
        "dry_run=true",
    )
    planned = train(*sweep)
    assert planned.returncode == 0, planned.stderr
    assert "15 runs: 0 finished, 15 would be started" in planned.stdout
    lines = [line for line in planned.stdout.splitlines() if "method=" in line]
    assert {"efficientad" in line for line in lines if "teacher" in line} == {True}
    typo = train(*sweep, "method.teachr=random")
    assert typo.returncode == 2 and "there is no setting method.teachr" in typo.stderr


def test_a_setting_goes_to_the_choices_that_have_it_and_a_typo_to_all() -> None:
    given = [
        ["method=cfa", "method.held_out=0.1", "seed=1"],
        ["++method.teacher=random", "method.typo=1"],
        ["strategy=elastic", "strategy.weight=2", "method=cfa"],
        ["strategy=joint", "strategy.weight=2", "method=cfa"],
    ]
    usual = {"method": "efficientad", "strategy": "auto", "dataset": "synthetic"}
    has = {
        ("method", "cfa"): {"held_out"},
        ("method", "efficientad"): {"teacher", "held_out"},
        ("strategy", "elastic"): {"weight"},
        ("strategy", "auto"): set(),
        ("strategy", "joint"): set(),
    }
    expected = [*given[:3], ["strategy=joint", "method=cfa"]]
    assert suited(given, usual, lambda *choice: has[choice]) == expected
    given[0].append("method.teacher=random")
    assert suited(given, usual, lambda *choice: has[choice])[0] == given[0][:3]


def test_a_run_that_its_images_refuse_failed_and_says_why(
    folder: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(folder, tmp_path / "broken")
    image = root / "cloth" / "train" / "good" / "003.png"
    sound = image.read_bytes()
    image.write_bytes(b"")
    given = ("-m", f"dataset.root={root}", "seed=0,1", "experiment=refused")
    assert train(*given).returncode == 1
    again = train(*given, "only=failed", "dry_run=true").stdout
    assert "2 runs: 0 finished, 2 would be started" in again and "003.png" in " ".join(again.split())
    assert cli.main(["report", str(tmp_path / "outputs" / "refused")]) == 0
    report = capsys.readouterr().out
    assert report.count("failed refused/") == 2 and "003.png" in report
    image.write_bytes(sound)
    assert train(*given, "only=failed").returncode == 0


def test_where_runs_go_is_ours_to_say(train: Train, tmp_path: Path) -> None:
    for override, way_out in (
        ("hydra.sweep.subdir=x", "experiment=NAME"),
        ("hydra.sweep.dir=x", "outputs=FOLDER"),
        ("hydra.run.dir=x", "outputs=FOLDER"),
        ("hydra.job.chdir=true", "outputs=FOLDER"),
        ("hydra.mode=RUN", "leave it out"),
    ):
        refused = train("-m", "seed=1,2", override)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert override.partition("=")[0] in refused.stderr and way_out in refused.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_launcher_is_given_as_many_runs_at_a_time_as_it_may_be(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def start(self: LocalLauncher, runs: list[SweepRun], first: int) -> list[JobReturn]:
        batches.append((first, [run.directory.path.name.rpartition("seed=")[2][:1] for run in runs]))
        return [JobReturn(status=JobStatus.COMPLETED) for _ in runs]

    monkeypatch.setattr(LocalLauncher, "start", start)
    sweep = ("-m", "seed=0,1,2,3,4", "hydra/launcher=local")
    assert train(*sweep, "hydra.sweeper.max_batch_size=2").returncode == 0
    assert batches == [(0, ["0", "1"]), (2, ["2", "3"]), (4, ["4"])]
    refused = train(*sweep, "hydra.sweeper.max_batch_size=0")
    assert refused.returncode == 2 and "hydra.sweeper.max_batch_size=0: give a number" in refused.stderr


def test_each_run_is_composed_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, shared: DictConfig, overrides: list[str]) -> DictConfig:
        composed.append(tuple(overrides))
        return compose(self, shared, overrides)

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    assert train("-m", "method=padim", "seed=0,1", "task_order.tasks=[brick]").returncode == 0
    assert len(composed) == len(set(composed)) == 2


def test_a_command_in_this_process_leaves_it_as_it_was(train: Train) -> None:
    train("dry_run=true")  # which goes to the project's folder first
    before = (list(sys.argv), signal.getsignal(signal.SIGINT), dict(os.environ), os.getcwd())
    for overrides in (["method=padim", "task_order.tasks=[brick]"], ["metod=padim"], ["seed=-1"]):
        train(*overrides)
        assert not GlobalHydra.instance().is_initialized() and HydraConfig.instance().cfg is None
        assert before == (list(sys.argv), signal.getsignal(signal.SIGINT), dict(os.environ), os.getcwd())


def test_a_finished_sweep_is_repeated_under_any_launcher(train: Train) -> None:
    assert train("-m", "method=padim", "seed=0,1").returncode == 0
    for more in ((), ("only=failed",)):
        again = train("-m", "method=padim", "seed=0,1", "hydra/launcher=local", *more)
        assert again.returncode == 0 and again.stdout.count("finished already") == 2, again.stderr


def test_a_run_whose_folder_cannot_be_made_ends_no_other(train: Train, tmp_path: Path) -> None:
    planned = train("-m", "method=padim", "seed=0,1,2")
    assert planned.returncode == 0
    places = run_directories(tmp_path)
    for place in places:
        shutil.rmtree(place)
    places[1].write_text("a file")
    result = train("-m", "method=padim", "seed=0,1,2")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert f"error: seed=1: {places[1]} cannot be written (File exists)" in result.stderr
    assert [status(place) for place in (places[0], places[2])] == ["complete"] * 2
    assert "not begun" in result.stdout


def test_a_run_is_not_taken_for_finished_by_another_value_of_an_environment_variable(
    folder: Path, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("method=padim", "dataset.root=${oc.env:CLBENCH_TEST_DATA}")
    monkeypatch.setenv("CLBENCH_TEST_DATA", str(folder))
    assert train(*given).returncode == 0
    assert "finished already" in train(*given).stdout
    monkeypatch.setenv("CLBENCH_TEST_DATA", str(tmp_path / "other"))
    other = train(*given)
    assert other.returncode == 2 and f"dataset.root: {folder} -> {tmp_path / 'other'}" in other.stderr


def test_a_run_is_not_taken_for_finished_by_another_config_of_the_same_words(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for package, size in (("first_configs", 300), ("second_configs", 200)):
        (tmp_path / package / "method").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
        text = f"defaults: [patchcore, _self_]\nmemory_size: {size}\n"
        (tmp_path / package / "method" / "mine.yaml").write_text(text)
        result = train("method=mine", f"hydra.searchpath=[pkg://{package}]", "experiment=packages")
        assert result.returncode == (0 if size == 300 else 2), result.stderr
    assert "method.memory_size: 300 -> 200" in result.stderr


def test_a_folder_of_configs_that_links_to_itself_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [padim]")
    for name in "abc":
        (tmp_path / name).symlink_to(tmp_path)
        (tmp_path / "method" / name).symlink_to(tmp_path)
    before = sources._folder_digest(str(tmp_path))
    (tmp_path / "method" / "mine.yaml").write_text("defaults: [patchcore]")
    sources.read_again()
    assert sources._folder_digest(str(tmp_path)) != before


def test_a_run_that_exits_ends_no_other(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "exiting.py").write_text(
        "import sys\nfrom clbench.strategies.finetune import Finetune\n\n\nclass Exits(Finetune):\n"
        "    def end_stage(self, stage, images):\n        sys.exit(0)\n"
    )
    (tmp_path / "own" / "strategy").mkdir(parents=True)
    (tmp_path / "own" / "strategy" / "exits.yaml").write_text("name: exits\n_target_: exiting.Exits\n")
    result = train("-m", f"--config-dir={tmp_path / 'own'}", *SMALL_STFPM, "strategy=exits,finetune")
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "something in this run called sys.exit(0)" in result.stderr
    assert sorted(map(status, run_directories(tmp_path))) == ["complete", "failed"]


@pytest.mark.parametrize(
    "given",
    [
        (*FAILING, "seed=0,1"),
        ("-m", "method=patchcore,padim,cfa", "strategy=native"),
        ("-m", "method=padim", "strategy=single,native,joint", "maps=few"),
    ],
    ids=["some fail", "banks", "strategies"],
)
def test_runs_in_one_process_leave_no_tensor_to_those_after_them(
    given: tuple[str, ...], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even to a collector of garbage, which comes when it likes."""
    alive: list[int] = []
    assemble = experiment.assemble

    def counted(*arguments: object) -> assembly.Assembly:
        tables._kept.cache_clear()  # at most 32 of them, which are kept on purpose
        tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]
        alive.append(len({one.untyped_storage().data_ptr() for one in tensors}))
        return assemble(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(experiment, "assemble", counted)
    gc.collect()
    gc.disable()
    try:
        train(*given)
    finally:
        gc.enable()
    assert len(alive) >= 3 and set(alive) == {alive[0]}
