import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: many processes on few cores
sys.path.insert(0, str(Path(__file__).parent / "support"))  # for the processes that tests fork, too
