"""What the schedule tests share: every shape that the issue names, and plans from text."""

from hypothesis import strategies as st

from megatron_bfpp.schedule import PipelineShape, formats

shapes = st.builds(PipelineShape, st.integers(2, 8), st.integers(1, 4), st.integers(1, 17))


def parse(*rows):
    return formats.from_text("\n".join(rows))


def text(schedule):
    return formats.to_text(schedule).splitlines()
