"""Files are written whole or not at all. Standard library only."""

import os
from pathlib import Path

from .errors import UserError


def write_whole(path: str, text: str, flag: str) -> None:
    """Write `text` to `path` under another name first; UserError, naming `flag`, where that is impossible."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}.\n  Name a file in a folder that exists.") from None
