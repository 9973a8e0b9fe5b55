"""What ranks compare before a model is built, without ranks: threads around one store."""

from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")

from torch.distributed import HashStore

from megatron_bfpp.console.errors import UserError
from megatron_bfpp.integration import process
from megatron_bfpp.integration.reliability import agreement

SAME = {"--seq-length": "32", "--data-path": "['/a/text']", "the version of torch": "2.14.1"}


def results(records: list[dict[str, str] | None]) -> list[str]:
    """What `agree` returns or raises in each rank; a rank without a record does not take part."""
    store = HashStore()

    def rank(number: int) -> str:
        try:
            return agreement.agree(store, records[number], number, len(records), timeout_s=2)
        except UserError as error:
            return f"refused: {error}"

    taking_part = [number for number, record in enumerate(records) if record is not None]
    with ThreadPoolExecutor(len(records)) as pool:
        return list(pool.map(rank, taking_part))


def test_ranks_that_agree_have_one_hash():
    found = results([SAME] * 4)
    assert len(set(found)) == 1 and len(found[0]) == 12
    assert set(results([{**SAME, "--seq-length": "64"}] * 2)) != set(found)


def test_a_difference_is_told_to_all_with_both_values():
    found = results([SAME, SAME, {**SAME, "--seq-length": "64"}])
    assert len(set(found)) == 1
    assert "a rank differs from rank 0: --seq-length is 64 on rank 2 and 32 on rank 0" in found[0]
    assert len(found[0].splitlines()) == 2


def test_many_differences_are_counted():
    odd = {name: f"{value}0" for name, value in SAME.items()} | {"--new": "1"}
    found = results([SAME, odd, odd])
    assert "2 of 3 ranks differ from rank 0: --seq-length is 320 on rank 1" in found[0] and "more" in found[0]


def test_a_flag_that_one_side_does_not_know_differs():
    assert list(agreement.differences({"--a": "1"}, {"--b": "2"}, 1)) == [
        "--a is not known on rank 1 and 1 on rank 0",
        "--b is 2 on rank 1 and not known on rank 0",
    ]


def test_paths_may_differ():
    found = results([SAME, {**SAME, "--data-path": "['/b/text']"}])
    assert not any(each.startswith("refused") for each in found)


def test_a_rank_that_does_not_take_part_is_named():
    found = results([SAME, SAME, None])
    assert all("rank 2 has not compared its flags" in each or "rank 0 has not" in each for each in found)
    assert any("rank 2" in each for each in found)


@pytest.mark.parametrize(
    "folder, version", [("/a/checkout/megatron/core", "0.20.0+608ae2a"), ("/b/site-packages/megatron/core", "0.20.0")]
)
def test_the_commit_of_a_checkout_counts_and_not_that_of_a_repository_around_an_environment(
    folder, version, monkeypatch
):
    from megatron.core import package_info

    monkeypatch.setattr(package_info, "__version__", "0.20.0+608ae2a")
    monkeypatch.setattr(package_info, "__file__", f"{folder}/package_info.py")
    assert process.versions.__wrapped__()["megatron-core"] == version
