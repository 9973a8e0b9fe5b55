"""docs/reference/megatron_features.md is true: its messages are those that users see, and its tests exist."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration.flags.arguments import refuse
from megatron_bfpp.integration.flags.settings import Settings

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "reference" / "megatron_features.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"`((--\S+)(?: (\S+))? does not work with --pipeline-schedule breadth-first: [^`]*)`", DOC)


@pytest.mark.parametrize(("message", "flag", "value"), MESSAGES)
def test_messages(message, flag, value):
    args = SimpleNamespace(
        pipeline_model_parallel_size=2, mock_data=True, **{flag[2:].replace("-", "_"): value or True}
    )
    with pytest.raises(UserError) as refusal:
        refuse(args, Settings(schedule="breadth-first"))
    assert str(refusal.value).splitlines()[0] == message


def test_every_refusal_of_a_flag_is_in_the_table():
    from megatron_bfpp.integration.flags.arguments import _REFUSED

    assert len(MESSAGES) >= 6
    assert {flag for _, flag, *_ in _REFUSED} - set(re.findall(r"--[a-z0-9-]+", DOC)) == set()


def test_every_case_is_named_and_every_file_is_there():
    import test_features
    import test_schedule_features

    words = set(re.findall(r"\w+", DOC))
    assert test_features.SOME_CASES.keys() | test_features.MORE_CASES.keys() <= words
    features = test_schedule_features.TWO_RANKS + test_schedule_features.FOUR_RANKS
    assert {feature.__name__[1:] for feature in features} <= words
    for path in re.findall(r"`((?:tests|megatron_bfpp)/[\w/]+\.py)`", DOC):
        assert (ROOT / path).exists(), path
