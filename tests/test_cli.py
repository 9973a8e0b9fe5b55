"""The bfpp command: what it prints and writes, and its exit codes."""

import json
import os
import stat
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from megatron_bfpp import __version__
from megatron_bfpp.cli import WORDS, main

SHOW = ["show", "--pp", "4", "--chunks", "2", "--microbatches", "4"]


def test_show_draws_every_rank_and_the_predicted_bubble(capsys):
    assert main(SHOW) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].strip() for line in lines[:4]] == [f"pp_rank {rank}" for rank in range(4)]
    assert lines[3].split("|")[1].split()[:9] == [".", ".", ".", "f00", "f01", "f02", "f03", "f10", "b10"]
    assert lines[4].startswith("step time 33 forward units, bubble 27.3%")


def test_show_as_text_is_the_plan(capsys):
    assert main(["show", "--pp", "2", "--chunks", "2", "--microbatches", "2", "--text", "--backward", "late"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    ]


def test_show_prints_the_plan_of_sharded_parameters(capsys):
    shape = ["show", "--pp", "2", "--chunks", "3", "--microbatches", "4"]
    assert main([*shape, "--plan", "--text", "--resident-chunks", "2"]) == 0
    for line in capsys.readouterr().out.splitlines():
        words = "".join(letter for letter in line if not letter.isdigit()).split()
        assert (words.count("UNSHARD"), words.count("RESHARD"), words.count("REDUCE_GRAD")) == (4, 4, 3)
    assert main([*shape, "--plan", "--text", "--resident-chunks", "0"]) == 2


def test_show_knows_one_hardware_queue_and_for_which_hop_receives_are_placed(capsys):
    steps = []
    for more in ([], ["--connections", "1"], ["--connections", "1", "--breadth-first-hop", "0"]):
        assert main(["show", "--pp", "8", "--chunks", "4", "--microbatches", "16", "--hop", "0.25", *more]) == 0
        steps.append(float(capsys.readouterr().out.split("step time ")[1].split()[0]))
    assert steps[0] == pytest.approx(steps[1], rel=0.01) and steps[2] > 1.05 * steps[1]


def test_the_picture_has_a_box_for_each_action_of_each_order(tmp_path):
    path = tmp_path / "both.svg"
    assert main([*SHOW, "--order", "interleaved", "--order", "breadth-first", "--svg", str(path)]) == 0
    boxes = [node for node in ElementTree.parse(path).iter() if node.get("class") in ("F", "B")]
    assert len(boxes) == 2 * (4 * 2 * 4 * 2)


def test_a_written_plan_is_sound_and_a_damaged_one_is_not(tmp_path, capsys):
    path = tmp_path / "plan.csv"
    assert main([*SHOW, "--plan", "--csv", str(path)]) == 0
    assert main(["check", str(path)]) == 0
    assert "sound: PP 4 x 2 chunks, 4 micro-batches" in capsys.readouterr().out
    path.write_text(path.read_text().replace("4F1,", "", 1))
    assert main(["check", str(path)]) == 1
    assert "pp_rank 0: 1 of its actions are missing: 4F1" in capsys.readouterr().out


def test_show_writes_a_page_of_its_own_and_a_png(tmp_path):
    page, picture = tmp_path / "both.html", tmp_path / "both.png"
    both = ["--order", "interleaved", "--order", "breadth-first"]
    assert main([*SHOW, *both, "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("<svg") == 1 and "http" not in text.replace(
        "http://www.w3.org/2000/svg", ""
    )  # nothing is fetched
    assert "prefers-color-scheme: dark" in text and "<td>breadth-first</td>" in text
    pytest.importorskip("matplotlib")
    assert main([*SHOW, *both, "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*SHOW, "--png", str(tmp_path / "picture.xyz")]) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "--pp", "1", "--chunks", "2", "--microbatches", "4"], "pp_size is 1"),
        ([*SHOW, "--group", "9"], "group is 9"),
        ([*SHOW, "--order", "interleaved", "--group", "3"], "Megatron takes 4"),
        ([*SHOW, "--backward-time", "0"], "--backward-time: '0' is not a number from 0.01 to 100"),
        ([*SHOW, "--backward-time", "inf"], "--backward-time: 'inf' is not a number"),
        ([*SHOW, "--hop", "nan"], "--hop: 'nan' is not a number from 0 to 100"),
        ([*SHOW, "--hop", "-1"], "--hop: '-1' is not a number"),
        ([*SHOW, "--svg", ""], "The name is empty"),
        ([*SHOW, "--svg", "."], "It is a folder"),
        ([*SHOW, "--csv", "a\x00b"], "embedded null"),
        ([*SHOW, "--svg", "/nowhere/picture.svg"], "--svg /nowhere/picture.svg cannot be written"),
        ([*SHOW, "--transfer", "-1"], "--transfer: '-1' is not a number"),
        (
            [*SHOW, "--order", "interleaved", "--order", "1f1b", "--csv", "x"],
            "--csv holds one schedule, and 2 are named",
        ),
        (["show", "--pp", "4"], "--chunks, --microbatches is not given"),
        (["show", "/nowhere/order.csv"], "/nowhere/order.csv cannot be read"),
        (["show", "/nowhere/order.csv", "--group", "2"], "--group is of an --order"),
        (["check", "/nowhere/plan.csv"], "/nowhere/plan.csv cannot be read"),
    ],
)
def test_bad_input_is_one_short_message_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:  # what the parser itself refuses
        code = stop.code
    assert code == 2
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) <= 3


def test_the_shape_of_a_plan_can_be_asserted(tmp_path, capsys):
    path = tmp_path / "plan.csv"
    main([*SHOW, "--plan", "--csv", str(path)])
    assert main(["check", str(path), "--pp", "4", "--chunks", "2", "--microbatches", "4"]) == 0
    assert main(["check", str(path), "--microbatches", "5"]) == 1
    assert "unsound as PP 4 x 2 chunks, 5 micro-batches: pp_rank 0: " in capsys.readouterr().out
    assert main(["check", str(path), "--pp", "8"]) == 1
    assert "the plan has 4 ranks, the shape 8" in capsys.readouterr().out


def test_what_editors_and_spreadsheets_do_to_a_plan_is_forgiven(tmp_path):
    path = tmp_path / "plan.csv"
    main([*SHOW, "--plan", "--csv", str(path)])
    text = path.read_text()
    for changed in (text + "\n\n", text.replace("\n", "\r\n"), "\ufeff" + text, text.replace(",", ", ")):
        path.write_bytes(changed.encode())
        assert main(["check", str(path)]) == 0


def test_a_number_beyond_all_measure_is_refused_at_once(tmp_path, capsys):
    path = tmp_path / "plan"
    for word in ("0F100000000", "100000000F0"):
        path.write_text(f"0F0 0B0 {word}\n1F0 1B0\n")
        assert main(["check", str(path)]) == 2
        assert "too few for PP 2" in capsys.readouterr().err


@pytest.mark.parametrize("backward", ["0.3", "0.75", "1.5", "2.5", "7"])
@pytest.mark.parametrize("hop", ["0", "0.25", "1.5"])
def test_the_grid_keeps_its_columns_and_every_action_for_all_durations(backward, hop, capsys):
    assert main([*SHOW, "--backward-time", backward, "--hop", hop]) == 0
    rows = [line.split("|")[1].split() for line in capsys.readouterr().out.splitlines()[:4]]
    assert len({len(row) for row in rows}) == 1
    assert all(len(set(row) - {"."}) == 2 * 2 * 4 for row in rows)


def test_a_grid_wider_than_the_terminal_is_cut_unless_wide(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "50")
    assert main(SHOW) == 0
    rows = capsys.readouterr().out.splitlines()[:4]
    assert all(len(row) <= 50 and row.endswith(" ...") for row in rows)
    assert main([*SHOW, "--wide"]) == 0
    assert all(" ..." not in row and len(row) > 50 for row in capsys.readouterr().out.splitlines()[:4])


def test_a_file_that_is_no_plan_is_bad_input(tmp_path, capsys):
    for text in ("hello\n", "", "\x00\x01", "0F0,9X9\n", "0F0," + "x" * 200_000):
        path = tmp_path / "file"
        path.write_text(text)
        assert main(["check", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 3


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    assert main([*SHOW, "--svg", str(target)]) == 2
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
    real, link, pipe = tmp_path / "real.csv", tmp_path / "link.csv", tmp_path / "pipe"
    link.symlink_to(real)
    assert main([*SHOW, "--csv", str(link)]) == 0
    assert link.is_symlink() and real.read_text().startswith("0F0,")
    # As root, a rename would turn /dev/null into a regular file for the whole machine; a pipe stands for it here.
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert main([*SHOW, "--csv", str(pipe)]) == 0
        assert stat.S_ISFIFO(pipe.stat().st_mode) and os.read(reader, 1 << 16).startswith(b"0F0,")
    finally:
        os.close(reader)


def test_the_command_starts_without_torch_and_megatron():
    code = (
        "import sys, megatron_bfpp.cli as cli\n"
        "cli.main(sys.argv[1:])\n"
        "sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *SHOW], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "step time 33" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "megatron_bfpp.cli", *SHOW, "--group", "9"],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_only_the_module_of_a_command_is_imported():
    code = (
        "import sys, megatron_bfpp.cli as cli\n"
        "cli.main(sys.argv[1:])\n"
        "rooms = {name.split('.')[1] for name in sys.modules if name.startswith('megatron_bfpp.')}\n"
        "sys.exit(' '.join(sorted(rooms - {'cli', 'console', 'schedule', 'timeline'})) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *SHOW], check=False, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_word_is_listed_with_its_help(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.split("positional arguments:")[1].split("options:")[0]
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("    ")] == list(WORDS)
    with pytest.raises(SystemExit) as stop:
        main(["shwo"])
    assert stop.value.code == 2 and "invalid choice: 'shwo'" in capsys.readouterr().err


def test_a_fault_of_ours_is_a_traceback_and_no_mistake_of_the_user(monkeypatch, capsys):
    def fails(path):
        raise ValueError("a list has no such entry")

    monkeypatch.setattr("megatron_bfpp.schedule.formats.read", fails)
    assert main(["check", "plan.csv"]) == 3
    message = capsys.readouterr().err
    assert "Traceback" in message and "ValueError: a list has no such entry" in message
    assert "bfpp check: this is a fault of megatron_bfpp" in message


def test_a_file_whose_name_is_not_utf8_is_written_and_named(tmp_path):
    command = [sys.executable, "-m", "megatron_bfpp.cli", *SHOW, "--svg", b"\xff.svg"]
    done = subprocess.run(command, check=False, capture_output=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and done.stderr == b""
    assert os.listdir(bytes(tmp_path)) == [b"\xff.svg"]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out


def test_every_order_goes_by_the_name_that_bench_and_plan_give_it(capsys):
    from megatron_bfpp.schedule.names import ORDERS

    size = ["show", "--pp", "4", "--chunks", "2", "--microbatches", "8"]
    assert main([*size, *(word for name in ORDERS for word in ("--order", name)), "--hop", "0.5", "--wide"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip(":") for line in lines if line.endswith(":")] == list(ORDERS)
    # 1F1B has two chunks' forwards in one: 6 (8 + 3) and its hops; breadth-first hides all of them but those at both
    # ends. A split backward saves 3 (i + w) = 6, and a hop by the longer lags that a job chooses for a network.
    steps = [float(line.split()[2]) for line in lines if line.startswith("step time")]
    assert steps[0] == 74 and steps[1] == 64 and steps[2:] == [60, 60, 60, 53.5]
    assert "peak live activations 8 (pp_rank 0) to 2" in lines[5]  # of chunks, as for the others


def test_a_file_is_shown_as_what_it_holds(tmp_path, capsys):
    order, plan, other = (tmp_path / name for name in ("order.csv", "plan.csv", "again.csv"))
    assert main([*SHOW, "--csv", str(order)]) == 0 and main([*SHOW, "--plan", "--csv", str(plan)]) == 0
    assert main(["show", str(order), "--csv", str(other)]) == 0
    assert other.read_text() == order.read_text()
    assert main(["show", str(order), "--plan", "--csv", str(other)]) == 0 and other.read_text() == plan.read_text()
    capsys.readouterr()
    assert main(["show", str(order), str(plan), "--order", "interleaved", *SHOW[1:], "--gather", "2"]) == 0
    found = capsys.readouterr().out
    assert "order.csv:" in found and "plan.csv:" in found and "interleaved:" in found
    assert found.count("step time 35 forward units") == 3  # the first gather stands before everything


def test_a_planned_trace_has_the_lanes_of_a_measured_one_and_is_not_taken_for_it(tmp_path, capsys):
    path = tmp_path / "plan.json"
    orders = ["--order", "interleaved", "--order", "breadth-first"]
    assert main([*SHOW, *orders, "--hop", "0.5", "--reduction", "3", "--gather", "1", "--trace", str(path)]) == 0
    document = json.loads(path.read_text())
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    computed = [event for event in events if event["cat"] == "compute"]
    assert len(computed) == 2 * 4 * 2 * 2 * 4 and {event["pid"] for event in computed} == set(range(8))
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    assert names == [f"{order} pp_rank {rank}" for order in ("interleaved", "breadth-first") for rank in range(4)]
    lanes = {}
    for event in sorted(events, key=lambda event: event["ts"]):
        before = lanes.get((event["pid"], event["tid"]), 0.0)
        assert event["ts"] >= before - 1e-6, event
        lanes[event["pid"], event["tid"]] = event["ts"] + event["dur"]
    reductions = [event for event in events if event["name"].endswith("REDUCE_GRAD")]
    assert len(reductions) == 2 * 4 * 2 and {event["dur"] for event in reductions} == {3000.0}
    arrows = [event for event in document["traceEvents"] if event["ph"] in "sf"]
    assert len(arrows) == 2 * 2 * 2 * 7 * 4 and len({event["id"] for event in arrows}) == len(arrows) / 2
    step = max(event["ts"] + event["dur"] for event in events if event["pid"] >= 4)
    assert step == pytest.approx(1000 * document["otherData"]["schedules"][1]["step"])
    assert main(["trace", str(path)]) == 2 and "no trace of megatron_bfpp" in capsys.readouterr().err
