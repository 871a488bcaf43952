"""`python -m megatree.cli`, which is also how torchrun starts it: `torchrun -m megatree.cli train ...`."""

import sys

from megatree.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
