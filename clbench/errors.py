"""The one exception for what a person must change."""


class UserError(Exception):
    """A wrong setting, file or machine: the message names the thing, the value and the way out.

    `train.py` prints it as one line, without a traceback, and exits with a status that is not 0.
    """


def in_one_line(error: BaseException) -> str | None:
    """What a person must change, or None where the error is nobody's but ours."""
    cause: BaseException | None = error
    while cause is not None:  # hydra.utils.instantiate wraps what a constructor raises
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    return None
