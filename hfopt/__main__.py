"""`python -m hfopt`: the command `hfopt`."""

import sys

from hfopt.cli import main

sys.exit(main())
