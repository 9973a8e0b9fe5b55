"""What a rank of a sharded job did, seen from outside: collectives on its process groups, and bytes in its tensors."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist


class Watch:
    """For gpt.train's `prepare`: writes seen<rank>.json when the rank has trained.

    gathers, reductions: all-gathers and reduce-scatters on the data-parallel group, and the bytes each has sent to the
    other replicas. parameters: of each chunk. peak bytes: the most that parameters, gradients and the optimizer's state
    took at one time, looked at after every action and at every reduction. groups: of reductions, and how many of them
    gather too.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self) -> None:
        self.seen = {"gathers": 0, "reductions": 0, "gathered bytes": 0, "reduced bytes": 0, "peak bytes": 0}
        self.groups = {"gather": set(), "reduc": set()}  # names of the process groups
        self.model = self.optimizer = None
        for names, kind, size in (
            (("all_gather_single", "_allgather_base"), "gather", lambda output, given: given.nbytes),
            (("reduce_scatter_single", "_reduce_scatter_base"), "reduc", lambda output, given: output.nbytes),
        ):
            name = next(name for name in names if hasattr(dist.ProcessGroup, name))
            setattr(dist.ProcessGroup, name, self._counting(getattr(dist.ProcessGroup, name), kind, size))
        self._watch_training()

    def _counting(self, original, kind, size):
        from megatron.core import parallel_state

        def collective(group, output, given, *args, **kwargs):
            replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
            if dist.get_process_group_ranks(group) == dist.get_process_group_ranks(replicas):
                self.groups[kind].add(group.group_name)
                self.seen["gathers" if kind == "gather" else "reductions"] += 1
                # A ring sends each rank's part to every other rank.
                self.seen["gathered bytes" if kind == "gather" else "reduced bytes"] += size(output, given) * (
                    group.size() - 1
                )
            result = original(group, output, given, *args, **kwargs)
            self._look()
            return result

        return collective

    def _watch_training(self):
        from megatron.training import training

        from megatron_bfpp.integration.step import forward_backward

        setup, train = training.setup_model_and_optimizer, training.train

        def with_model(*args, **kwargs):
            self.model, self.optimizer, scheduler = setup(*args, **kwargs)
            self.seen["parameters"] = [sum(each.numel() for each in chunk.parameters()) for chunk in self.model]
            return self.model, self.optimizer, scheduler

        def to_the_end(*args, **kwargs):
            result = train(*args, **kwargs)
            self.seen["groups"] = [len(self.groups["reduc"]), len(self.groups["reduc"] & self.groups["gather"])]
            (self.folder / f"seen{os.environ['RANK']}.json").write_text(json.dumps(self.seen))
            return result

        training.setup_model_and_optimizer, training.train = with_model, to_the_end

        @contextmanager
        def looking(action):
            yield
            self._look()

        forward_backward._span = lambda: looking

    def _look(self):
        if self.model is None:
            return
        storages = {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in self._tensors()}
        self.seen["peak bytes"] = max(self.seen["peak bytes"], sum(storages.values()))

    def _tensors(self):
        from torch.distributed.fsdp import FSDPModule

        for chunk in self.model:
            for module in chunk.modules():
                if isinstance(module, FSDPModule):
                    for group in module._get_fsdp_state()._fsdp_param_groups:
                        yield from self._of_group(group)
        for optimizer in self.optimizer.chained_optimizers:
            for state in optimizer.optimizer.state.values():
                yield from (local(value) for value in state.values() if torch.is_tensor(value))

    def _of_group(self, group):
        if group._all_gather_result is not None:
            yield group._all_gather_result.all_gather_output
        reductions = getattr(group.comm_ctx, "reduce_scatter_states", ())  # none before the first forward
        yield from (state.reduce_scatter_input for state in reductions)
        for each in group.fsdp_params:
            yield each._sharded_param_data
            if each.sharded_param.grad is not None:
                yield local(each.sharded_param.grad)
            if hasattr(each, "_unsharded_param"):
                yield from each.all_gather_outputs
                yield from (
                    grad for grad in (each._unsharded_param.grad, each.unsharded_accumulated_grad) if grad is not None
                )


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)
