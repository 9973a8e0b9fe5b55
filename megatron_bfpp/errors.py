"""The one exception that is shown to users without a traceback. Standard library only."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake of the user, which a change of the command line or of the environment mends.

    The message has at most three lines: what is wrong, with its numbers; what would be right; which flag to change.
    Entry points print it without a traceback and exit with 2.
    """
