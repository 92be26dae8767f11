"""The one exception that means "your input is wrong", as opposed to "hpetr is wrong"."""


class InputError(ValueError):
    """Bad input from the user: one line that names the file, the field and what was expected.

    The command line prints it and ends with exit code 2.

    Attributes:
        alone: of several processes only this one has the error; otherwise all have the same.
    """

    alone = False
