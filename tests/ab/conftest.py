import pytest
from cluster import Cluster, why_not

from megatron_bfpp.data import build


@pytest.fixture(scope="module")
def cluster():
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as started:
        yield started
    assert not started.processes()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The quickstart's data set: the value of --data-path."""
    return build(tmp_path_factory.mktemp("data") / "text")[0]
