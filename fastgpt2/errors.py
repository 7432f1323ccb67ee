"""What a user did wrong, said in one line."""


class UserError(ValueError):
    """A mistake in the input (a file, a flag, a configuration) that the user can mend.

    The commands print its message on one line and exit with code 2; library callers catch it as
    the ``ValueError`` it is. Programming errors stay ordinary exceptions with a traceback.
    """
