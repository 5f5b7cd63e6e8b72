"""The one exception that means "your input, not our fault"."""


class InputError(ValueError):
    """Bad input or usage. The message is one line that names the file, the row and how to mend it.

    The command line prints it without a traceback and exits with code 2.
    """
