"""The exception for what a person can put right, and words of messages."""


class UserError(Exception):
    """A wrong setting, file or machine; one line that names the thing, the value and the way out.

    Commands print it without a traceback, and exit with a status other than 0. Line feeds and other signs that
    cannot be printed, which a value may hold, are written as Python writes them in a string: `\\n`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def in_one_line(error: BaseException) -> str | None:
    """The message of the `UserError` that an exception is or was raised from.

    None where there is none: it is a bug.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return None


def described(error: BaseException) -> str:
    """An exception's type, and its whole message in one line where it has one."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, which is in the plural unless it is one: `1 run`, `7 runs`, `2,000 runs`.

    Args:
        plural: where it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
