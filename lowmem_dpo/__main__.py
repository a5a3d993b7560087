"""`python -m lowmem_dpo`."""

import sys

if __name__ == "__main__":
    try:
        from lowmem_dpo.cli import main

        code = main()
    except KeyboardInterrupt:  # while its modules were imported
        print("lowmem_dpo: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
