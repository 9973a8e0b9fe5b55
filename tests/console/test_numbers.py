"""Numbers of the command line are refused where they are read, with what would be right."""

import argparse

import pytest

from megatron_bfpp.console.numbers import at_least, between, positive


def error_of(kind, text, capsys):
    parser = argparse.ArgumentParser(prog="bfpp")
    parser.add_argument("--n", type=kind)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args([f"--n={text}"])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_good_numbers_keep_their_kind():
    assert at_least(1)("7") == 7 and isinstance(at_least(1)("7"), int)
    assert at_least(0)("0") == 0
    assert at_least(1, 3)("3") == 3
    assert between(0, 10_000)("1e4") == 10_000.0
    assert between(-1, 1)("-1") == -1.0
    assert positive("1e-9") == 1e-9


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "", "x", "nan", "1e3", "9" * 5000])
def test_what_is_no_count_is_refused_in_one_line(text, capsys):
    error = error_of(at_least(1), text, capsys)
    assert error.startswith("bfpp: error: argument --n: ") and "a whole number" in error


def test_a_bound_above_is_named_where_it_is_passed(capsys):
    assert "'4' is not a whole number from 1 to 3" in error_of(at_least(1, 3), "4", capsys)
    assert "from 1 to 1000000000" in error_of(at_least(1), str(10**10), capsys)
    assert "'0' is not a whole number of at least 1" in error_of(at_least(1), "0", capsys)


@pytest.mark.parametrize("text", ["-0.1", "10000.1", "nan", "inf", "-inf", "1e999", "one", ""])
def test_what_lies_outside_an_interval_is_refused(text, capsys):
    assert f"argument --n: {text!r} is not a number from 0 to 10000" in error_of(between(0, 10_000), text, capsys)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "many"])
def test_what_is_not_positive_is_refused(text, capsys):
    assert f"argument --n: {text!r} is not a number above 0" in error_of(positive, text, capsys)
