import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: many processes on few cores
