"""Finds Megatron's flags in a shell script. The script is read, not run."""

import re
import shlex
from pathlib import Path

from ...console.errors import UserError

__all__ = ["SCRIPTS", "words_of_script"]

SCRIPTS = (".sh", ".sbatch", ".slurm")
_ASSIGNED = re.compile(r"(?:export\s+|local\s+|readonly\s+)?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|[^\s;()]*)\s*(?:#.*)?$")
# The value of the one that is set, or else the default that it has.
_VARIABLE = re.compile(r"\$\{(\w+)(?::?[-=]([^}]*))?\}|\$(\w+)")
_DEPTH = 5  # of variables within variables


def words_of_script(path: str) -> list[str]:
    """Return every flag of the script with the values behind it, in order, its variables replaced where it sets them.

    What is no flag of Megatron (of srun, of torchrun) is passed over by the parser of flags. Raises UserError for a
    file that cannot be read, or has no flags.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text.") from None
    lines = text.replace("\\\n", " ").splitlines()
    variables = {
        match[1]: match[2].strip("\"'") for line in lines if (match := _ASSIGNED.fullmatch(line.strip())) is not None
    }
    words: list[str] = []
    takes = False
    for word in _split(text.replace("\\\n", " ")):
        for part in _replaced(word, variables).replace("(", " ").replace(")", " ").split():
            flag, is_joined, value = part.partition("=")
            if re.fullmatch(r"--[A-Za-z][\w-]*", flag):
                words += [flag, value] if is_joined else [flag]
                takes = True
            elif takes and not re.fullmatch(r"[;&|]+|\w+\+?=.*|-[A-Za-z]", part):
                words.append(part)
            else:
                takes = False
    if not words:
        raise UserError(f"{path}: has no flags.\n  Give a script with Megatron's flags, or a file of configs/.")
    return words


def _split(text: str) -> list[str]:
    """Split a script into words; the words of a quoted list of flags too."""
    found = []
    for line in text.splitlines():
        try:
            found += [part for word in shlex.split(line, comments=True) for part in word.split()]
        except ValueError:  # a quotation of several lines
            found += line.split("#")[0].replace('"', " ").replace("'", " ").split()
        found.append(";")
    return [word for place, word in enumerate(found) if word != ";" or place]


def _value(match: re.Match[str], variables: dict[str, str]) -> str:
    name, default = match[1] or match[3], match[2]
    value = variables.get(name)
    if value is None or value == match[0]:  # HIDDEN=${HIDDEN:-1024}
        return default or match[0]
    return value


def _replaced(word: str, variables: dict[str, str]) -> str:
    for _ in range(_DEPTH):
        after = _VARIABLE.sub(lambda match: _value(match, variables), word)
        if after == word:
            break
        word = after
    return word
