"""The text of `bfpp check --config`: a table of the ranks, the plans, the prediction, the changes, the findings."""

from itertools import groupby
from typing import Any

__all__ = ["report"]

_SHOWN_LAYERS = 3  # of a row: the first, and the last
_SHOWN_KINDS = 8  # letters of a stage of a hybrid model


def report(content: dict[str, Any], world_size_source: str) -> str:
    """Return the text of what `bfpp check --json` writes."""
    parts = [_title(content, world_size_source), _table(content)]
    parts += [_plan(plan) for plan in content["plans"]]
    if "predicted" in content:
        parts.append(_prediction(content))
    if content["capability"] is None:
        parts.append("not checked: what Megatron demands on GPUs before Blackwell; --gpu names none of them")
    parts.append(_compared(content))
    parts += [f"read from the file: {note}" for note in content["notes"]]
    parts += [f"the plugin says: {line}" for line in content["job"]["told"]]
    parts += [f"changed for the dry run: {line}" for line in content["job"]["changed"]]
    parts += [f"FOUND: {finding}" for finding in content["findings"]] or ["found nothing wrong"]
    return "\n".join(parts)


def _compared(content: dict[str, Any]) -> str:
    """Say whether the parameters are as planned; the findings name those that are not."""
    if content["not_compared"]:
        return f"parameters not compared with those that bfpp plan counts: {content['not_compared']}"
    chunks = [chunk for rank in content["ranks"] for chunk in rank["chunks"]]
    different = sum(chunk["parameters"] != chunk["planned"] for chunk in chunks)
    if different:
        return f"parameters of {different} of {len(chunks)} chunks are not those that bfpp plan counts"
    return f"parameters of all {len(chunks)} chunks: as bfpp plan counts them"


def _title(content: dict[str, Any], source: str) -> str:
    job = content["job"]
    size = ""
    if "parameters" in content:
        count = content["parameters"]
        size = f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.2f}M"
        size += f" parameters, {content['precision']}, "
    chunks = f" x {job['chunks']} chunks" if job["chunks"] > 1 else ""
    return (
        f"{size}{content['world_size']} GPUs ({source}): TP {job['tp']}, PP {job['pp']}{chunks}, DP {job['dp']}; "
        f"{job['schedule']}, {job['num_microbatches']} micro-batches of {job['micro_batch']}"
    )


def _table(content: dict[str, Any]) -> str:
    is_predicted = "predicted" in content
    header = f"{'pp_rank':>7}{'chunk':>8}  {'layers':<24}{'parameters':>14}"
    if is_predicted:
        header += (
            f"{'p+g+opt GB':>13}{'activations':>13}{'sum':>7}  of {content['predicted']['usable_memory'] / 1e9:.1f} GB"
        )
    lines = [header]
    for rank in content["ranks"]:
        rows = _rows(rank["chunks"], content["job"]["stage_kinds"])
        memory = _memory(rank["memory"], content["predicted"]["usable_memory"]) if is_predicted else ""
        lines.append(f"{rank['pp_rank']:>7}{rows[0][0]}{memory}{rows[0][1]}")
        lines += [" " * 7 + row + different for row, different in rows[1:]]
    return "\n".join(lines)


def _rows(chunks: list[dict[str, Any]], stage_kinds: list[str]) -> list[tuple[str, str]]:
    """Return one row for neighbouring chunks that are alike, and behind it how many parameters are planned, if others
    are built.
    """
    rows = []
    numbered = list(enumerate(chunks))
    for _, same in groupby(numbered, key=lambda each: _alike(each[1], stage_kinds)):
        group = list(same)
        first, last = group[0][0], group[-1][0]
        names = [_layers(chunk["layers"]) + _kinds(stage_kinds[chunk["stage"]]) for _, chunk in group]
        if len(names) > _SHOWN_LAYERS:
            names = [*names[: _SHOWN_LAYERS - 1], "..", names[-1]]
        each = group[0][1]["parameters"]
        which = f"{first}-{last}" if last > first else f"{first}"
        planned = group[0][1].get("planned", each)
        different = f"  planned {planned:,}" if planned != each else ""
        rows.append((f"{which:>8}  {' '.join(names):<24}{each:>14,}", different))
    return rows


def _alike(chunk: dict[str, Any], stage_kinds: list[str]) -> tuple[int, int | None, int, str]:
    return chunk["parameters"], chunk.get("planned"), len(chunk["layers"]), stage_kinds[chunk["stage"]]


def _kinds(kinds: str) -> str:
    """Write the letters of a stage of a hybrid model as 1-3:M*-, and long ones short: the plugin says them all."""
    if len(kinds) > _SHOWN_KINDS:
        kinds = kinds[: _SHOWN_KINDS - 2] + ".."
    return f":{kinds}" if kinds else ""


def _layers(layers: dict[int, int]) -> str:
    if not layers:
        return "none"
    first, last = min(layers), max(layers)
    return f"{first}-{last}" if last > first else f"{first}"


def _memory(memory: dict[str, float], usable: float) -> str:
    state = memory["parameters"] + memory["gradients"] + memory["optimizer"]
    rest = memory["total"] - state
    fits = "fits" if memory["total"] <= usable else "TOO MUCH"
    return f"{state / 1e9:>13.1f}{rest / 1e9:>13.1f}{memory['total'] / 1e9:>7.1f}  {fits}"


def _plan(plan: dict[str, Any]) -> str:
    name = "Megatron's order" if plan["what"] == "Megatron's" else f"plan of {plan['what']}"
    if plan["unsound"]:
        return f"{name}, {plan['num_microbatches']} micro-batches: unsound"
    bubble = f"bubble {plan['bubble_fraction']:.1%}"
    line = f"{name}, {plan['num_microbatches']} micro-batches: sound, {bubble}, plan {plan['digest']}"
    if not plan["owed"]:
        return line
    return f"{line}; weights' gradients of {min(plan['owed'])} to {max(plan['owed'])} micro-batches wait on a rank"


def _prediction(content: dict[str, Any]) -> str:
    found = content["predicted"]
    bound = "at most " if found["is_bound"] else ""
    exposed = found["exposed_communication_s"] / found["step_s"]
    resident = found["resident_chunks"]
    counted = f" with {resident} resident chunks" if resident != content["job"]["resident_chunks"] else ""
    owed = max(rank["memory"]["owed"] for rank in content["ranks"])
    waiting = f"; owed weights' gradients keep up to {owed / 1e9:.2g} GB of the activations" if owed else ""
    return (
        f"predicted for {found['gpu']}{counted}: {bound}{found['step_s']:.3f} s a step, "
        f"{found['tokens_per_s_per_gpu']:.0f} tokens/s/GPU, {found['tflops_per_gpu']:.1f} TFLOP/s/GPU; "
        f"exposed communication {exposed:.1%}{waiting}"
    )
