"""Whether a built site is whole: links and their anchors lead somewhere, pictures have words, nothing is fetched from elsewhere.

python scripts/check_site.py site    # what is wrong, a line each; the exit status is 1 then
"""

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself: tag -> attribute. Links that a reader follows may lead elsewhere.
FETCHED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}
_NOT_FETCHED = {"canonical", "next", "prev", "alternate"}  # kinds of <link>


class Page(HTMLParser):
    """What a page refers to.

    Attributes:
        names: ids and names of its elements: what a link's #anchor leads to.
        links: targets of links.
        fetched: what a browser fetches to show it.
        without_words: sources of pictures that have no text in their place.
    """

    def __init__(self, text: str):
        super().__init__()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.without_words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.names |= {given[key] for key in ("id", "name") if key in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given and given.get("rel") not in _NOT_FETCHED:
            self.fetched.append(given[FETCHED[tag]])
        if tag == "img" and not given.get("alt"):
            self.without_words.append(given.get("src", ""))


def problems(site: Path) -> Iterator[str]:
    """What is wrong with the site in a folder, a line each."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    if not pages:
        yield f"{site} has no pages: build it first (make docs)"
    for path, page in pages.items():
        where = path.relative_to(site)
        for target in page.fetched:
            if urlsplit(target).netloc:
                yield f"{where}: fetches {target}"
        for target in (*page.links, *page.fetched):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if parts.path.startswith("/") or not file.is_file():
                if where.name != "404.html":  # which a server shows at any address
                    yield f"{where}: {target} leads nowhere"
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].names:
                yield f"{where}: {target} leads to no such place"
        for source in page.without_words:
            yield f"{where}: the picture {source} has no words"
    for path in sorted(site.rglob("*.css")):
        for target in re.findall(r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)", path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: fetches {target}"


def main() -> int:
    """Print what is wrong with the site that the command line names."""
    (folder,) = sys.argv[1:]
    found = list(problems(Path(folder).resolve()))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
