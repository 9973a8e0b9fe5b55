"""Reads the files of configs/ into command-line flags.

The two maps are those of Megatron's own functional tests; every line of them can be pasted on a command line:
    ENV_VARS:   {OMP_NUM_THREADS: 1, USE_CACHE: true}
    MODEL_ARGS: {--num-layers: 8, --bf16: true, --no-load-optim: false, --split: "99,1,0", --data-path: [a, b]}
A text "[a b]" is the list too, as in those tests.
Two keys are ours:
    base: gpt_52b.yaml                  Another such file, relative to this one. Entries of this file replace those of
                                        the base by name; `--flag: false` takes a flag of the base away.
    cluster: {gpu: v100-32, gpus: 4096} The GPUs that `bfpp plan` and `bfpp check` take without --gpu and --gpus: a
                                        profile's name, or its path relative to this file, and their number.

By hand: OmegaConf and Hydra bring an override syntax of their own beside Megatron's flags, and report in tracebacks.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import UserError

__all__ = ["Cluster", "cluster", "later_runs", "load"]

_MAPS = ("cluster", "ENV_VARS", "MODEL_ARGS")
# Keys of Megatron's own files that describe how their tests are run and not what is trained.
_IGNORED = (
    "TEST_TYPE", "METRICS", "MODE", "LAUNCHER", "BEFORE_SCRIPT", "AFTER_SCRIPT", "TEST_EVALUATION",
    "THROUGHPUT_TEST_PARAMS", "MODEL_ENV_VARS", "BASE_MODEL_ARGS",
)  # fmt: skip
# Words in brackets; with commas, or a single number, it is one value in Python's form, such as --moe-layer-freq [0,1].
_LIST = re.compile(r"\[((?!\s*\d+\s*\])[^\[\],]*[^\[\],\s][^\[\],]*)\]")
# The runs of such a test after the first, each with flags of its own.
_LATER_RUN = re.compile(r"MODEL_ARGS_\d+")


class Cluster(NamedTuple):
    """The GPUs that a configuration is for; None for what its file does not name."""

    gpu: str | None = None  # as --gpu takes it
    gpus: int | None = None


def load(path: str | os.PathLike[str], expand: bool = True) -> tuple[dict[str, str], list[str]]:
    """Return the environment variables and the command-line flags of a file, those of its bases included.

    true is a bare flag, false leaves the flag out, a list gives several words, ${VAR} is taken from the environment.
    expand: False leaves ${VAR} as it stands, for readers of the other flags.
    """
    environment, words = {}, []
    for name, (source, value) in _merged(Path(path), "ENV_VARS").items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"{source}: ENV_VARS: {name!r} is not the name of an environment variable.")
        value = str(value).lower() if isinstance(value, bool) else value
        environment[name] = _word(source, f"ENV_VARS: {name}", value, expand)
    for flag, (source, value) in _merged(Path(path), "MODEL_ARGS").items():
        words += _flag_words(source, flag, value, expand)
    return environment, words


def cluster(path: str | os.PathLike[str]) -> Cluster:
    """Return the GPUs that a file, or else its base, names under `cluster`."""
    found: dict[str, Any] = {}
    for key, (source, value) in _merged(Path(path), "cluster").items():
        if key not in Cluster._fields:
            raise UserError(f"{source}: cluster: unknown key {key!r}. Known are {' and '.join(Cluster._fields)}.")
        if key == "gpus" and (type(value) is not int or value < 1):
            raise UserError(f"{source}: cluster: gpus is {value!r}; it must be a number of at least 1.")
        if key == "gpu":
            value = _word(source, "cluster: gpu", value, expand=False)
            value = str(source.parent / value) if value.endswith((".yaml", ".yml")) else value
        found[key] = value
    return Cluster(**found)


def later_runs(path: str | os.PathLike[str]) -> list[str]:
    """Return the keys of a file under which the flags of further runs stand, which `load` passes over."""
    return [key for key in _read(Path(path)) if isinstance(key, str) and _LATER_RUN.fullmatch(key)]


def _merged(path: Path, section: str) -> dict[Any, tuple[Path, Any]]:
    """Return a map of a file merged over that of its bases: key -> the file that has the last word, and its value."""
    chain = [(path, _read(path))]
    while (base := chain[-1][1].get("base")) is not None:
        source = chain[-1][0]
        if not isinstance(base, str) or not base:
            raise UserError(f"{source}: base is a {_kind(base)}; it must be the path of another such file.")
        path = source.parent / base
        content = _read(path)
        if any(path.resolve() == each.resolve() for each, _ in chain):
            raise UserError(f"{source}: base {base} leads in a circle: {path.name} is based on {source.name} itself.")
        chain.append((path, content))
    return {
        key: (source, value)
        for source, content in reversed(chain)
        for key, value in (content.get(section) or {}).items()
    }


def _read(path: Path) -> dict[str, Any]:
    """Return the content of one file, whose keys are known and whose sections are maps."""
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
    # A date or a number that does not exist, nesting too deep, or a zero character in the path.
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: not YAML: {error}.") from None
    known = f"{', '.join(('base', *_MAPS[:-1]))} and {_MAPS[-1]}"
    if content is None:
        raise UserError(f"{path}: is empty; it must hold a map of {known}.")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {_kind(content)}; it must hold a map of {known}.")
    unknown = [
        key for key in content
        if key not in ("base", *_MAPS, *_IGNORED) and not (isinstance(key, str) and _LATER_RUN.fullmatch(key))
    ]  # fmt: skip
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]!r}. Known are {known}.")
    for section in _MAPS:
        if not isinstance(content.get(section) or {}, dict):
            kind = _kind(content[section])
            raise UserError(f"{path}: {section} is a {kind}; it must be a map, one `key: value` a line.")
    return content


def _flag_words(path: Path, flag: Any, value: Any, expand: bool) -> list[str]:
    if not isinstance(flag, str) or not re.fullmatch(r"--[A-Za-z0-9][\w-]*", flag):
        raise UserError(f"{path}: MODEL_ARGS: {flag!r} is not a flag; write it as on the command line, --like-this.")
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, str) and (words := _LIST.fullmatch(value)):
        value = words[1].split()
    values = value if isinstance(value, list) else [value]
    return [flag, *(_word(path, f"MODEL_ARGS: {flag}", item, expand) for item in values)]


def _word(path: Path, key: str, value: Any, expand: bool) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{path}: {key} is a {_kind(value)}; it must be a number or a text.")

    def from_environment(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{path}: {key} uses ${{{match[1]}}}, which is not set; set {match[1]} in the environment.")
        return os.environ[match[1]]

    try:
        text = str(value)
    except ValueError:  # Python prints no integer of more than 4300 digits, and YAML's hexadecimal ones have no limit
        raise UserError(f"{path}: {key} has more than 4300 digits; write a number that a flag can have.") from None
    return re.sub(r"\$\{(\w+)\}", from_environment, text) if expand else text


def _kind(value: Any) -> str:
    names = {dict: "map", list: "list", str: "text", bool: "true or false", type(None): "missing value"}
    names |= {int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
