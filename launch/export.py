"""ptm export, for torchrun: `torchrun --nproc-per-node 2 launch/export.py key=value ...`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout's ptm, installed or not

from ptm.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
