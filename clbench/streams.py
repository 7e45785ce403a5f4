"""Standard streams that can always be printed to: what cannot be shown changes no result and no status.

Imports nothing but the standard library, so that a command can prepare itself before it does anything else.
"""

import codecs
import errno
import io
import locale
import os
import select
import sys
from contextlib import suppress
from typing import Any


def begin() -> None:
    """Prepare the process of a command; to be called before any file is opened.

    Where the locale is not UTF-8, the process starts itself again in Python's UTF-8 mode, as the processes that it
    starts do then too: names of files and the text in files are the same whatever the locale. What is printed is
    still in the locale's own encoding.
    """
    _occupy()
    if not _is_utf8(sys.getfilesystemencoding()) or not _is_utf8(locale.getpreferredencoding(False)):
        os.environ["PYTHONUTF8"] = "1"
        os.environ.setdefault("PYTHONIOENCODING", locale.getpreferredencoding(False))
        with suppress(OSError):
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    secure()


def secure() -> None:
    """Have this process' own standard output and error take everything, whatever becomes of it.

    Characters that the encoding lacks are replaced; a closed stream, a pipe whose reader has ended and a full disk
    swallow what is printed. Streams that others have put in their place are left as they are.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when the process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and not isinstance(_raw(stream), _Forgiving):
            secured = _forgiving(number, stream)
            setattr(sys, name, secured)
            setattr(sys, f"__{name}__", secured)


def lost() -> OSError | None:
    """Why some of what was printed to standard output is lost; None where nothing is, or nobody wanted it."""
    raw = _raw(sys.stdout)
    if not isinstance(raw, _Forgiving):
        return None
    sys.stdout.flush()
    return raw.lost


class _Forgiving(io.FileIO):
    """An open file that takes everything.

    Attributes:
        lost: the first error of writing that is no reader's having seen enough; None where there was none.
    """

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write what can be written, and pass over what cannot."""
        try:
            while (written := super().write(data)) is None:  # others made it non-blocking, and it is full
                select.select([], [self], [])
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = self.lost or error
            return len(data)
        return written


def _forgiving(number: int, stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream as the given one, on the descriptor with this number, that never raises."""
    raw = _Forgiving(number, "wb", closefd=False)
    with suppress(OSError, ValueError):
        stream.flush()
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
        encoding=stream.encoding,
        errors="backslashreplace" if stream.errors == "backslashreplace" else REPLACED,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _raw(stream: Any) -> Any:
    """The open file behind a text stream; None where there is none."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def _occupy() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    The next file to be opened would get its number, and be printed into.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(opened, True)


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "utf-8"


def _replaced(error: UnicodeError) -> tuple[bytes, int]:
    """A question mark for each character that an encoding lacks; bytes of a file's name that are no text as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    left_over = map(ord, error.object[error.start : error.end])
    return bytes(code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0x3F for code in left_over), error.end


REPLACED = "clbench.replaced"
codecs.register_error(REPLACED, _replaced)
