import sys
from pathlib import Path

# jobs.py, which starts ranks of Megatron, and measured.py, also for the processes it forks
sys.path[:0] = [str(Path(__file__).parent.parent / "distributed"), str(Path(__file__).parent)]
