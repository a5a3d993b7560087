"""`python -m lowmem_dpo`."""

import sys

from lowmem_dpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
