"""The one exception for what a person must change."""


class UserError(Exception):
    """A wrong setting, file or machine: the message names the thing, the value and the way out.

    `train.py` prints it as one line, without a traceback, and exits with a status that is not 0.
    """
