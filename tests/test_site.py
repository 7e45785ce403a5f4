"""The documentation site: what it has, and what its check finds. `make docs` builds it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT


def test_the_site_has_every_page_and_every_class() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    outside = {"index.md", "contributing.md", "changelog.md"}  # scripts/site_pages.py
    pages = [page for entry in settings["nav"] for value in entry.values() for page in in_nav(value)]
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) == len(set(pages)) and set(pages) == there | outside
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    for file in ROOT.glob("conf/*/*.yaml"):
        target = re.search(
            r"^_target_: (clbench\.(?:methods|strategies|data)\.\S+)",
            file.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        assert target is None or f"::: {target[1]}\n" in text, file


def in_nav(value: str | list) -> list[str]:
    """The pages below an entry of mkdocs.yml's `nav`."""
    return (
        [value]
        if isinstance(value, str)
        else [page for entry in value for one in entry.values() for page in in_nav(one)]
    )


WHOLE = {
    "index.html": '<a href="api/one.html#here">one</a><img src="a.jpg" alt="words"><a href="https://elsewhere">e</a>',
    "api/one.html": '<h2 id="here">1</h2><a href="../index.html">home</a><a href="#here">up</a>',
    "a.jpg": "",
    "style.css": "a { background: url(a.jpg) }",
}


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("index.html", WHOLE["index.html"], ""),
        ("index.html", '<a href="two.html">2</a>', "two.html leads nowhere"),
        ("index.html", '<a href="api/one.html#there">1</a>', "api/one.html#there leads to no such place"),
        ("index.html", '<img src="b.jpg" alt="words">', "b.jpg leads nowhere"),
        ("index.html", '<img src="a.jpg">', "the picture a.jpg has no words"),
        ("index.html", '<script src="//elsewhere/a.js"></script>', "fetches //elsewhere/a.js"),
        (
            "index.html",
            '<link rel="stylesheet" href="https://elsewhere/a.css">',
            "fetches https://elsewhere/a.css",
        ),
        ("style.css", "a { background: url('https://elsewhere/a.jpg') }", "fetches https://elsewhere/a.jpg"),
    ],
)
def test_the_check_finds_what_is_broken(file: str, text: str, said: str, tmp_path: Path) -> None:
    for name, content in {**WHOLE, file: text}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    check = [sys.executable, ROOT / "scripts/check_site.py", tmp_path]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == (f"{file}: {said}" if said else "")
    assert done.returncode == (1 if said else 0) and not done.stderr
