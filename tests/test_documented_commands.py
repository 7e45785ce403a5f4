"""The commands that the documentation shows: each is run by a test, or composed or parsed here; what it needs stands beside it.

A shell reads them as a reader's does; in place of programs it has functions that say which words they are given. What a
command needs that a fresh checkout has not is found out here, and must be said: in the line `*Needs: ….*` above its block, or
in the comment at its end, after the word `needs`.
"""

import argparse
import inspect
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from hydra.core.override_parser.types import Override

from clbench.cli import COMMANDS
from clbench.commands import run
from clbench.config import Config, check
from clbench.config.classes import class_of
from clbench.sweeps import sweeper

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_AS_WRITTEN = {
    "line.md": "test_line.py",
    "add-a-method.md": "test_extending.py",
}  # page -> the test that does
SAID = {  # what a command may need -> how it is said
    "images": "images|MVTec AD|VisA",
    "weights": "weights",
    "teacher": "teacher",
    "cluster": "SLURM",
    "finished run": "finished run",
    "anomalib": "anomalib",
    "network": "network",
    "GPU": "GPU",
}
BLOCK = re.compile(
    r"(?:^\*Needs: (?P<needs>.*?)\.\*\n\n)?^```console.*?\n(?P<lines>.*?)^```", re.MULTILINE | re.DOTALL
)
SHELL = r"""
set -euf
PATH=
said() { printf '%s\x1f' "$at" "$@"; printf '\x1e'; }
python() { if [[ $1 == -m ]]; then last=("$@"); fi; said python "$@"; }
…() { said python "${last[@]}" "$@"; }
clbench() { said clbench "$@"; }
make() { said make "$@"; }
git() { said git "$@"; }
cd() { :; }
.() { said . "$@"; }
ls() { printf RUN; }
"""


@dataclass(frozen=True)
class Command:
    """A command of a page: the words of its program, and what the page says that it needs."""

    page: Path
    words: tuple[str, ...]
    needs: str


def commands() -> list[Command]:
    """All commands of all pages, in their order."""
    script, needs, pages = [SHELL], [], []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
            for text in re.findall(r"^\$ ((?:.*\\\n)*.*)", block["lines"], re.MULTILINE):
                comment = re.search(r"#.*?\bneeds (.*)", text)
                script.append(f"at={len(needs)}\n{text.replace('ENVIRONMENT/bin/python', 'python')}")
                needs.append(" ".join([block["needs"] or "", comment[1] if comment else ""]))
                pages.append(page)
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = [record.split("\x1f")[:-1] for record in done.stdout.split("\x1e")[:-1]]
    return [Command(pages[int(at)], tuple(words), needs[int(at)]) for at, *words in found]


def test_every_command_can_be_given_and_says_what_it_needs() -> None:
    given, missing = commands(), []
    assert len(given) > 90
    for command in given:
        match command.words:
            case ("python", "train.py", *words) | ("clbench", "run", *words):
                if not any(word.startswith("--config-dir") for word in words):  # a folder of the reader's own
                    check_choices(words)
            case ("clbench", name, *words):
                parser = argparse.ArgumentParser()
                import_module(f"clbench.commands.{name}").arguments(parser)
                assert name in COMMANDS and parser.parse_args(words), command
            case ("python", "-m", module, *words):
                check_module(module, words)
            case ("python", script, *_):
                assert (ROOT / script).is_file(), command
            case ("make", target):
                assert target in targets(), command
            case ("git", "clone", *_) | (".", ".venv/bin/activate"):
                pass
            case _:
                raise AssertionError(f"no test knows what to do with {command}")
        missing += unsaid(command, [])
    assert not missing, "these commands do not say what they need:\n" + "\n".join(missing)


@pytest.mark.long
def test_runs_of_every_command_can_be_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    configs: list[Config] = []

    def checked(composed: object) -> Config:
        configs.append(check(composed))  # type: ignore[arg-type]
        return configs[-1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweeper, "check", checked)
    several = sweeper.combinations

    def first_of_each(overrides: Sequence[Override]) -> list[list[str]]:
        """One run of each method and order, as a setting of some of those is none of the others."""
        groups = ("method=", "task_order=")
        found: dict[tuple[str, ...], list[str]] = {}
        for combination in several(overrides):
            found.setdefault(tuple(word for word in combination if word.startswith(groups)), combination)
        return list(found.values())

    monkeypatch.setattr(sweeper, "combinations", first_of_each)
    # The run that decides on an order is not here.
    monkeypatch.setattr(sweeper, "with_order", lambda config, directory: config)
    for megabytes in ("_stage_mb", "_buffer_mb", "_model_mb"):
        monkeypatch.setattr(sweeper.RunSweeper, megabytes, lambda self, config: None)
    wrong = []
    for command in dict.fromkeys(commands()):
        program, *words = command.words
        own_configs = any(word.startswith("--config-dir") for word in words)
        if (program, words[0]) not in (("python", "train.py"), ("clbench", "run")) or own_configs:
            continue
        configs.clear()
        for file in re.findall(r"=(FILE|[\w/]+\.safetensors)", " ".join(words)):
            (tmp_path / file).touch()
        flags = [] if "--help" in words else ["dry_run=true"]
        if run.main([*words[1:], *flags]) != 0:
            wrong.append(f"{command}: {capsys.readouterr().err}")
        wrong += unsaid(command, configs)
    assert not wrong, "\n".join(wrong)


def unsaid(command: Command, configs: Sequence[Config]) -> list[str]:
    """What a command needs and does not say, a line each."""
    if command.page.name in RUN_AS_WRITTEN:
        return []
    needs = sorted(needed(command.words, configs))
    return [f"{need}: {command}" for need in needs if not re.search(SAID[need], command.needs)]


def check_choices(words: Sequence[str]) -> None:
    """Check that each choice of a group has a file in conf/ or sweeps/."""
    for word in words:
        group, _, choices = word.partition("=")
        folder = ROOT / "sweeps" if group == "sweep" else ROOT / "conf" / group
        if folder.is_dir():
            for choice in choices.split(","):
                assert (folder / f"{choice}.yaml").is_file(), word


def targets() -> set[str]:
    """What `make` can make."""
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def test_commands_within_sentences_name_what_is_there() -> None:
    for page in PAGES:
        for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", page.read_text(encoding="utf-8")):
            words = [
                word for word in text.split() if "=" not in word or word.startswith("--")
            ]  # less variables before it
            match words:
                case ["clbench", name, *_]:
                    assert name in COMMANDS, f"{page}: {text}"
                case ["python", "-m", module, *words]:
                    check_module(module, words)
                case ["make", target, *_]:
                    assert target in targets(), text


def test_commands_that_need_no_mark_are_run_by_a_test() -> None:
    for page, test in RUN_AS_WRITTEN.items():
        assert page in (ROOT / "tests" / test).read_text(encoding="utf-8")


def check_module(module: str, words: Sequence[str]) -> None:
    """Check that `python -m` finds a module of the benchmarks with these names and flags."""
    if module == "pytest":
        assert (ROOT / words[0]).is_file(), words
        return
    package, _, name = module.partition(".")
    assert package == "benchmarks", module
    source = (ROOT / "benchmarks" / f"{name or '__main__'}.py").read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in source, f"{module} {word}"
    if not name:
        assert words[0] in import_module("benchmarks.__main__").NAMES, words


def needed(words: Sequence[str], configs: Sequence[Config]) -> set[str]:
    """What a command needs that a fresh checkout has not, as far as its words and the configs of its runs tell."""
    found = set()
    for config in configs:
        if config.dataset.target != "clbench.data.synthetic.Synthetic":
            found.add("images")
        backbone = config.plain()["backbone"]
        local = backbone["checkpoint"] is not None and not backbone["checkpoint"].startswith("package:")
        takes_one = "backbone" in inspect.signature(class_of(config.method.target)).parameters
        if takes_one and (backbone["pretrained"] or local):
            found.add("weights")
        if not str(config.method.settings.get("teacher") or "package:").startswith("package:"):
            found.add("teacher")
    text = " ".join(words)
    signs = {
        r"dataset\.root=": "images",
        r"launcher=slurm": "cluster",
        r"\bRUN\b": "finished run",
        r"--python ": "anomalib",
        r"--root |--images ": "images",
        r"clbench data get": "network",
        r"test_cuda": "GPU",
    }
    return found | {need for sign, need in signs.items() if re.search(sign, text)}
