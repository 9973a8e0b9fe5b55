"""Print the flags of a file of configs/, shell-quoted, one a line: python -m megatron_bfpp.config_file PATH"""

import sys

from .console.config_file import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
