"""What bfpp compare writes: the page, Markdown, JSON and the run of W&B."""

import contextlib
import importlib.machinery
import io
import json
import os
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ab_runs import compared, make_run, two_arms
from offline_wandb import OfflineRun

from megatron_bfpp.cli import main
from megatron_bfpp.compare.text import COLUMNS, cells, headline, terminal
from megatron_bfpp.schedule.names import SCHEDULES


class Page(HTMLParser):
    """The table's cells, and every address that the page names."""

    def __init__(self, content):
        super().__init__()
        self.rows, self.addresses, self.tags, self._in_cell = [], [], set(), False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [
            value
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
        ]
        self.rows += [[]] if tag == "tr" else []
        self._in_cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, text):
        if self._in_cell:
            self.rows[-1].append(text)


def page_of(tmp_path, capsys):
    paths = two_arms(tmp_path, rounds=2)
    (paths[0] / "timeline.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'><script>1</script></svg>"
    )
    files = [str(tmp_path / name) for name in ("r.html", "r.md", "r.json")]
    assert main(["compare", *map(str, paths), "--html", files[0], "--markdown", files[1], "--json", files[2]]) == 0
    capsys.readouterr()
    return compared(*paths), *(Path(each).read_text() for each in files)


def test_the_page_has_the_tables_numbers_and_asks_nothing_of_a_network(tmp_path, capsys):
    comparison, content, *_ = page_of(tmp_path, capsys)
    found = Page(content)
    assert found.rows == [list(COLUMNS), *map(cells, comparison.arms)]
    assert found.addresses and all(each.startswith("data:image/svg+xml;base64,") for each in found.addresses)
    assert not found.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "url(" not in content and "@import" not in content and "default-src 'none'" in content
    assert "prefers-color-scheme: dark" in content and "width=device-width" in content


def test_the_headline_says_how_much_faster_with_its_interval_or_that_no_difference_can_be_told(tmp_path, capsys):
    pytest.importorskip("scipy")
    comparison, content, *_ = page_of(tmp_path, capsys)
    (sentence,) = headline(comparison)
    assert f"<h1>{sentence}</h1>" in content and f"  {sentence}" in terminal(comparison)
    found, said = comparison.arms[1].interval, re.findall(r"(\d+\.\d)%", sentence)
    assert sentence.startswith("breadth-first is faster than 1f1b: its step takes ") and "less time" in sentence
    less = (1 - comparison.arms[1].ratio, 1 - found.high, 1 - found.low)
    assert said == [f"{100 * value:.1f}" for value in less]
    slower = headline(compared(*reversed(two_arms(tmp_path / "slower", rounds=2))))
    assert slower[0].startswith("1f1b is slower than breadth-first: its step takes ") and "more time" in slower[0]
    times = {1: (0.40, 0.41), 2: (0.42, 0.40), 3: (0.41, 0.42)}
    paths = [make_run(tmp_path / "same", arm, each, times[each][place])
             for place, arm in enumerate(("1f1b", "breadth-first")) for each in times]  # fmt: skip
    (sentence,) = headline(compared(*paths))
    assert sentence.startswith("No difference between breadth-first and 1f1b can be told: step time between -")
    (sentence,) = headline(compared(*two_arms(tmp_path / "once")))
    assert "24.9% less time; whether by chance is unknown, without an interval (1 run)" in sentence


def test_arms_have_the_colours_of_their_schedules(tmp_path, capsys):
    _, content, *_ = page_of(tmp_path, capsys)
    for word in ("1f1b", "breadth-first"):
        assert content.count(f"--key: {SCHEDULES[word].color}") == 3  # its strip, its curve and the key of that


def test_markdown_and_json_have_the_same_numbers(tmp_path, capsys):
    comparison, _, text, data = page_of(tmp_path, capsys)
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert rows[2:] == [[cell.replace("\\", "") for cell in cells(arm)] for arm in comparison.arms]
    read_back = json.loads(data)
    assert read_back["good"] is True and [arm["step_s_p50"] for arm in read_back["arms"]] == [
        arm.step_s_p50 for arm in comparison.arms
    ]


class FakeWandb(types.ModuleType):
    """The calls of W&B that are used; keeps what it was given."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.logged, self.summary, self.files, self.given, self.is_finished = [], {}, {}, {}, False
        self.log, self.log_artifact = self.logged.append, self.logged.append

    def init(self, **given):
        self.given = given
        return self

    def Table(self, columns, data):
        return {"columns": columns, "data": data}

    @contextlib.contextmanager
    def new_file(self, name, encoding):
        file = io.StringIO()
        yield file
        self.files[name] = file.getvalue().encode(encoding)

    def add_file(self, path, name):
        self.files[name] = Path(path).read_bytes()

    def Artifact(self, name, type):
        return types.SimpleNamespace(name=name, type=type, add_file=self.add_file, new_file=self.new_file)

    def finish(self):
        self.is_finished = True


def test_wandb_gets_one_report_run_with_the_table_and_the_files(tmp_path, capsys, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    paths = two_arms(tmp_path)
    (paths[0] / "trace.json").write_text("[]")
    assert main(["compare", *map(str, paths), "--wandb-project", "ab"]) == 0
    assert wandb.given["project"] == "ab" and wandb.given["job_type"] == "report" and wandb.is_finished
    assert wandb.logged[0]["comparison"]["data"] == [cells(arm) for arm in compared(*paths).arms]
    assert wandb.summary == {"ratio/breadth-first": pytest.approx(0.301 / 0.401)}
    assert sorted(wandb.files) == ["01 1f1b.1/trace.json", "report.html", "report.json", "report.md"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["compare", *map(str, paths), "--wandb-project", "ab"]) == 2
    assert "wandb, which is not installed" in capsys.readouterr().err


def test_an_offline_run_of_wandb_holds_what_was_given(tmp_path):
    pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="wandb is not installed")
    settings = {"MODE": "offline", "RUN_GROUP": "ab-52b", "TAGS": "bfpp,ab", "SILENT": "true"}
    settings |= dict.fromkeys(("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"), str(tmp_path))
    # A process of its own: wandb reads its variables once per process.
    command = [sys.executable, "-m", "megatron_bfpp.cli", "compare", *map(str, two_arms(tmp_path / "runs"))]
    environment = os.environ | {f"WANDB_{name}": value for name, value in settings.items()}
    subprocess.run([*command, "--wandb-project", "ab"], check=True, timeout=240, env=environment)
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    found = OfflineRun(folder)
    assert (found.run.project, found.run.run_group, found.run.job_type, list(found.run.tags)) == (
        "ab",
        "ab-52b",
        "report",
        ["bfpp", "ab"],
    )
    assert found.config["arms"] == ["1f1b", "breadth-first"] and found.config["torch"] == "2.14.1"
    assert sorted(found.artifact_of("report")) == ["report.html", "report.json", "report.md"]
    assert found.table("comparison")["columns"] == list(COLUMNS)


def test_without_numpy_torch_and_megatron_runs_are_compared(tmp_path):
    paths = [str(path) for path in two_arms(tmp_path)]
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'yaml', 'megatron', 'scipy'): sys.modules[name] = None\n"
        "from megatron_bfpp.cli import main\n"
        f"sys.exit(main(['compare', *{paths!r}]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, stdout=subprocess.DEVNULL, env=os.environ)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "nowhere is not a directory"),
        (["."], "holds no run"),
        ([".", "--warmup", "-1"], "--warmup: '-1' is not a whole number"),
        ([".", "--loss-tolerance", "1"], "--loss-tolerance: '1' is not a number"),
    ],
)
def test_bad_input_is_one_short_message(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["compare", *arguments])
    except SystemExit as stop:  # what the parser itself refuses
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert words in message and len(message.strip().splitlines()) <= 3
