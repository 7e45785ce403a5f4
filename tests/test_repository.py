"""The files around the code say what the code says: versions, checks, what an issue is asked for."""

import re

import pytest
import yaml
from conftest import ROOT

from clbench.cli import COMMANDS, main


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_a_commit_is_checked_as_make_lint_does() -> None:
    recipe = re.search(r"^lint: .*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)
    assert recipe
    lint = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    hooks = [
        hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]
    ]
    assert [hook["entry"] for hook in hooks] == lint
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_a_public_host_runs_what_decides() -> None:
    steps = yaml.safe_load(read(".github/workflows/ci.yml"))["jobs"]["ci"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


@pytest.mark.parametrize("name", ["bug", "proposal"])
def test_an_issue_comes_with_config_version_and_command(name: str) -> None:
    fields = {
        field["id"]: field for field in yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{name}.yml"))["body"]
    }
    assert "config.yaml of the run directory" in fields["config"]["attributes"]["label"]
    assert fields["version"]["validations"]["required"] and fields["command"]["validations"]["required"]


def test_versions_agree() -> None:
    found = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)
    assert found
    assert yaml.safe_load(read("CITATION.cff"))["version"] == found[1]
    headings = re.findall(r"^## \[(.+)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == found[1]


def test_no_text_names_a_command_that_is_gone() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"))}
    texts |= {path: path.read_text(encoding="utf-8") for path in ROOT.glob("conf/**/*.yaml")}
    for path, text in texts.items():
        for module in re.findall(r"python -m (clbench[\w.]*)", text):
            if path.name != "CHANGELOG.md":  # which says what they are called now
                assert '__name__ == "__main__"' in read(f"{module.replace('.', '/')}.py"), path
        for command in re.findall(r"^\$ clbench (\w+)", text, re.MULTILINE):
            assert command in COMMANDS, path


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "run"])
def test_every_command_says_what_it_takes(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"usage: clbench {name}" in capsys.readouterr().out
