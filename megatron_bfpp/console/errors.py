"""The one exception that is shown to users without a traceback. Standard library only."""

import re

__all__ = ["UserError", "shown"]

_LINES, _LETTERS = 3, 600


class UserError(ValueError):
    """A mistake of the user, which a change of the command line or of the environment mends.

    The message has at most three lines: what is wrong, with its numbers; what would be right; which flag to change.
    Entry points print it without a traceback and exit with 2.
    """


def shown(message: object) -> str:
    """What to print of an error, in at most three lines, whatever values from outside stand in it.

    Our own further lines begin with two spaces. Other line ends came with a value, as control characters may have.
    """
    lines = re.sub(r"\n(?!  )", " ", str(message)).split("\n")[:_LINES]
    printable = ("".join(letter if letter.isprintable() else "?" for letter in line) for line in lines)
    return "\n".join(line if len(line) <= _LETTERS else line[:_LETTERS] + " ..." for line in printable)
