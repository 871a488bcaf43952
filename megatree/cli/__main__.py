"""`python -m megatree.cli`, and so `torchrun -m megatree.cli train ...`."""

import sys

from megatree.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
