"""Lowering: a plan written out, and where its receives, gathers and reductions stand."""

from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import shapes, text

from megatron_bfpp.schedule import Action, Op, PipelineShape, breadth_first, forward_only, lower
from megatron_bfpp.schedule.ir import COMPUTE, RECEIVES


def test_the_plan_of_2_ranks_1_chunk_2_microbatches_written_out():
    shape = PipelineShape(2, 1, 2)
    assert text(lower(breadth_first(shape, eager_backward=False), shape)) == [
        "0UNSHARD 0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1 0REDUCE_GRAD",
        "1UNSHARD 1RECV_F0 1RECV_F1 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1 1REDUCE_GRAD",
    ]


def test_the_eager_plan_of_2_ranks_2_chunks_2_microbatches_written_out():
    shape = PipelineShape(2, 2, 2)
    rank_0, rank_1 = text(lower(breadth_first(shape), shape))
    assert rank_0 == (
        "0UNSHARD 2UNSHARD 0F0 0SEND_F0 2RECV_F0 0F1 0SEND_F1 2RECV_F1 2F0 2SEND_F0 2RECV_B0 2F1 "
        "2SEND_F1 2RECV_B1 2B0 2SEND_B0 0RECV_B0 2B1 2SEND_B1 2REDUCE_GRAD 0RECV_B1 0B0 0B1 0REDUCE_GRAD"
    )
    assert rank_1 == (
        "1UNSHARD 1RECV_F0 1RECV_F1 3UNSHARD 1F0 1SEND_F0 3RECV_F0 1F1 1SEND_F1 3RECV_F1 3F0 3B0 "
        "3SEND_B0 3F1 1RECV_B0 3B1 3SEND_B1 3REDUCE_GRAD 1RECV_B1 1B0 1SEND_B0 1B1 1SEND_B1 1REDUCE_GRAD"
    )


def test_an_evaluation_neither_gathers_nor_reduces():
    shape = PipelineShape(2, 1, 2)
    assert text(lower(forward_only(shape), shape)) == ["0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1RECV_F1 1F0 1F1"]


@given(shapes, st.data(), st.booleans())
@settings(deadline=None)
def test_lowering_keeps_the_order(shape, data, eager):
    order = breadth_first(shape, data.draw(st.none() | st.integers(1, shape.num_microbatches)), eager)
    assert [[action for action in actions if action.op in COMPUTE] for actions in lower(order, shape)] == order


@given(shapes, st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_receive_is_posted_before_the_action_ahead_of_its_use(shape, eager):
    # One action ahead of need at the latest, so that a message can arrive while the rank computes.
    for actions in lower(breadth_first(shape, eager_backward=eager), shape):
        computes = [action for action in actions if action.op in COMPUTE]
        for position, action in enumerate(actions):
            if action.op in RECEIVES:
                user = Action(action.stage, Op.F if action.op is Op.RECV_F else Op.B, action.microbatch)
                before = sum(other.op in COMPUTE for other in actions[:position])
                assert before <= max(0, computes.index(user) - 1)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_each_chunk_is_gathered_once_ahead_of_its_use_and_reduced_once_right_after_its_last_backward(shape):
    for rank, actions in enumerate(lower(breadth_first(shape), shape)):
        for stage in shape.stages_on(rank):
            gather, reduce = (actions.index(Action(stage, op)) for op in (Op.UNSHARD, Op.REDUCE_GRAD))
            first = Action(max(rank, stage - shape.pp_size), Op.F, 0)
            assert gather < actions.index(first)
            last = actions.index(Action(stage, Op.B, shape.num_microbatches - 1))
            assert all(action.op is Op.SEND_B for action in actions[last + 1 : reduce])
            assert actions.count(Action(stage, Op.UNSHARD)) == actions.count(Action(stage, Op.REDUCE_GRAD)) == 1
