"""The exception for what a person can put right, and its message."""


class UserError(Exception):
    """A wrong setting, file or machine; one line that names the thing, the value and the way out.

    Commands print it without a traceback, and exit with a status other than 0.
    """


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


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
