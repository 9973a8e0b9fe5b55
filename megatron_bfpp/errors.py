"""The error that stands for a mistake of the user."""


class UserError(ValueError):
    """A mistake of the user, not of the program.

    The message has at most three lines: what is wrong with its numbers, what would be right, and the flag to change.
    Entry points print it without a traceback and exit with 2.
    """
