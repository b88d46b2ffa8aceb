"""Train from a checkout, without installing anything but the dependencies.

    python reference/train.py DATA --size demo -o run       as gemma3-export train
    torchrun --nproc-per-node 2 reference/train.py DATA --size demo -o run

``gemma3-export data`` makes DATA; without installation: python -m gemma3_export data -o DATA.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The script's own folder would offer its modules under generic names.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from gemma3_export.cli import main

    sys.argv.insert(1, "train")
    main()
