"""`python -m pipeline`: see `pipeline.cli`."""

import sys

# Guarded, as a worker process of a local cluster imports this module anew.
if __name__ == "__main__":
    from pipeline.cli import main

    sys.exit(main())
