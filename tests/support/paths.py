"""Directories that tests read: the repository, the test helpers, and shared data next to it."""

import pathlib

SUPPORT = pathlib.Path(__file__).parent
ROOT = SUPPORT.parents[1]
CONFIGS = ROOT / "configs"
SHARED = ROOT.parent / "shared" / "data"  # tests that need a file from here are skipped without it
