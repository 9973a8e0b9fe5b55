"""--bfpp-trace-steps: record steps of training on all pipeline ranks of one replica, and write them as a trace.

The recorded ranks are those of data-parallel, context-parallel and tensor-parallel rank 0. Within a step they only take
notes. Before it the ranks compare their clocks; after it their notes go to the first rank, which writes the file anew
and sends all ranks the step's bubble and waits, for the logs.

The plan's engine records its actions and waits. Under Megatron's own loops (1f1b, --breadth-first-engine megatron)
schedules.forward_step and backward_step are wrapped for the recorded steps. Their actions are the same; the waits for
messages stand between them and cannot be told from other idle time there.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import schedules
from torch.nn import Module

from ...console.version import __version__
from ...runtime.clocks import clock_of, offset_to_first
from ...schedule import Action, Op, PipelineShape
from ...timeline.document import Trace
from ...timeline.intervals import Interval
from ...timeline.measured import Measured, measure
from ...timeline.recorder import Recorder
from ...timeline.trace import picture
from .. import process
from ..flags.batches import microbatches_now
from ..flags.settings import settings_of, word_of_job
from ..process import noted, say, this_device, write_or_warn
from ..seams import changed
from ..step.groups import local_group


@dataclass
class Tracing:
    """Records the steps of training from the first to the last of `steps`."""

    steps: tuple[int, int]
    trace_path: str
    picture_path: str | None
    tracer: "Tracer | None" = None  # from the first recorded step on

    def around(self, train_step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        options = process.megatron_args()
        step = options.curr_iteration + 1  # as the log counts
        process.RECORDING.measured = {}
        if not self.steps[0] <= step <= self.steps[1]:
            return train_step(*args, **kwargs)
        tracer = self.tracer = self.tracer or Tracer(options, self.trace_path, self.picture_path)
        given = inspect.signature(train_step).bind(*args, **kwargs)
        given.arguments["forward_backward_func"] = tracer.last_of(given.arguments["forward_backward_func"])
        with tracer.recording(given.arguments["model"]):
            answer = train_step(*given.args, **given.kwargs)
        process.RECORDING.measured = tracer.collect(step, is_last=step == self.steps[1])
        return answer


class Tracer:
    """The recorder of the pipeline that this rank belongs to. Collective over all ranks."""

    def __init__(self, args: Any, trace_path: str, picture_path: str | None):
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        self._pp_rank, self._first = group.rank(), ranks[0]
        self._is_recorded = (
            parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
            and parallel_state.get_tensor_model_parallel_rank() == 0
        )
        settings, word = settings_of(args), word_of_job(args, microbatches_now())
        self._has_plan = settings.schedule != "1f1b" and settings.engine == "plan"
        about = {"schedule": word, "waits": self._has_plan, "megatron_bfpp": __version__}
        self._trace = Trace(group.size(), about)
        self._paths = trace_path, picture_path
        if self._is_recorded:
            self._recorder = Recorder(clock_of(this_device()))
            # Over gloo: comparing clocks must not wait for a GPU. The group of a pipeline is made by its ranks alone.
            self._group = local_group(ranks, "CLOCKS", backend="gloo")

    @contextmanager
    def recording(self, model: list[Module]) -> Iterator[None]:
        """Record the step that runs within; the clocks are compared first."""
        if not self._is_recorded:
            yield
            return
        self._shape = PipelineShape(self._trace.pp_size, len(model), microbatches_now())
        self._offset, error = offset_to_first(self._group)
        self._error = error + self._recorder.begin()
        dist.barrier(self._group)  # the others have compared theirs too: no rank starts early only to wait
        with ExitStack() as stack:
            for chunk, module in enumerate(model):
                for owner, name, op in _waits_of_replicas(module):
                    action = Action(self._shape.stages_on(self._pp_rank)[chunk], op)
                    stack.enter_context(noted(owner, name, action, self._recorder))
            if self._has_plan:
                stack.enter_context(changed(process.RECORDING, recorder=self._recorder))
            else:
                wrapped = _steps_of_megatron(self._recorder, self._shape, self._pp_rank)
                stack.enter_context(changed(schedules, **wrapped))
            yield

    def last_of(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the schedule: forget the notes of a step when it runs again.

        Megatron's rerun state machine repeats a step whose loss it doubts. The last run is traced.
        """
        is_again = False

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_again
            if is_again and self._is_recorded:
                self._recorder.noted.clear()
            is_again = True
            return forward_backward(*args, **kwargs)

        return wrapper

    def collect(self, step: int, is_last: bool) -> dict[str, Any]:
        """Return, after a recorded step and on all ranks, its bubble and waits. The first rank writes the trace."""
        found: list[Any] = [None]
        if self._is_recorded:
            intervals = [
                Interval(action, kind, start + self._offset, end + self._offset)
                for action, kind, start, end in self._recorder.take()
            ]
            gathered: list[Any] | None = [None] * self._trace.pp_size if self._pp_rank == 0 else None
            dist.gather_object((intervals, self._offset, self._error), gathered, dst=self._first, group=self._group)
            if gathered is not None:
                found = [self._add(step, gathered, is_last)]
        dist.broadcast_object_list(found, src=0)  # the first rank is the first of the recorded pipeline
        return found[0]  # type: ignore[no-any-return]

    def _add(self, step: int, gathered: list[tuple[list[Interval], int, int]], is_last: bool) -> dict[str, Any]:
        ranks = [each[0] for each in gathered]
        offsets, errors = [each[1] / 1000 for each in gathered], [each[2] / 1000 for each in gathered]
        events = self._trace.add(step, self._shape, ranks, clock_offset_us=offsets, clock_error_us=errors)
        measured = measure(self._shape, events, self._has_plan)
        trace_path, picture_path = self._paths
        write_or_warn(trace_path, json.dumps(self._trace.document()), "--bfpp-trace-steps")
        if picture_path is not None and is_last:
            write_or_warn(picture_path, picture(measured, step), "--bfpp-trace-steps")
        if is_last:
            say(f"steps up to {step} are traced in {trace_path}; bubble {measured.bubble_fraction:.1%}")
        return metrics_of(measured)


def metrics_of(measured: Measured) -> dict[str, Any]:
    """Return the fields of a line of the step log: seconds, per pp_rank."""
    p2p = measured.exposed_p2p
    return {
        "bubble_fraction_measured": measured.bubble_fraction,
        "exposed_p2p_s": None if p2p is None else [each / 1000 for each in p2p],
        "exposed_dp_s": [each / 1000 for each in measured.exposed_dp],
    }


def _waits_of_replicas(chunk: Module) -> Iterator[tuple[object, str, Op]]:
    """Yield (owner, method, kind) of every wait of Megatron's DistributedDataParallel for what it has launched."""
    if isinstance(chunk, DistributedDataParallel):
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            yield group, "finish_param_sync", Op.UNSHARD
            yield group, "finish_grad_sync", Op.REDUCE_GRAD


def _steps_of_megatron(recorder: Recorder, shape: PipelineShape, pp_rank: int) -> dict[str, Callable[..., Any]]:
    """Return schedules.forward_step and backward_step that note themselves; an output identifies its backward."""
    forward, backward = schedules.forward_step, schedules.backward_step
    signature = inspect.signature(forward)
    forwards: dict[int, Action] = {}  # id of the output, which the loop holds until its backward

    def forward_step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        stage = shape.stages_on(pp_rank)[given.get("vp_stage") or 0]
        action = Action(stage, Op.F, given["current_microbatch"])
        with recorder.span(action):
            answer = forward(*args, **kwargs)
        forwards[id(_tensor(answer[0]))] = action
        return answer

    def backward_step(input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        stage, _, microbatch = forwards.pop(id(_tensor(output_tensor)))
        with recorder.span(Action(stage, Op.B, microbatch)):
            return backward(input_tensor, output_tensor, *args, **kwargs)

    return {"forward_step": forward_step, "backward_step": backward_step}


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, list) else output
