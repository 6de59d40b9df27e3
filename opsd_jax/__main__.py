"""`python -m opsd_jax`: the same as the command `opsd-jax`."""

import sys

from opsd_jax.cli.main import main

sys.exit(main())
