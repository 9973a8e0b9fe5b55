import pytest

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
