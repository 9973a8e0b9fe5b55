"""The one exception that is shown to users without a traceback. Standard library only."""

import importlib.util
import re

__all__ = ["UserError", "require", "shown"]

_LINES, _LETTERS = 3, 600
# Extras of this package that bring an optional library; any other library is installed under its own name.
_EXTRAS = {"matplotlib": "report", "scipy": "report", "transformer_engine": "te", "wandb": "wandb"}
_PACKAGES = {"megatron": "megatron-core", "yaml": "PyYAML"}


class UserError(ValueError):
    """A mistake of the user, which a change of the command line or of the environment mends.

    The message has at most three lines: what is wrong, with its numbers; what would be right; which flag to change.
    Entry points print it without a traceback and exit with 2.
    """


def require(module: str, needed_for: str) -> None:
    """Raise UserError, with the command that installs it, if the optional library `module` is not installed.

    Nothing is imported. Call it before work of seconds whose result only that library can write.
    needed_for: the flag or the page that needs it, for the message.
    """
    if importlib.util.find_spec(module) is None:
        extra = _EXTRAS.get(module)
        package = f"'megatron-bfpp[{extra}]'" if extra else _PACKAGES.get(module, module)
        raise UserError(f"{needed_for} needs {module}, which is not installed.\n  pip install {package}")


def shown(message: object) -> str:
    """Return what to print of an error: at most three lines, whatever values from outside it contains.

    Further lines of our own begin with two spaces. Other line ends, like control characters, came with a value.
    """
    lines = re.sub(r"\n(?!  )", " ", str(message)).split("\n")[:_LINES]
    printable = ("".join(letter if letter.isprintable() else "?" for letter in line) for line in lines)
    return "\n".join(line if len(line) <= _LETTERS else line[:_LETTERS] + " ..." for line in printable)
