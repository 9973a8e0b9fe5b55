"""Files are written whole or not at all. Standard library only."""

import os
from pathlib import Path

from .errors import UserError


def write_whole(path: str, text: str, flag: str) -> None:
    """Write `text` to `path` under another name first; UserError, naming `flag`, where that is impossible.

    A link stays a link: the file that it names is replaced. What is no regular file (/dev/null, /dev/stdout, a pipe) is
    written to as it is: renaming over it would replace the device, and containers run as root.
    """
    try:
        target = Path(os.path.realpath(path))
        if not path or target.is_dir():
            raise IsADirectoryError(None, "It is a folder" if path else "The name is empty")
        if target.exists() and not target.is_file():
            Path(path).write_text(text, encoding="utf-8")
            return
        # Short, so that it is no longer than a file name may be when the user's own is not.
        temporary = target.with_name(f".bfpp-{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {path} cannot be written: {reason}.\n  Name a file in a folder that exists.") from None
