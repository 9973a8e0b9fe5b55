"""Refuse the parts of Megatron's command line that breadth-first cannot do, before any model is built."""

import os
from typing import Any

from ...console.errors import UserError
from . import fully_sharded
from .batches import batch_sizes
from .settings import Settings, is_sharded, timeout_of

_ONLY_1F1B = "use --pipeline-schedule 1f1b"
_LOCAL_GRAPHS = "use --cuda-graph-impl local"
# argument, flag, why it does not work with this schedule, what to do instead of leaving it out.
_REFUSED = (
    ("overlap_moe_expert_parallel_comm", "--overlap-moe-expert-parallel-comm",
     "it runs forwards and backwards in pairs, as only 1F1B has them", _ONLY_1F1B),
    ("delay_wgrad_compute", "--delay-wgrad-compute",
     "Megatron takes it only with --overlap-moe-expert-parallel-comm, which needs the pairs of 1F1B", _ONLY_1F1B),
    ("hybrid_context_parallel", "--hybrid-context-parallel", "Megatron has it without pipeline ranks only",
     "use --context-parallel-size"),
    ("use_megatron_fsdp", "--use-megatron-fsdp", "Megatron-FSDP cannot be built with pipeline ranks",
     "use --use-torch-fsdp2"),
)  # fmt: skip


def refuse(args: Any, settings: Settings) -> None:
    """Raise UserError for what breadth-first cannot do, before anything is built."""
    if args.pipeline_model_parallel_size < 2:
        needs = f"needs pipeline ranks, but --pipeline-model-parallel-size is {args.pipeline_model_parallel_size}"
        instead = "Use --pipeline-model-parallel-size 2 or more, or --pipeline-schedule 1f1b"
        raise UserError(f"--pipeline-schedule breadth-first {needs}.\n  {instead}.")
    for name, flag, why, instead in _REFUSED:
        if getattr(args, name, None):
            _refuse(flag, why, instead)
    _refuse_graphs(args, settings)
    if args.pipeline_model_parallel_size == 2 and getattr(args, "overlap_p2p_comm", True) is False:
        why = "on 2 pipeline ranks Megatron takes chunks only with the overlap"
        _refuse("--no-overlap-p2p-communication", why, "use 3 or more pipeline ranks")
    if settings.engine == "megatron":
        loop, instead = "Megatron's loop (--breadth-first-engine megatron)", "use --breadth-first-engine plan"
        if settings.group_size is not None:
            _refuse("--breadth-first-group-size", f"{loop} has one group here, all micro-batches", instead)
        if settings.weight_gradients != "with-backward":
            flag = f"--breadth-first-weight-gradients {settings.weight_gradients}"
            _refuse(flag, f"{loop} has whole backwards", instead)
        if settings.debug_p2p:
            _refuse("--bfpp-debug-p2p", f"{loop} sends its messages itself", instead)
    timeout_of(args)
    fully_sharded.refuse(args, settings)
    _check_warmup(args)
    _check_data(args)


def refuse_on_cuda(args: Any, settings: Settings) -> None:
    """Refuse what waits for the whole device within a step: receives are posted ahead, and their kernels wait there.

    Read and simulated, not run on a GPU: Megatron's own orders survive such waits.
    """
    if settings.engine != "plan":
        return
    if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        raise UserError(
            "CUDA_LAUNCH_BLOCKING is set: the host would wait for ever for a receive whose message is sent later.\n"
            "  Unset it, or use --breadth-first-engine megatron or --pipeline-schedule 1f1b."
        )
    if (getattr(args, "timing_log_level", None) or 0) > 1:
        why = "its timers wait for the device, and so for receives whose messages are sent only later"
        _refuse("--timing-log-level 2", why, "use --timing-log-level 1")


def _refuse_graphs(args: Any, settings: Settings) -> None:
    """Refuse all CUDA graphs but those that Megatron captures per layer, and what these cannot do.

    The reasons were found by reading Megatron, and by running its graphs on a CPU (tests/support/graphs.py).
    """
    graphs = getattr(args, "cuda_graph_impl", None) or "none"
    flag = f"--cuda-graph-impl {graphs}"
    for name, meaning in (("external_cuda_graph", "transformer_engine"), ("enable_cuda_graph", "local")):
        if getattr(args, name, None):
            graphs, flag = meaning, "--" + name.replace("_", "-")
    if graphs == "none":
        return
    names = ("cuda_graph_scope", "cuda_graph_scope_deprecated")
    scopes = [getattr(scope, "name", scope) for name in names for scope in getattr(args, name, None) or ()]
    is_whole = graphs == "full_iteration" or "full_iteration" in scopes
    for is_given, why, instead in (
        (graphs == "transformer_engine", "Megatron has Transformer Engine capture them in 1F1B's order", _LOCAL_GRAPHS),
        (is_whole, "the step asks whether messages have arrived, which a capture forbids", _LOCAL_GRAPHS),
        (settings.engine == "megatron", "Megatron's loop frees what it has sent, and that memory is a graph's",
         "use --breadth-first-engine plan"),
        (settings.weight_gradients != "with-backward", "a graph's backward computes the weights' gradients too",
         "use --breadth-first-weight-gradients with-backward"),
        (is_sharded(args), "a graph needs parameters that stay where they are", "leave out --use-torch-fsdp2"),
        (getattr(args, "transformer_impl", None) == "local",
         "what torch's own layers keep for their backward is lost: Megatron finds only what Transformer Engine's keep",
         "use --transformer-impl transformer_engine"),
        (getattr(args, "fp8", None) or getattr(args, "fp4", None),
         "Megatron notes per graph whether weights must be rounded anew, and forgets it with a graph per micro-batch",
         "leave out --fp8-format and --fp4-format"),
        (not hasattr(args, "cuda_graph_modules"), "before megatron-core 0.18 a layer's input does not last",
         "use megatron-core 0.18 or later"),
    ):  # fmt: skip
        if is_given:
            _refuse(flag, why, instead)
    sizes, grows = batch_sizes(args)
    if len(sizes) > 1:
        _refuse(flag, "they are captured for one number of micro-batches", f"leave out {grows}")


def _refuse(flag: str, why: str, instead: str) -> None:
    wrong = f"{flag} does not work with --pipeline-schedule breadth-first: {why}"
    raise UserError(f"{wrong}.\n  Leave out {flag.split()[0]}, or {instead}.")


def _check_warmup(args: Any) -> None:
    """Refuse a learning rate that warms up longer than it decays; Megatron would find out after the model is built."""
    unit = next((unit for unit in ("iters", "samples") if getattr(args, f"train_{unit}", None)), None)
    if unit is None or getattr(args, "skip_train", False):
        return
    decay, flag = getattr(args, f"lr_decay_{unit}", None), f"--lr-decay-{unit}"
    if decay is None:
        decay, flag = getattr(args, f"train_{unit}"), f"--train-{unit}"
    fraction = getattr(args, "lr_warmup_fraction", None)
    if fraction is not None and fraction >= 1:
        raise UserError(f"--lr-warmup-fraction is {fraction}: no step is left to decay in.\n  Use a number below 1.")
    warmup = getattr(args, f"lr_warmup_{unit}", None) or 0
    if fraction is None and warmup >= decay:
        raise UserError(
            f"--lr-warmup-{unit} is {warmup}, but the learning rate has decayed after {decay} ({flag}).\n"
            f"  Use --lr-warmup-{unit} {max(0, decay - 1)} or less, or a larger {flag}."
        )


def _check_data(args: Any) -> None:
    """Refuse data files that are not there; Megatron would find out after the model is built."""
    if getattr(args, "mock_data", False):
        return
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for prefix in getattr(args, name, None) or []:
            if _is_number(prefix) or "://" in prefix:  # a weight of the blend; an object store
                continue
            for ending in (".idx", ".bin"):
                if not os.path.exists(prefix + ending):
                    flag = "--" + name.replace("_", "-")
                    raise UserError(
                        f"{flag} {prefix}: the file {prefix}{ending} does not exist.\n"
                        f"  Give the path without its ending; both {prefix}.idx and {prefix}.bin must be there."
                    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
