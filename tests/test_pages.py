"""The HTML pages in a real browser: their numbers, what they ask of a network, how they fit screens, light and dark."""

import json
from pathlib import Path

import pytest
from ab_runs import OUT_OF_MEMORY, compared, make_run, two_arms
from browser import Browser

from megatron_bfpp.cli import main
from megatron_bfpp.compare.text import COLUMNS
from megatron_bfpp.schedule import PipelineShape, breadth_first, simulate
from megatron_bfpp.timeline.picture import picture

pytestmark = pytest.mark.slow  # a browser

PHONE = {"width": 390, "height": 844}
ROWS = "[...document.querySelectorAll('tr')].map(row => [...row.children].map(cell => cell.textContent))"
# A page is as wide as its widest part that is not in a box of its own that scrolls.
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SEEN = "getComputedStyle(document.body).backgroundColor"
LABELS = "[...document.querySelectorAll('td')].slice(1, 3).map(cell => getComputedStyle(cell, '::before').content)"


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


def timeline(microbatches: int) -> str:
    shape = PipelineShape(4, 2, microbatches)
    return picture([("planned", simulate(breadth_first(shape), shape))]).svg()


@pytest.fixture
def report(tmp_path):
    """A report with everything in it: names as long as they get, a failed run, a wide and a narrow timeline."""
    paths = two_arms(tmp_path / "runs", rounds=2)
    paths.append(
        make_run(
            tmp_path / "runs",
            "breadth-first-sharded-with-a-name-that-does-not-fit-a-phone",
            step_s=0.5,
            end={"status": "failed", **OUT_OF_MEMORY},
        )
    )
    for path, microbatches in ((paths[0], 8), (paths[2], 200)):
        (path / "timeline.svg").write_text(timeline(microbatches))
    files = {kind: tmp_path / f"report.{kind}" for kind in ("html", "markdown", "json")}
    written = [word for kind, path in files.items() for word in (f"--{kind}", str(path))]
    assert main(["compare", *map(str, paths), *written]) == 1  # one has failed
    return files, paths


def test_the_report_shows_the_numbers_of_its_other_files(report, browser):
    files, _ = report
    browser.open(files["html"])
    head, *rows = browser.value(ROWS)
    assert head == list(COLUMNS)
    lines = [line for line in files["markdown"].read_text().splitlines() if line.startswith("| ")]
    assert rows == [[cell.strip() for cell in line.strip("| ").replace("\\", "").split(" | ")] for line in lines[2:]]
    for row, arm in zip(rows, json.loads(files["json"].read_text())["arms"], strict=True):
        shown = dict(zip(head, row, strict=True))
        assert shown["arm"] == arm["name"] and shown["tokens/s/GPU"] == f"{arm['tokens_per_s_per_gpu']:,.0f}"
        assert shown["step time p50 / p90"] == f"{1e3 * arm['step_s_p50']:.1f} ms / {1e3 * arm['step_s_p90']:.1f} ms"
        assert shown["time / first arm"] == ("-" if arm["ratio"] is None else f"{arm['ratio']:.4f}")
    assert "2 of" not in rows[0][1] and rows[2][1] == "0 of 1: out of memory"


def page_of_show(folder: Path, *words: str) -> Path:
    path = folder / "show.html"
    assert main(["show", *words, "--order", "interleaved", "--order", "breadth-first", "--html", str(path)]) == 0
    return path


def test_the_page_of_a_schedule_shows_the_numbers_of_the_terminal(tmp_path, browser, capsys):
    path = page_of_show(tmp_path, "--pp", "4", "--chunks", "2", "--microbatches", "8")
    browser.open(path)
    assert browser.value(ROWS)[1:] == [
        ["interleaved", "57", "15.79%", "11, 9, 7, 5"],
        ["breadth-first", "57", "15.79%", "15, 13, 11, 9"],
    ]
    assert (
        "step time 57 forward units, bubble 15.8%, peak live activations 11 (pp_rank 0) to 5" in capsys.readouterr().out
    )
    assert browser.value("document.querySelectorAll('svg rect').length") > 128  # of 128 actions


@pytest.mark.parametrize("name", ["report", "show", "wide show"])
def test_nothing_is_fetched_and_every_screen_is_fitted(name, tmp_path, browser, request):
    if name == "report":
        path = request.getfixturevalue("report")[0]["html"]
    else:
        path = page_of_show(tmp_path, "--pp", "4" if name == "show" else "32", "--chunks", "2", "--microbatches", "64")
    asked, complained = len(browser.requests), len(browser.complaints)
    colors = set()
    for size in ({"width": 1280, "height": 900}, PHONE):
        for scheme in ("light", "dark"):
            browser.open(path, **size, scheme=scheme)
            assert browser.value(OVERFLOW) == 0 and browser.value("innerWidth") == size["width"]
            colors.add(browser.value(SEEN))
            assert browser.picture().startswith(b"\x89PNG")
    assert len(colors) == 2, colors
    addresses = browser.requests[asked:]
    assert addresses.count(path.as_uri()) == 4
    assert {address.partition(":")[0] for address in addresses if address != path.as_uri()} <= {"data"}
    assert browser.complaints[complained:] == []
    if name == "report":
        assert browser.value("[...document.images].map(image => image.naturalWidth > 0)") == [True, True]
        assert browser.value(LABELS) == ['"runs"', '"step time p50 / p90"']  # cards, each number with its name


def test_a_page_that_asks_for_something_would_be_seen(tmp_path, browser):
    """What the tests above rely on."""
    path = tmp_path / "asks.html"
    path.write_text("<!doctype html><img src='https://example.invalid/1.png'><p style='width: 500px'>wide</p>")
    browser.open(path, **PHONE)
    assert (
        "https://example.invalid/1.png" in browser.requests and browser.complaints and browser.value("innerWidth") > 390
    )


def test_markup_in_the_files_of_a_run_stays_text(tmp_path, browser):
    path = make_run(tmp_path, "1f1b", end={"status": "failed", "reason": "<img src=x onerror=document.title='run'><b>"})
    page = tmp_path / "report.html"
    assert main(["compare", str(path), "--html", str(page)]) == 1
    asked = len(browser.requests)
    browser.open(page)
    assert browser.value("document.images.length + document.querySelectorAll('li b').length") == 0
    assert browser.requests[asked:] == [page.as_uri()] and compared(path).arms[0].failures[0] in browser.value(
        "document.body.textContent"
    )
