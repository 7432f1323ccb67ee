"""Errors that become one line: a user's mistake, a signal, another process's failure."""

from signal import Signals


class UserError(ValueError):
    """A mistake in the input (a file, a flag, a configuration) that the user can mend.

    The commands print its message on one line and exit with code 2; library callers catch it as
    the ``ValueError`` it is. Programming errors stay ordinary exceptions with a traceback.
    """


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end; it cleans up, as after Ctrl-C.

    Args:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(Signals(number).name)
        # the exit code that a shell reports for a process ended by a signal
        self.exit_code = 128 + number


class EndedElsewhere(Exception):
    """Another process of the job has failed and says why; this one ends in silence.

    Args:
        exit_code: the other process's exit code.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another process of the job has failed with exit code {exit_code}")
        self.exit_code = exit_code


class FileChangedError(UserError, OSError):
    """A file is not what it was when it was opened, so that nothing more is read from it.

    An ``OSError`` too: what has been computed from the file before is sound, and can be saved.
    """
