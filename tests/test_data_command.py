"""clbench data get: downloads that break, lie and stall; archives that should not be trusted."""

import errno
import hashlib
import io
import os
import shutil
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from clbench.cli import main
from clbench.data.acquire import disk, download, published
from clbench.data.acquire.checksums import BadArchive, checksum, pin, pinned, verify
from clbench.data.acquire.download import address, fetch
from clbench.data.acquire.unpack import unpack
from clbench.errors import UserError

CONTENT = np.random.default_rng(0).integers(0, 255, 300_000, dtype=np.uint8).tobytes()


def ignore(done: int, total: int | None) -> None:
    """No progress is watched here."""


class Server:
    """Serves one file, as badly as told."""

    def __init__(self) -> None:
        self.content, self.etag = CONTENT, '"1"'
        self.ranges: list[str | None] = []  # that were asked for
        self.breaks = 0  # how many answers end in the middle
        self.never_whole = False  # who asks for all gets half
        self.stalls = 0  # how many answers stop in the middle, and wait
        self.ignores_range = False
        self.length: int | None = None  # that is said, where it is a lie
        self.chunked = False
        self.type = "application/octet-stream"
        self.statuses: list[int] = []  # of the next answers, where they are errors
        self.garbage = b""  # in place of an answer
        self.location: str | None = None  # that is redirected to
        self.part: str | None = None  # the Content-Range that is said, where it is a lie
        self.more = b""  # after the part that was asked for
        self.size: int | None = None  # that is said where nothing comes after, where it is a lie

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if self.statuses:
            return request.send_error(self.statuses.pop(0))
        if self.garbage:
            request.wfile.write(self.garbage)
            return None
        if self.location:
            request.send_response(302)
            request.send_header("Location", self.location)
            request.send_header("Content-Length", "0")
            return request.end_headers()
        begin = 0
        if_range = request.headers.get("If-Range", self.etag)
        if asked and not self.ignores_range and if_range == self.etag:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(self.content) or self.size:
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{self.size or len(self.content)}")
                request.send_header("Content-Length", "0")
                return request.end_headers()
            request.send_response(206)
            part = f"bytes {begin}-{len(self.content) - 1}/{len(self.content)}"
            request.send_header("Content-Range", self.part or part)
        else:
            request.send_response(200)
        body = self.content[begin:] + (self.more if begin else b"")
        if self.etag:
            request.send_header("ETag", self.etag)
        request.send_header("Content-Type", self.type)
        if not self.chunked:
            request.send_header("Content-Length", str(len(body) if self.length is None else self.length))
        request.end_headers()
        if self.never_whole and not begin:
            request.wfile.write(body[: len(body) // 2])
        elif self.breaks or self.stalls:  # counted before the other side can see it
            stalls = self.stalls > 0
            self.stalls, self.breaks = self.stalls - stalls, self.breaks - (not stalls)
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if stalls:
                time.sleep(0.5)
        else:
            request.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.01)
    monkeypatch.setattr(download, "_TIMEOUT_S", 10)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    behaviour = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            behaviour.answer(self)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield behaviour, f"http://127.0.0.1:{http.server_port}/a.zip"
        http.shutdown()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".part" in path.name or path.name.startswith("."))


# Downloads


def test_a_download_that_breaks_off_goes_on_from_there(server: tuple[Server, str], tmp_path: Path) -> None:
    behaviour, url = server
    behaviour.breaks = 3
    told: list[tuple[int, int | None]] = []
    fetch(url, tmp_path / "a.zip", lambda done, total: told.append((done, total)))
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and not leftovers(tmp_path)
    assert behaviour.ranges == [None, "bytes=150000-", "bytes=225000-", "bytes=262500-"]
    assert told[-1] == (len(CONTENT), len(CONTENT)) and told == sorted(told)


def test_a_stalled_download_goes_on_too(
    server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour, url = server
    behaviour.stalls = 1
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.2)
    fetch(url, tmp_path / "a.zip", ignore)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and behaviour.ranges[:2] == [None, "bytes=150000-"]


def test_the_next_command_goes_on_where_the_last_gave_up(server: tuple[Server, str], tmp_path: Path) -> None:
    behaviour, url = server
    behaviour.breaks = 1

    def interrupted(done: int, total: int | None) -> None:
        if done >= 150_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(url, tmp_path / "a.zip", interrupted)
    behaviour.breaks = 0
    kept = (tmp_path / "a.zip.part").stat().st_size
    assert kept >= 150_000 and not (tmp_path / "a.zip").exists()
    fetch(url, tmp_path / "a.zip", ignore)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and behaviour.ranges[1] == f"bytes={kept}-"


@pytest.mark.parametrize("etag", ['"1"', ""])
def test_a_server_that_ignores_ranges_is_asked_for_the_whole(
    server: tuple[Server, str], tmp_path: Path, etag: str
) -> None:
    behaviour, url = server
    behaviour.ignores_range, behaviour.breaks, behaviour.etag = True, 2, etag
    fetch(url, tmp_path / "a.zip", ignore)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ['"2"', ""])
def test_a_file_that_changed_is_begun_again(server: tuple[Server, str], tmp_path: Path, etag: str) -> None:
    behaviour, url = server
    if not etag:
        behaviour.etag = ""  # the size alone tells
    behaviour.breaks = 1

    def change(done: int, total: int | None) -> None:
        behaviour.content, behaviour.etag = CONTENT[::-1] + b"!", etag

    fetch(url, tmp_path / "a.zip", change)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT[::-1] + b"!"


def test_a_part_that_is_whole_already_is_taken(server: tuple[Server, str], tmp_path: Path) -> None:
    behaviour, url = server

    def killed(done: int, total: int | None) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(url, tmp_path / "a.zip", killed)
    fetch(url, tmp_path / "a.zip", ignore)  # nothing comes after what is here
    assert (tmp_path / "a.zip").read_bytes() == CONTENT and behaviour.ranges == [None, "bytes=300000-"]


@pytest.mark.parametrize(
    "lie", [{"part": "bytes nonsense"}, {"part": "bytes 0-9/300000"}, {"more": b"extra"}, {"size": 150_000}]
)
def test_a_server_that_never_goes_on_rightly_is_given_up(
    server: tuple[Server, str], tmp_path: Path, lie: dict[str, object]
) -> None:
    behaviour, url = server
    vars(behaviour).update(lie, never_whole=True)
    with pytest.raises(UserError, match=r"is another file, or another part of it, each time: download it by"):
        fetch(url, tmp_path / "a.zip", ignore)
    assert behaviour.ranges.count(None) == 5 and not list(tmp_path.glob("*.part"))


def test_what_was_begun_and_said_too_large_is_begun_again(server: tuple[Server, str], tmp_path: Path) -> None:
    behaviour, url = server
    behaviour.length, behaviour.ignores_range = len(CONTENT) + 100, True  # a lie: it ends before
    with pytest.raises(
        UserError, match=r"ended after 300,000 of 300,100 bytes.*go on from 300.0 kB, or download"
    ):
        fetch(url, tmp_path / "b.zip", ignore)
    behaviour.length, behaviour.ignores_range = None, False
    fetch(url, tmp_path / "b.zip", ignore)  # of the size that was said, there was nothing to go on from
    assert (tmp_path / "b.zip").read_bytes() == CONTENT and behaviour.ranges[-2:] == ["bytes=300000-", None]


def test_a_length_that_is_too_small_gives_a_file_that_is_refused(
    server: tuple[Server, str], tmp_path: Path
) -> None:
    behaviour, url = server
    behaviour.length = 1000
    fetch(url, tmp_path / "a.zip", ignore)
    assert checksum(tmp_path / "a.zip", ignore) == hashlib.sha256(CONTENT[:1000]).hexdigest()


def test_a_server_that_gives_no_length_is_believed(server: tuple[Server, str], tmp_path: Path) -> None:
    behaviour, url = server
    behaviour.chunked = True
    fetch(url, tmp_path / "a.zip", ignore)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT


def test_errors_say_what_to_do(
    server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviour, url = server
    by_hand = r"download it by hand to \S*/a.zip and repeat the command, or give .*--url"
    behaviour.statuses = [404]
    with pytest.raises(UserError, match=rf"a.zip answers 404 Not Found: {by_hand}"):
        fetch(url, tmp_path / "a.zip", ignore)
    assert len(behaviour.ranges) == 1  # once is enough
    behaviour.location = url
    with pytest.raises(UserError, match=rf"^\S*a.zip answers 302 .* an infinite loop: {by_hand}[^\n]*$"):
        fetch(url, tmp_path / "a.zip", ignore)
    for behaviour.location in ("http://[bad", "http://ü..com/x"):
        with pytest.raises(UserError, match=rf"a.zip leads to no address \(.*\): {by_hand}"):
            fetch(url, tmp_path / "a.zip", ignore)
    behaviour.location = None
    behaviour.garbage = b"garbage\r\n\r\n"
    with pytest.raises(UserError, match=rf"^\S*a.zip cannot be downloaded \(garbage\): {by_hand}[^\n]*$"):
        fetch(url, tmp_path / "a.zip", ignore)
    behaviour.garbage = b""
    behaviour.statuses = [503, 500]  # twice is bad luck
    fetch(url, tmp_path / "a.zip", ignore)
    behaviour.statuses = [503] * 5
    with pytest.raises(UserError, match=rf"a.zip answers 503 .*: {by_hand}"):
        fetch(url, tmp_path / "a.zip", ignore)
    behaviour.stalls, behaviour.content = 99, CONTENT[:8]
    with monkeypatch.context() as patient:
        patient.setattr(download, "_TIMEOUT_S", 0.1)
        with pytest.raises(
            UserError, match=r"timed out.*repeat the command to go on from 7 bytes, or download"
        ):
            fetch(url, tmp_path / "a.zip", ignore)
    behaviour.stalls, behaviour.type = 0, "text/html; charset=utf-8"
    with pytest.raises(UserError, match="is a web page, not an archive; the link may be out of date"):
        fetch(url, tmp_path / "a.zip", ignore)
    with pytest.raises(UserError, match=rf"cannot be downloaded \(.*refused.*\): {by_hand}"):
        fetch("http://127.0.0.1:9/a.zip", tmp_path / "c" / ".." / "a.zip", ignore)
    with pytest.raises(UserError, match="--url=file:///etc/passwd is no address"):
        fetch("file:///etc/passwd", tmp_path / "a.zip", ignore)


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://ü..com/x", f"http://{'a' * 64}.com/x", "http:///x", "http://a:99999/x", "a.zip"],
)
def test_what_is_no_address_is_refused(url: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["data", "get", "mpdd", "--root", str(tmp_path), "--accept-licence", "--url", url]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert f"--url={url} is no address to download from" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://ü.de:80/fü r.tar?q=%20&k=ö", "http://xn--tda.de:80/f%C3%BC%20r.tar?q=%20&k=%C3%B6"),
        ("https://[::1]:8/a+b~(1).zip?X=a%2Fb/c==", "https://[::1]:8/a+b~(1).zip?X=a%2Fb/c=="),
    ],
)
def test_addresses_are_quoted_where_they_have_to_be(url: str, sent: str) -> None:
    assert address(url) == address(address(url)) == sent


def test_a_disk_without_room_is_told_before(
    server: tuple[Server, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"the archive needs 300.0 kB, but \S+ has 1.0 kB left.*--root"):
        fetch(server[1], tmp_path / "a.zip", ignore)


def test_a_disk_that_fills_up_is_not_taken_for_a_broken_connection(
    server: tuple[Server, str], tmp_path: Path
) -> None:
    (tmp_path / "a.zip.part").symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"cannot write \S+a.zip.part \(No space left on device\): free space"
    ):
        fetch(server[1], tmp_path / "a.zip", ignore)
    assert len(server[0].ranges) == 1  # another try would find it as full


# Checksums


def test_without_a_published_checksum_the_first_download_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    assert "no checksum is published: that of this first download will be kept in" in verify(path, "1f", None)
    assert pinned(path) is None
    pin(path, "1f")
    assert (tmp_path / "a.zip.sha256").read_text() == "1f  a.zip\n" and pinned(path) == "1f"
    assert "checksum is as in" in verify(path, "1f", None)
    with pytest.raises(BadArchive, match=r"is in \S+a.zip.sha256: it was damaged.* with --sha256=2f"):
        verify(path, "2f", None)
    assert "checksum is as expected" in verify(path, "2f", "2F")


# Archives


def make_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members:
            file.writestr(name, data)
    return path


def make_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_archives_are_unpacked_whatever_their_name(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "archive"
    if mode == "zip":
        make_zip(path, ("a/", b""), ("a/b/c.txt", b"hello"))
    else:
        make_tar(path, (tar_info("a", tarfile.DIRTYPE), b""), (tar_info("./a/b/c.txt"), b"hello"), mode=mode)
    unpack(path, tmp_path / "out", ignore)
    assert (tmp_path / "out/a/b/c.txt").read_text() == "hello" and not leftovers(tmp_path)


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


OUT = "leads out of its folder: do not trust it"
EVIL: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zip, up": (lambda path: make_zip(path, ("a.txt", b"1"), ("../evil", b"2")), OUT),
    "zip, deep up": (lambda path: make_zip(path, ("a/../../evil", b"2")), OUT),
    "zip, absolute": (lambda path: make_zip(path, ("/tmp/evil", b"2")), OUT),
    "zip, backslashes": (lambda path: make_zip(path, ("..\\evil", b"2")), OUT),
    "zip, drive": (lambda path: make_zip(path, ("C:/evil", b"2")), OUT),
    "zip, link": (lambda path: make_zip(path, (link("a"), b"/etc")), "a link or device"),
    "tar, up": (lambda path: make_tar(path, (tar_info("../evil"), b"2")), OUT),
    "tar, absolute": (lambda path: make_tar(path, (tar_info("/tmp/evil"), b"2")), OUT),
    "tar, link": (
        lambda path: make_tar(path, (tar_info("a", tarfile.SYMTYPE, ".."), b""), (tar_info("a/evil"), b"2")),
        "holds 'a', a link or device",
    ),
    "tar, hard link": (
        lambda path: make_tar(path, (tar_info("a", tarfile.LNKTYPE, "/etc/passwd"), b"")),
        "link or device",
    ),
    "tar, device": (lambda path: make_tar(path, (tar_info("a", tarfile.CHRTYPE), b"")), "link or device"),
    "tar, pipe": (lambda path: make_tar(path, (tar_info("a", tarfile.FIFOTYPE), b"")), "link or device"),
    "empty": (lambda path: make_zip(path), "archive is empty"),
}


@pytest.mark.parametrize("case", EVIL)
def test_an_archive_that_reaches_out_is_refused_whole(tmp_path: Path, case: str) -> None:
    build, message = EVIL[case]
    inside = tmp_path / "inside"
    inside.mkdir()
    archive = build(inside / "archive")
    with pytest.raises(BadArchive, match=message):
        unpack(archive, inside / "out", ignore)
    assert [path.name for path in inside.iterdir()] == ["archive"]
    assert [path.name for path in tmp_path.iterdir()] == ["inside"] and not Path("/tmp/evil").exists()


@pytest.mark.parametrize("kind", ["zip", "w", "w:gz", "w:xz", "text"])
def test_a_damaged_archive_is_refused_whole(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive"
    if kind == "zip":
        make_zip(archive, ("a", CONTENT))
    elif kind == "text":
        archive.write_text("<html>")
    else:
        make_tar(archive, (tar_info("a"), CONTENT), mode=kind)
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2] if kind != "zip" else data.replace(CONTENT[:9], b"123456789"))
    (tmp_path / ".out.unpacking").mkdir()  # of a process that was killed
    with pytest.raises(BadArchive, match="archive is damaged"):
        unpack(archive, tmp_path / "out", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a/b"], "holds 'a/b', which conflicts with another name in it: remove it, and"),
        (["a", "a/b/c"], "which conflicts with another name in it: remove it, and"),
        (["a/b", "a"], "holds 'a', which conflicts with another name in it: remove it, and"),
        (["x" * 300], "holds 'x+', a name too long for this disk: remove it, and"),
    ],
)
def test_names_that_the_disk_does_not_take_are_not_for_want_of_space(
    tmp_path: Path, names: list[str], message: str
) -> None:
    archive = make_tar(tmp_path / "archive", *((tar_info(name), b"1") for name in names))
    with pytest.raises(UserError, match=message):
        unpack(archive, tmp_path / "out", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "free space there"), (errno.EACCES, "mend that, or give another")]
)
def test_what_the_disk_refuses_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    archive = make_tar(tmp_path / "archive", (tar_info("a"), b"1"))
    monkeypatch.setattr(tarfile, "copyfileobj", refuse)
    with pytest.raises(UserError, match=rf"cannot be unpacked to \S+ \({os.strerror(number)}\): {message}"):
        unpack(archive, tmp_path / "out", ignore)


def test_an_archive_with_a_password_is_not_damaged(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "archive", ("a", b"1"))
    data = bytearray(archive.read_bytes())
    data[6] |= 1  # the flag in the file's header, and in the directory
    data[data.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(data)
    with pytest.raises(UserError, match="encrypted.*: unpack it by hand to"):
        unpack(archive, tmp_path / "out", ignore)


def test_a_python_whose_tarfile_cannot_be_trusted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_tar(tmp_path / "archive", (tar_info("a"), b"1"))
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(UserError, match=r"no safe tarfile: 3.10.12, 3.11.4 or a later.*unpack it by hand to"):
        unpack(archive, tmp_path / "out", ignore)
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_backslashes_in_names_are_folders(tmp_path: Path, kind: str) -> None:
    archive = tmp_path / "archive"
    make_zip(archive, ("a\\b", b"1")) if kind == "zip" else make_tar(archive, (tar_info("a\\b"), b"1"))
    unpack(archive, tmp_path / "out", ignore)
    assert (tmp_path / "out/a/b").read_bytes() == b"1"


# The command


@pytest.fixture
def archive() -> bytes:
    """A zip of a BTAD of one category, in a folder of its own, as the real one is."""
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in ("train/ok/0", "train/ok/1", "test/ok/0", "test/ko/0", "ground_truth/ko/0"):
            picture = cv2.imencode(".png", random.integers(1, 255, (16, 16, 3), dtype=np.uint8))[1]
            file.writestr(f"BTech_Dataset_transformed/01/{name}.png", picture.tobytes())
    return buffer.getvalue()


@pytest.fixture
def btad(
    server: tuple[Server, str], archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> tuple[Server, published.Published]:
    """The server has it, and its entry says so."""
    behaviour, url = server
    behaviour.content = archive
    sha256 = hashlib.sha256(archive).hexdigest()
    entry = replace(published.named("btad"), url=url, sha256=sha256)
    monkeypatch.setitem(published.datasets(), "btad", entry)
    return behaviour, entry


def test_get_downloads_checks_unpacks_and_says_how_to_go_on(
    btad: tuple[Server, published.Published], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    btad[0].breaks = 2
    words = ["data", "get", "btad", "--root", str(tmp_path / "new" / "data")]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "BTAD is under CC BY-NC-SA 4.0" in said.out and "give --accept-licence" in said.err
    assert not btad[0].ranges and not (tmp_path / "new").exists()
    assert main([*words, "--accept-licence"]) == 0
    root = tmp_path / "new" / "data" / "btad" / "BTech_Dataset_transformed"
    said = capsys.readouterr()
    assert "its SHA-256 checksum is as expected" in said.out
    assert f"clbench run dataset=btad dataset.root={root}" in said.out
    assert [path.name for path in root.parents[1].iterdir()] == ["btad"]
    assert main(["data", "check", str(root)]) == 0
    assert main(words) == 0 and "is there already" in capsys.readouterr().out


def test_get_asks_on_a_terminal(
    btad: tuple[Server, published.Published], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data", "get", "btad", "--root", str(tmp_path), "--keep-archive"]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert main(words) == 1 and not btad[0].ranges
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(words) == 0 and (tmp_path / "btad.zip").exists()


def test_get_refuses_other_bytes_and_forgets_them(
    btad: tuple[Server, published.Published], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    behaviour, entry = btad
    behaviour.content = archive + b"more"
    words = ["data", "get", "btad", "--root", str(tmp_path), "--accept-licence"]
    assert main(words) == 1
    assert f"but {entry.sha256} is expected" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main([*words, "--sha256", hashlib.sha256(behaviour.content).hexdigest().upper()]) == 0


def test_get_takes_an_archive_that_was_downloaded_by_hand(
    btad: tuple[Server, published.Published], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "btad.zip").write_bytes(archive[:-1])
    assert main(["data", "get", "btad", "--root", str(tmp_path)]) == 1
    assert "is expected" in capsys.readouterr().err and (tmp_path / "btad.zip").exists()
    (tmp_path / "btad.zip").write_bytes(archive)
    assert main(["data", "get", "btad", "--root", str(tmp_path)]) == 0 and not btad[0].ranges


def test_get_of_what_needs_a_form_says_where_to_go_and_takes_its_link(
    server: tuple[Server, str], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name, page in (("mvtec", "mvtec.com"), ("real_iad", "huggingface.co"), ("mpdd", "stepanje/MPDD")):
        assert main(["data", "get", name, "--root", str(tmp_path)]) == 1
        error = capsys.readouterr().err
        assert "cannot be had from a plain address" in error and page in error and str(tmp_path) in error
    behaviour, url = server
    behaviour.content = archive
    assert main(["data", "get", "mpdd", "--root", str(tmp_path), "--url", url, "--accept-licence"]) == 0
    assert (tmp_path / "mpdd/BTech_Dataset_transformed").is_dir() and (tmp_path / "a.zip.sha256").exists()


@pytest.fixture
def mpdd(server: tuple[Server, str], archive: bytes, tmp_path: Path) -> tuple[Server, list[str]]:
    """The server has what the command asks for, of which no checksum is published."""
    behaviour, url = server
    behaviour.content = archive
    return behaviour, ["data", "get", "mpdd", "--root", str(tmp_path), "--accept-licence", "--url", url]


def test_a_bad_download_without_a_known_checksum_is_forgotten(
    mpdd: tuple[Server, list[str]], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    behaviour, words = mpdd
    behaviour.content = archive[: len(archive) // 2]
    assert main(words) == 1
    assert (
        "is damaged" in (error := capsys.readouterr().err) and "; it was removed: download it again" in error
    )
    assert not list(tmp_path.iterdir())
    behaviour.content = archive
    assert main(words) == 0
    assert (tmp_path / "a.zip.sha256").read_text() == f"{hashlib.sha256(archive).hexdigest()}  a.zip\n"


def test_a_damaged_archive_that_was_put_there_is_left_and_named(
    mpdd: tuple[Server, list[str]], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(archive[: len(archive) // 2])
    assert main(mpdd[1]) == 1
    assert f"{path} is damaged" in (error := capsys.readouterr().err) and "; remove it, and" in error
    assert [inside.name for inside in tmp_path.iterdir()] == ["a.zip"]


def test_a_download_unlike_the_first_is_kept_until_one_is_told(
    mpdd: tuple[Server, list[str]], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pin(tmp_path / "a.zip", "1f")
    assert main(mpdd[1]) == 1
    found = hashlib.sha256(archive).hexdigest()
    assert f"but 1f is in {tmp_path}/a.zip.sha256" in (error := capsys.readouterr().err)
    assert f"--sha256={found}; remove it, and download it again" in error
    assert (tmp_path / "a.zip").read_bytes() == archive
    assert main([*mpdd[1], "--sha256", found]) == 0 and pinned(tmp_path / "a.zip") == found


def test_the_wrong_archive_is_not_remembered_and_its_folder_is_named(
    mpdd: tuple[Server, list[str]], archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    mpdd[0].content = make_zip(tmp_path / "other.zip", ("a", b"1")).read_bytes()
    assert main(mpdd[1]) == 1
    assert f"{tmp_path}/mpdd has the layout of no dataset that is known: remove it" in capsys.readouterr().err
    assert not (tmp_path / "a.zip.sha256").exists()
    shutil.rmtree(tmp_path / "mpdd")
    mpdd[0].content = archive
    assert main(mpdd[1]) == 0


def test_an_archive_may_be_called_what_its_folder_is(
    mpdd: tuple[Server, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [*mpdd[1][:-1], mpdd[1][-1].replace("a.zip", "mpdd")]
    (tmp_path / "mpdd").write_text("")
    assert main(words) == 1 and f"{tmp_path}/mpdd is a file" in capsys.readouterr().err
    (tmp_path / "mpdd").unlink()
    assert main([*words, "--keep-archive"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mpdd", "mpdd.archive", "mpdd.archive.sha256"]


def test_an_address_that_is_not_ascii_is_asked_for_as_the_web_has_it(
    mpdd: tuple[Server, list[str]], tmp_path: Path
) -> None:
    assert main([*mpdd[1][:-1], mpdd[1][-1].replace("a.zip", "fü r.tar")]) == 0
    assert (tmp_path / "f%C3%BC%20r.tar.sha256").exists()


# Checks


def unzip(archive: bytes, folder: Path) -> Path:
    zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
    return folder / "BTech_Dataset_transformed"


def test_check_lists_what_cannot_be_read_and_goes_on(
    archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = unzip(archive, tmp_path)
    good = root / "01" / "train" / "ok"
    (good / "2.png").symlink_to("nowhere")
    (good / "3.png").symlink_to("3.png")
    os.mkfifo(good / "4.png")
    (good / "5.png").symlink_to("4.png")
    assert main(["data", "check", str(root)]) == 1
    told = capsys.readouterr().out
    assert f"cannot read image file {good}/2.png: No such file" in told and "4 wrong" in told
    assert f"cannot read image file {good}/3.png: Too many levels of symbolic links" in told
    for name in ("4.png", "5.png"):
        assert f"{good}/{name} is truncated, corrupt or no image (a pipe, socket or device)" in told


def test_check_hints_at_the_folder_above_and_at_no_other(
    archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = unzip(archive, tmp_path / "btad")
    (tmp_path / "empty").mkdir()
    assert main(["data", "check", str(root / "01" / "test")]) == 1
    assert "say which it is with --dataset" in capsys.readouterr().err
    assert main(["data", "check", str(root / "01")]) == 1
    assert f"; {root} is BTAD: check that" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "empty")]) == 1
    assert "btad" not in (error := capsys.readouterr().err) and "say which it is with --dataset" in error


def test_check_tells_of_the_datasets_it_leaves_out(
    archive: bytes, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    first, second = unzip(archive, tmp_path / "a"), unzip(archive, tmp_path / "b")
    (tmp_path / "c").mkdir()
    assert main(["data", "check", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert (
        f"{first}: dataset=btad" in told
        and f"note: there are more folders like datasets, not checked: {second}\n" in told
    )
    assert main(["data", "check", str(first)]) == 0 and "not checked" not in capsys.readouterr().out
    (second / "01" / "test" / "good").mkdir()
    (second / "01" / "train" / "ok").rename(second / "01" / "train" / "good")
    shutil.rmtree(second / "01" / "test" / "ok")
    main(["data", "check", str(tmp_path), "--dataset", "mvtec"])
    assert f"{second}: dataset=mvtec" in capsys.readouterr().out


def test_list_has_all_with_licence_and_where_from(capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "list"]) == 0
    told = capsys.readouterr().out
    for entry in published.datasets().values():
        assert f"{entry.name}: {entry.title}, " in told and entry.licence in told and entry.page in told
    assert "clbench data get visa" in told and "clbench data get mvtec\n" not in told
