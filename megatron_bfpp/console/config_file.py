"""Reads the files of configs/ into command-line flags.

The format is the one of Megatron's own functional tests, two maps of which every line can be pasted on a command line:
    ENV_VARS:   {OMP_NUM_THREADS: 1}
    MODEL_ARGS: {--num-layers: 8, --bf16: true, --no-load-optim: false, --split: "99,1,0", --data-path: [a, b]}
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, shown

__all__ = ["load"]

SECTIONS = ("ENV_VARS", "MODEL_ARGS")
# Keys that Megatron's own files also have and that say how their tests are run, not what is trained.
IGNORED_SECTIONS = ("TEST_TYPE", "METRICS")


def load(path: str | os.PathLike[str], expand: bool = True) -> tuple[dict[str, str], list[str]]:
    """The environment variables and the command-line flags of one file.

    true is a bare flag, false leaves the flag out, a list gives several words, and ${VAR} is taken from the environment.
    expand: False leaves ${VAR} as it stands, for readers of the other flags.
    """
    content = _read(Path(path))
    unknown = [key for key in content if key not in SECTIONS + IGNORED_SECTIONS]
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}. The file holds two maps: {' and '.join(SECTIONS)}.")
    for section in SECTIONS:
        if not isinstance(content.get(section) or {}, dict):
            raise UserError(
                f"{path}: {section} is a {_kind(content[section])}; it must be a map, one `key: value` a line."
            )
    environment = {}
    for name, value in (content.get("ENV_VARS") or {}).items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"{path}: ENV_VARS: {name!r} is not the name of an environment variable.")
        environment[name] = _word(path, f"ENV_VARS: {name}", value, expand)
    flags = []
    for flag, value in (content.get("MODEL_ARGS") or {}).items():
        flags += _flag_words(path, flag, value, expand)
    return environment, flags


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}: {where}not YAML: {problem}.") from None
    except (
        ValueError,
        TypeError,
        RecursionError,
        OverflowError,
    ) as error:  # a date or a number that cannot be, a nest too deep
        raise UserError(f"{path}: not YAML: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {_kind(content)}; it must hold two maps: {' and '.join(SECTIONS)}.")
    return content


def _flag_words(path: str | os.PathLike[str], flag: Any, value: Any, expand: bool) -> list[str]:
    if not isinstance(flag, str) or not re.fullmatch(r"--[A-Za-z0-9][\w-]*", flag):
        raise UserError(f"{path}: MODEL_ARGS: {flag!r} is not a flag; write it as on the command line, --like-this.")
    if value is True:
        return [flag]
    if value is False:
        return []
    values = value if isinstance(value, list) else [value]
    return [flag, *(_word(path, f"MODEL_ARGS: {flag}", item, expand) for item in values)]


def _word(path: str | os.PathLike[str], key: str, value: Any, expand: bool) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{path}: {key} is a {_kind(value)}; it must be a number or a text.")

    def from_environment(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{path}: {key} uses ${{{match[1]}}}, which is not set; set {match[1]} in the environment.")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", from_environment, str(value)) if expand else str(value)


def _kind(value: Any) -> str:
    names = {dict: "map", list: "list", str: "text", bool: "true or false", type(None): "missing value"}
    return names.get(type(value), type(value).__name__)


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print("usage: python -m megatron_bfpp.config_file PATH    prints the flags, shell-quoted, one a line")
        return 0 if argv in (["-h"], ["--help"]) else 2
    try:
        _, flags = load(argv[0])
    except UserError as error:
        print(f"megatron_bfpp: {shown(error)}", file=sys.stderr)
        return 2
    for word in flags:
        print(shlex.quote(word))
    return 0
