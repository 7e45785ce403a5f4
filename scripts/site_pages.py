"""Hooks of MkDocs: the pages of the site that lie beside docs/, at the top of the repository.

mkdocs.yml names this file. The README is the home page; links are written for the repository, and turned here.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages of `PAGES` to those of docs/."""
    for name, page in PAGES.items():
        file = Path(config.config_file_path).parent / name
        files.append(File.generated(config, page, content=as_in_docs(file.read_text(encoding="utf-8"))))
    return files


def as_in_docs(text: str) -> str:
    """A page of the repository's top with its links as a page of docs/ has them."""
    for name, page in PAGES.items():
        text = text.replace(f"]({name}", f"]({page}")
    return re.sub(r"\]\(docs/", "](", text)
