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


def check_wanted(args: Any, *names: str) -> None:
    """Raise UserError for a flag of `names` whose file cannot be written. Call it before work of seconds or more."""
    for name in names:
        path, flag = getattr(args, name), f"--{name}"
        if path is None:
            continue
        try:
            target = _target(path)
            if target is not None and not target.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            if target is not None and not os.access(target.parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except (OSError, ValueError) as error:
            raise _cannot(path, flag, error) from None


def check_figure(path: str, flag: str) -> None:
    """Raise UserError for an ending that matplotlib, which must be installed, does not know."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if (ending := _ending(path)) not in known:
        raise UserError(f"{flag} {path} cannot be written: {ending} is no format of matplotlib.\n"
                        "  Let its name end with .png, .svg or .pdf.")  # fmt: skip


def write_figure(figure: Any, path: str, flag: str) -> None:
    """Write a figure of matplotlib in the format of the path's ending, PNG without one, and say so."""
    picture = io.BytesIO()
    try:
        figure.savefig(picture, dpi=150, format=_ending(path))
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
        target = _target(path)
        if target is None:
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
        raise _cannot(path, flag, error) from None


def _target(path: str) -> Path | None:
    """Return the file that `path` leads to; None for a device or a pipe. Raises OSError for a folder."""
    if not path or os.path.isdir(path):
        raise IsADirectoryError(None, "It is a folder" if path else "The name is empty")
    # Asked of the path itself: what /dev/stdout leads to need not have a name.
    return None if os.path.exists(path) and not os.path.isfile(path) else Path(os.path.realpath(path))


def _cannot(path: str, flag: str, error: OSError | ValueError) -> UserError:
    reason = getattr(error, "strerror", None) or error
    is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    advice = "Make room, or name a file on another disk" if is_full else "Name a file in a folder that exists"
    if isinstance(error, PermissionError):
        advice = "Name a file in a folder that you may write to"
    return UserError(f"{flag} {path} cannot be written: {reason}.\n  {advice}.")


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower() or "png"


def append_line(path: str | Path, entry: dict[str, Any]) -> None:
    """Append a line of JSON in one write, or nothing and raise OSError: no kill or full disk leaves a part of it."""
    line = (json.dumps(entry) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        written = file.write(line)
        if written < len(line):  # the rest did not fit; the next line would be glued to this part
            file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
