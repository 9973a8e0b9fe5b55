"""The bfpp command: what it prints and writes, and its exit codes."""

from xml.etree import ElementTree

import pytest

from megatron_bfpp import __version__
from megatron_bfpp.cli import main

SHOW = ["show", "--pp", "4", "--chunks", "2", "--microbatches", "4"]


def test_show_draws_every_rank_and_the_predicted_bubble(capsys):
    assert main(SHOW) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[0].strip() for line in lines[:4]] == [f"pp_rank {rank}" for rank in range(4)]
    assert lines[3].split("|")[1].split()[:9] == [".", ".", ".", "f00", "f01", "f02", "f03", "f10", "b10"]
    assert lines[4].startswith("step time 33 forward units, bubble 27.3%")


def test_show_as_text_is_the_plan(capsys):
    assert main(["show", "--pp", "2", "--chunks", "2", "--microbatches", "2", "--text", "--backward", "late"]) == 0
    assert capsys.readouterr().out.splitlines() == ["0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1", "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1"]


def test_the_picture_has_a_box_for_each_action_of_each_order(tmp_path):
    path = tmp_path / "both.svg"
    assert main([*SHOW, "--order", "1f1b", "--order", "breadth-first", "--svg", str(path)]) == 0
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "--pp", "1", "--chunks", "2", "--microbatches", "4"], "pp_size is 1"),
        ([*SHOW, "--group", "9"], "group is 9"),
        ([*SHOW, "--order", "1f1b", "--group", "3"], "Megatron takes 4"),
        ([*SHOW, "--backward-time", "0"], "--backward-time"),
        ([*SHOW, "--svg", "/nowhere/picture.svg"], "--svg /nowhere/picture.svg cannot be written"),
        (["check", "/nowhere/plan.csv"], "/nowhere/plan.csv cannot be read"),
    ],
)
def test_bad_input_is_one_short_message_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) <= 3


def test_a_file_that_is_no_plan_is_bad_input(tmp_path, capsys):
    for text in ("hello\n", "", "\x00\x01", "0F0,9X9\n"):
        path = tmp_path / "file"
        path.write_text(text)
        assert main(["check", str(path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) <= 3


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    assert main([*SHOW, "--svg", str(target)]) == 2
    assert list(tmp_path.iterdir()) == [target]


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out
