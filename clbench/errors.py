"""The one exception for what a person must change."""


class UserError(Exception):
    """A wrong setting, file or machine: the message names the thing, the value and the way out.

    `train.py` prints it as one line, without a traceback, and exits with a status that is not 0.
    """


def in_one_line(error: BaseException) -> str | None:
    """The message of the `UserError` that an error is or was raised from; None where the fault is the program's."""
    cause: BaseException | None = error
    while cause is not None:  # hydra.utils.instantiate wraps what a constructor raises
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, the name of its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
