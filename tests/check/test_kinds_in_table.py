"""The table of bfpp check names the kinds of layers of a hybrid model."""

from megatron_bfpp.check.table import report


def test_letters_stand_beside_the_layers_and_long_stages_are_cut():
    kinds = ["M*", "M-", "M*", "*-", "M-M-M-M-", "M-M-M-M-M-"]
    ends = [2, 4, 6, 8, 16, 26]
    layers = [dict.fromkeys(range(end - len(each) + 1, end + 1), 10) for end, each in zip(ends, kinds, strict=True)]
    chunks = [
        {"stage": stage, "layers": each, "parameters": 10 * len(each), "planned": 10 * len(each)}
        for stage, each in enumerate(layers)
    ]
    job = {
        "tp": 1, "pp": 2, "dp": 1, "chunks": 3, "micro_batch": 1, "num_microbatches": 4, "resident_chunks": None,
        "schedule": "breadth-first", "stage_kinds": kinds, "told": [], "changed": [],
    }  # fmt: skip
    ranks = [{"pp_rank": rank, "chunks": chunks[rank::2]} for rank in range(2)]
    content = {"job": job, "world_size": 2, "plans": [], "ranks": ranks, "capability": 9, "not_compared": "",
               "notes": [], "findings": []}  # fmt: skip
    rows = [line.split() for line in report(content, "--gpus").splitlines()[2:7]]
    assert rows == [
        ["0", "0-1", "1-2:M*", "5-6:M*", "20"], ["2", "9-16:M-M-M-M-", "80"],
        ["1", "0", "3-4:M-", "20"], ["1", "7-8:*-", "20"], ["2", "17-26:M-M-M-..", "100"],
    ]  # fmt: skip
