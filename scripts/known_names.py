"""Write megatron_bfpp/integration/relied_on/known.py: what the code that the plugin takes the place of reads.

    python scripts/known_names.py 0.17.1=/path/to/unpacked 0.18.2=/path 0.19.2= "main d98e8a64=/path/to/checkout"

A path is that of the folder that holds the package `megatron`; without one the installed Megatron is read. Releases are
had by `pip download --no-deps megatron-core==0.17.1` and `unzip`. tests/integration/test_known_names.py compares the
file with the installed release, and with those that BFPP_MEGATRONS names.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from megatron_bfpp.console.processes import package_on_path

TARGET = Path(__file__).parents[1] / "megatron_bfpp" / "integration" / "relied_on" / "known.py"
READ = """
import json, sys
from megatron_bfpp.integration.relied_on.known import NAMES
from megatron_bfpp.integration.seams import Seam, names_read
for path in NAMES:
    module, name = path.split(":")
    print(json.dumps([path, sorted(names_read(Seam(module, name, "")._find()[0]))]))
"""
HEAD = '''"""What the code reads whose place the plugin takes, by release. Made by scripts/known_names.py."""

# A place, and by release the names beside those of all releases, which stand under "all".
NAMES: dict[str, dict[str, str]] = {
'''
FOOT = '''}


def known(module: str, name: str) -> tuple[tuple[str, frozenset[str]], ...]:
    """Return (release, all names that the code at a place reads) of the tested releases."""
    found = NAMES[f"{module}:{name}"]
    return tuple(
        (release, frozenset((found["all"] + " " + more).split())) for release, more in found.items() if release != "all"
    )
'''


def read(folder: str) -> dict[str, list[str]]:
    """Return the names that each place of NAMES reads in the Megatron of a folder, or in the installed one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [folder, package_on_path()]))}
    command = [sys.executable, "-W", "ignore", "-c", READ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(map(json.loads, done.stdout.strip().splitlines()))


def text(releases: dict[str, str]) -> str:
    """Return the file for these releases, by name: their folders."""
    found = {release: read(folder) for release, folder in releases.items()}
    lines = []
    for path in next(iter(found.values())):
        by_release = {release: set(names[path]) for release, names in found.items()}
        common = set.intersection(*by_release.values())
        lines.append(f'    "{path}": {{')
        for release, names in {"all": common, **{release: own - common for release, own in by_release.items()}}.items():
            rows = textwrap.wrap(" ".join(sorted(names)), 100) or [""]
            quoted = [f'"{row} "' for row in rows[:-1]] + [f'"{rows[-1]}"']
            if len(rows) == 1:
                lines.append(f'        "{release}": {quoted[0]},')
            else:
                lines += [f'        "{release}": (', *(f"            {row}" for row in quoted), "        ),"]
        lines.append("    },")
    return HEAD + "\n".join(lines) + "\n" + FOOT


if __name__ == "__main__":
    TARGET.write_text(text(dict(each.split("=", 1) for each in sys.argv[1:])), encoding="utf-8")
