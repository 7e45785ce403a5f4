"""What a user installs: a wheel and an editable install, each used from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, command

COMMANDS = """
import sys
from clbench.cli import main
for words in (["report", "outputs/default"], ["predict", RUN, IMAGES, "--output", "found"],
              ["export", RUN, "--formats", "torch"],
              ["run", "sweep=task_orders", "method=patchcore", "dry_run=true"]):
    if main(words) != 0:
        sys.exit(f"clbench {' '.join(words)}")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built from a copy that has a conf/local.yaml, as a user's may."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("clbench", "conf", "sweeps", "hydra_plugins", "pyproject.toml", "README.md", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "conf").unlink()
    (folder / "conf").mkdir()
    for path in (ROOT / "conf").iterdir():
        (folder / "conf" / path.name).symlink_to(path)
    (folder / "conf" / "local.yaml").unlink(missing_ok=True)
    (folder / "conf" / "local.yaml").write_text("dataset: {root: /secret}\n")
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def _pip(*words: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _environment(folder: Path) -> Path:
    """The python of a new environment that sees this one's packages, but not what is installed of this project."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # whose own .pth files do not count
    return folder / "bin" / "python"


def test_a_wheel_holds_every_module_and_config_and_nobody_s_own_settings(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "clbench").rglob("*.py")}
    configs = {f"clbench/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    sweeps = {f"clbench/conf/sweep/{path.name}" for path in (ROOT / "sweeps").glob("*.yaml")}
    expected = modules | configs - {"clbench/conf/local.yaml"} | sweeps
    assert expected <= held, expected - held
    assert "clbench/conf/local.yaml" not in held


@pytest.mark.parametrize("way", ["wheel", pytest.param("editable", marks=pytest.mark.long)])
def test_an_installed_package_runs_reports_predicts_and_exports_in_an_empty_folder(
    way: str, wheel: Path, folder: Path, tmp_path: Path
) -> None:
    python = _environment(tmp_path / "environment")
    what = [wheel] if way == "wheel" else ["--no-build-isolation", "--editable", ROOT]
    _pip("--python", python, "install", "--no-deps", "--no-index", *what)
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*words: str | Path) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            list(map(str, words)), cwd=empty, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run(python, "-c", "import clbench; print(clbench.__file__)").strip()
    assert Path(where).is_relative_to(tmp_path if way == "wheel" else ROOT)
    words = command(
        folder, tmp_path, "outputs=outputs", "task_order.tasks=[brick,cloth]", "method.held_out=0.34"
    )[2:]
    assert "task 2/2 cloth" in run(python.parent / "clbench", "run", *words)
    (directory,) = (path for path in (empty / "outputs" / "default").iterdir() if path.is_dir())
    images = folder / "brick" / "test" / "blot"
    said = run(python, "-c", f"RUN, IMAGES = {str(directory)!r}, {str(images)!r}\n{COMMANDS}")
    assert "finished: 1 of 1 run;" in said and "5 runs: 0 finished, 5 would be started" in said
    assert (empty / "outputs" / "default" / "report" / "index.html").is_file()
    assert list((empty / "found").iterdir()) and (directory / "export" / "model.pt2").is_file()
