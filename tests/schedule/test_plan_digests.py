"""Without a split backward not one byte of a plan has changed since commit 4f07e96, before which there was none.

The digests were taken from the code of that commit: `git archive 4f07e96 megatron_bfpp | tar -x -C DIR`, then
`PYTHONPATH=DIR python tests/schedule/test_plan_digests.py`, which prints this list with the digests of that code. A
change of a plan on purpose (another place for receives) brings new ones, and says so in the change log.
"""

import pytest

from megatron_bfpp.schedule import PipelineShape
from megatron_bfpp.schedule.plan import plan_of

# (P, V, M), group, eager, evaluation, resident chunks, hop -> digest
PLANS = {
    ((2, 1, 1), None, True, False, None, 0.25): "46b5a4df929b",
    ((2, 2, 2), None, True, False, None, 0.25): "eede07abd6a9",
    ((2, 1, 4), None, False, False, None, 0.25): "5ec0928671ac",
    ((3, 2, 5), None, True, False, None, 0.25): "5ede24275d57",
    ((4, 1, 8), None, True, False, None, 0.25): "3daeccc7ef52",
    ((4, 2, 3), None, True, False, None, 0.25): "9c7dff5a5c6f",
    ((4, 4, 4), None, True, False, None, 0.25): "8eb6597e55eb",
    ((4, 4, 8), None, False, False, None, 0.25): "317a3968177a",
    ((5, 3, 7), None, True, False, None, 0.0): "b622367945da",
    ((6, 2, 12), None, True, False, None, 1.0): "411779f39204",
    ((8, 4, 4), None, True, False, None, 0.25): "8a8150799cd4",
    ((8, 4, 8), None, True, False, None, 0.25): "d60ccc5847cb",
    ((8, 4, 16), None, False, False, None, 0.25): "267f558dfe2f",
    ((8, 2, 32), None, True, False, None, None): "b34c69fdeb43",
    ((4, 2, 8), None, True, False, None, None): "4baef4ee11bf",
    ((4, 2, 8), 2, True, False, None, 0.25): "bf4f908a98de",
    ((4, 3, 9), 3, False, False, None, 0.25): "2ea35fae4611",
    ((8, 4, 24), 8, True, False, None, 0.25): "a8cd8d5142f0",
    ((5, 2, 11), 4, True, False, None, 0.25): "f057996f728a",
    ((4, 4, 16), 4, False, False, None, 0.5): "b0a538eff638",
    ((2, 3, 4), None, True, False, 1, 0.25): "7d906673e37b",
    ((4, 4, 8), None, True, False, 2, 0.25): "1c8942dc071c",
    ((4, 4, 8), None, False, False, 4, 0.25): "927d1d7baed0",
    ((8, 3, 8), 4, True, False, 2, 0.25): "4cbdf076352e",
    ((3, 4, 6), 2, False, False, 3, None): "5caf36160d3c",
    ((2, 2, 2), None, True, True, None, 0.25): "2ed2dd78b110",
    ((4, 4, 8), None, True, True, None, 0.25): "7934609c600c",
    ((4, 2, 6), None, True, True, 1, 0.25): "c26eefe03dd2",
    ((8, 4, 16), None, False, True, 2, 0.25): "ac05a94057df",
}


def digest_of(sizes, group, eager, evaluation, resident, hop):
    return plan_of(PipelineShape(*sizes), group, eager, evaluation, resident, hop).digest


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_a_plan_with_whole_backwards_is_that_of_the_code_without_split_ones(case):
    assert digest_of(*case) == PLANS[case]


if __name__ == "__main__":
    for case in PLANS:
        print(f'    {case}: "{digest_of(*case)}",')
