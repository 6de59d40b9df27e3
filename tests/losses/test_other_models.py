"""The losses in models of other libraries, each in an environment of its own."""

import environments
import pytest
from paths import ROOT

EXAMPLES, SUPPORT = ROOT / "examples", ROOT / "tests" / "support"


@pytest.mark.slow
def test_tunix(tmp_path):
    python = environments.make(tmp_path, "google-tunix==0.1.7")
    script = SUPPORT / "inside_tunix.py"
    environments.run([python, script, EXAMPLES / "tunix_qwen3.py"], tmp_path)
