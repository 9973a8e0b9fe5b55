"""README and docs: the first page keeps its shape, every link leads somewhere, every command is run or says why not."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "patches/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# The sections of the first page, in their order.
SECTIONS = [
    "The flag", "When it wins, and when not", "Try it: two commands, no GPU", "On a cluster", "Main flags",
    "Everything else", "Correctness", "Licence and patent notice",
]  # fmt: skip
COMMANDS = ("bash", "console")
LANGUAGES = (*COMMANDS, "text", "python", "yaml", "csv")
NEEDS = ("GPUs", "a cluster", "a network", "root", "half an hour", ".venv")
PROGRAMS = r"(?:\$ |[A-Z_]+=\S+ )*(?:bfpp|bash|torchrun|python|pip|srun|sbatch|git|sudo|\.venv/bin/\w+) "
WIDTH = 120


@dataclass(frozen=True)
class Block:
    """A fenced block. line: of its fence, from 1. marker: what the comment above it says, or ""."""

    page: str
    line: int
    language: str
    marker: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands, each in one line; of a console block those behind a $."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.lstrip().startswith(("#", "cd ", "export "))]

    @property
    def output(self) -> str:
        """What a console block shows behind its command."""
        return "".join(f"{line}\n" for line in self.text.replace("\\\n", " ").splitlines() if line[:2] != "$ ")


def blocks_of(text: str, page: str) -> list[Block]:
    """Return the fenced blocks of a Markdown page."""
    pattern = r"(?:^[ ]*<!-- ([^\n]*) -->\n)?^[ ]*```([^\n]*)\n(.*?)^[ ]*```$"
    found = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [
        Block(page, text.count("\n", 0, each.start(2)) + 1, each[2].strip(), each[1] or "", each[3]) for each in found
    ]


def word_of(command: str) -> str:
    """Return the word that names a command: the second one of bfpp, pip and git, else the script or module."""
    words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    words = words[1:] if words[0] == "sudo" else words
    program = os.path.basename(words[0])
    if program in ("bfpp", "pip", "git"):
        return words[1]
    if "-m" in words and program in ("python", "torchrun"):
        return words[words.index("-m") + 1]
    scripts = [word for word in words if re.search(r"\.(sh|py|sbatch)$", word)]
    return os.path.basename(scripts[0]) if scripts else program


def complaint(block: Block) -> str | None:
    """Return what is wrong with a block, or None."""
    if block.language not in LANGUAGES:
        return f"the language {block.language!r} is none of {LANGUAGES}"
    if block.language not in COMMANDS:
        hidden = re.search(rf"^{PROGRAMS}", block.text, re.MULTILINE)
        return f"{hidden[0]!r} is a command in a block of {block.language}" if hidden else None
    if not block.commands:
        return "there is no command in it"
    if block.marker.startswith("needs "):
        needed = block.marker.removeprefix("needs ")
        return None if needed in NEEDS else f"it needs {needed!r}, which is none of {NEEDS}"
    if block.marker.startswith("run by: "):
        path = ROOT / block.marker.removeprefix("run by: ")
        if not path.is_file():
            return f"{path} does not exist"
        text, page = path.read_text(encoding="utf-8"), Path(block.page)
        if f'"{page.parent.name}"' in text and f'"{page.name}"' in text:
            return None  # it takes the commands from the page itself
        missing = [word for word in map(word_of, block.commands) if word not in text]
        return f"{path.name} does not mention {missing}" if missing else None
    if block.marker not in ("", "slow"):
        return f"the marker {block.marker!r} is unknown"
    outside = [each for each in block.commands if word_of(each) in ("install", "clone") or "torchrun" in each]
    return f"{outside} cannot run in a test" if outside else None


def is_run_here(block: Block) -> bool:
    return block.language in COMMANDS and block.marker in ("", "slow")


def ran(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the commands of a block in an empty folder that has the repository's files by their relative paths."""
    binaries = folder / ".bin"
    binaries.mkdir()
    for name, words in (("bfpp", "-m megatron_bfpp.cli"), ("python", "")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (binaries / name).chmod(0o755)
    for name in ("configs", "scripts", "tests"):
        (folder / name).symlink_to(ROOT / name)
    paths = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    lines = block.text.splitlines()
    if block.language == "console":
        lines = block.commands
    script = "set -euo pipefail\n" + "\n".join(lines)
    return subprocess.run(["bash", "-c", script], cwd=folder, env=os.environ | paths, text=True, capture_output=True)


def is_shown(shown: str, printed: str) -> bool:
    """Return whether the output that a page shows was printed; "..." stands for any number of characters or lines."""
    pattern = r".*".join(re.escape(part) for part in re.split(r"\.\.\.\n?", shown.strip()))
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def dead_links(text: str, page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        found = target == page or target.exists()
        if found and anchor:
            found = anchor in anchors_of(text if target == page else target.read_text(encoding="utf-8"))
        if not found:
            dead.append(link)
    return dead


def too_wide(text: str) -> list[int]:
    """Return the lines wider than 120 outside tables and verbatim blocks, which cannot be broken."""
    prose = re.sub(r"^```.*?^```$", lambda each: "\n" * each[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    return [
        number
        for number, line in enumerate(prose.splitlines(), 1)
        if len(line) > WIDTH and not line.startswith("|") and not re.fullmatch(r"!?\[.*\]\(.*\)", line)
    ]


BLOCKS = [each for page in PAGES for each in blocks_of(page.read_text("utf-8"), str(page.relative_to(ROOT)))]


def test_the_first_page_is_short_and_begins_with_a_picture():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert [number for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", "\n".join(lines[:20]))
    assert pictures and (ROOT / pictures[0]).is_file()
    assert any(line.startswith("Status: ") for line in lines[:20])
    assert [line.removeprefix("## ") for line in lines if line.startswith("## ")] == SECTIONS


def test_the_caption_of_the_first_picture_has_the_times_of_its_command(capsys):
    from megatron_bfpp.cli import main

    command = re.search(
        r"^bfpp (show .*) --svg docs/images/timeline.svg$", (ROOT / "docs/images/README.md").read_text(), re.M
    )
    assert command and main(command[1].split()) == 0
    times = re.findall(r"^step time (\d+) forward units", capsys.readouterr().out, re.MULTILINE)
    assert len(times) == 2
    text = README.read_text(encoding="utf-8")
    assert f"Megatron's default takes {times[0]} forwards, breadth-first {times[1]}." in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere_and_lines_are_narrow(page):
    text = page.read_text(encoding="utf-8")
    assert dead_links(text, page) == []
    assert too_wide(text) == []


def test_every_page_is_reached_from_the_index():
    reached, wanted = {ROOT / "docs/index.md"}, set((ROOT / "docs").rglob("*.md"))
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        links = re.findall(r"\]\(([^)\s#]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        found = {(page.parent / link).resolve() for link in links if "://" not in link} - reached
        reached |= found
        waiting += [each for each in found if each in wanted]
    assert wanted - reached == set()


def says_no_gpu(text: str) -> bool:
    """Return whether a page says that something has not run on a GPU, outside links and quoted messages."""
    said = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", text)
    claim = r"\b(not|never|nothing|no)\b[^.|]{0,40}\b(run|ran|tried)\b[^.|]{0,20}\bon (a )?GPU"
    return re.search(claim, said, re.IGNORECASE) is not None


def test_what_has_not_run_on_a_gpu_is_said_in_one_place():
    places = [str(page.relative_to(ROOT)) for page in PAGES if says_no_gpu(page.read_text(encoding="utf-8"))]
    assert places == ["docs/evidence/not_on_a_gpu.md"]
    assert says_no_gpu("Not run on a GPU.") and not says_no_gpu("[Not run on a GPU](x.md) `has not run on a GPU yet`")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_known(block):
    assert complaint(block) is None


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(each, marks=pytest.mark.slow if each.marker == "slow" else ())
        for each in BLOCKS
        if is_run_here(each)
    ],
    ids=str,
)
def test_a_command_runs_and_prints_what_the_page_shows(block, tmp_path):
    done = ran(block, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    if block.output and block.language == "console":
        assert is_shown(block.output, done.stdout), done.stdout


# The rules themselves, on small bad pages.


def block(body, marker="", language="bash"):
    above = f"<!-- {marker} -->\n" if marker else ""
    (only,) = blocks_of(f"Text.\n\n{above}```{language}\n{body}\n```\n", "bad.md")
    return only


@pytest.mark.parametrize(
    "bad",
    [
        block("bfpp show", language=""),
        block("bfpp show --pp 4", language="text"),
        block("X=1 bash scripts/test.sh", language="text"),
        block("# nothing"),
        block("no prompt", language="console"),
        block("bfpp show", "needs luck"),
        block("bfpp show", "run by: tests/no_such_test.py"),
        block("bfpp nosuchword", "run by: tests/test_cli.py"),
        block("bfpp show", "run by hand"),
        block("torchrun x.py"),
        block("pip install ."),
    ],
)
def test_a_bad_block_is_found(bad):
    assert complaint(bad) is not None


@pytest.mark.parametrize(
    "good",
    [block("bfpp show --help"), block("torchrun x.py", "needs GPUs"), block("bfpp show", "run by: tests/test_cli.py")],
)
def test_a_good_block_is_not(good):
    assert complaint(good) is None


def test_a_command_that_fails_or_prints_something_else_is_found(tmp_path):
    for name in ("fails", "prints"):
        (tmp_path / name).mkdir()
    assert ran(block("bfpp show --pp 1\ntrue"), tmp_path / "fails").returncode != 0
    wrong = block("$ bfpp --version\nbfpp 0.0.0", language="console")
    done = ran(wrong, tmp_path / "prints")
    assert done.returncode == 0 and not is_shown(wrong.output, done.stdout)
    assert is_shown("megatron_bfpp ...\n", done.stdout)


def test_dead_links_and_wide_lines_are_found():
    page = ROOT / "docs" / "bad.md"  # need not exist
    text = "[a](nowhere.md) [b](#nothing) [c](../README.md#no-such-section) [d](../README.md#the-flag)"
    assert dead_links(text, page) == ["nowhere.md", "#nothing", "../README.md#no-such-section"]
    assert anchors_of("# Here: it is\n```text\n# not here\n```\n") == {"here-it-is"}
    assert too_wide("x" * 120 + "\n" + "x" * 121 + "\n| " + "x" * 130 + "\n```text\n" + "x" * 130 + "\n```\n") == [2]
