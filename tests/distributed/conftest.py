import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # jobs.py, also for the processes it forks

pytest.importorskip("megatron.training", reason="needs megatron-core 0.17 or later")
