"""Print the flags of a file of configs/, shell-quoted, one a line: python -m megatron_bfpp.config_file PATH"""

import shlex
import sys

from .console.config_file import load
from .console.errors import UserError, shown


def main(argv: list[str]) -> int:
    """Print the flags of a file; return the exit code."""
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
