"""Folders that tests read: the repository, its test helpers, and shared data beside it."""

import pathlib

SUPPORT = pathlib.Path(__file__).parent
ROOT = SUPPORT.parents[1]
CONFIGS = ROOT / "configs"
SHARED = ROOT.parent / "shared" / "data"  # tests that need a file of it skip where it is absent
