"""Writes files whole or not at all. Standard library only."""

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import UserError


def write_wanted(args: Any, **contents: Callable[[], Any]) -> None:
    """Write the files that the flags of a command line name, and say so. Raises the first UserError after the last one.

    contents: the name of each flag, and what makes its text; anything but a text is written as JSON.
    """
    failures: list[UserError] = []
    for name, make in contents.items():
        path = getattr(args, name)
        if path is None:
            continue
        content = make()
        try:
            write_whole(
                path, content if isinstance(content, str) else json.dumps(content, indent=1) + "\n", f"--{name}"
            )
            print(f"wrote {path}")
        except UserError as error:  # the others may fit, or lie elsewhere
            failures.append(error)
    if failures:
        raise failures[0]


def write_figure(figure: Any, path: str, flag: str) -> None:
    """Write a figure of matplotlib in the format of the path's ending, PNG without one, and say so."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=os.path.splitext(path)[1].lstrip(".") or "png")
    except ValueError as error:  # an ending that matplotlib does not know
        raise UserError(f"{flag} {path} cannot be written: {error}.") from None
    write_whole(path, picture.getvalue(), flag)
    print(f"wrote {path}")


def write_whole(path: str, content: str | bytes, flag: str) -> None:
    """Write `content` under another name and rename that to `path`. Raises UserError, naming `flag`, where it cannot.

    A link stays a link: its target is replaced. A device or a pipe (/dev/null, /dev/stdout) is written to in place:
    renaming over it would replace the device, and containers run as root.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        target = Path(os.path.realpath(path))
        if not path or target.is_dir():
            raise IsADirectoryError(None, "It is a folder" if path else "The name is empty")
        if target.exists() and not target.is_file():
            Path(path).write_bytes(data)
            return
        # Short, so that it fits wherever the user's own name does.
        temporary = target.with_name(f".bfpp-{os.getpid()}")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a zero character in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {path} cannot be written: {reason}.\n  Name a file in a folder that exists.") from None


def append_line(path: str | Path, entry: dict[str, Any]) -> None:
    """Append a line of JSON in one write, or nothing and raise OSError: no kill or full disk leaves a part of it."""
    line = (json.dumps(entry) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        written = file.write(line)
        if written < len(line):  # the rest did not fit; the next line would be glued to this part
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
