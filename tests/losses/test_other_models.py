"""The losses in models of other libraries, each in an environment of its own."""

import sys

import environments
import pytest
from paths import ROOT, SUPPORT

# gemma requires kauldron, which requires more than the model needs: TensorFlow data sets, clouds.
GEMMA = (
    "absl-py", "chex", "clu", "einops", "etils[edc,enp,epath,epy,etree]", "flax", "grain",
    "immutabledict", "jax==0.10.2", "jaxtyping", "lark", "numpy", "orbax-checkpoint",
    "sentencepiece", "tensorflow-cpu", "treescope", "typeguard>=4",
)  # fmt: skip

# EasyDeL and Levanter import some packages that they do not require.
EASYDEL = ("easydel==0.3.0", "pillow")
LEVANTER = ("levanter==1.2.dev1644", "chex", "gitpython", "jax==0.10.2")
# MaxText requires nothing by itself. Its extras are for accelerators.
MAXTEXT = (
    "maxtext==0.2.5", "aqtp", "drjax", "grain", "jax==0.11.2", "jinja2", "omegaconf",
    "pathwaysutils", "pillow", "sentencepiece", "sympy", "tiktoken", "tokamax", "transformers",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "example", "packages", "alone"),
    [
        ("tunix", ["tunix_qwen3.py"], ("google-tunix==0.1.7",), ()),
        ("gemma", ["gemma_opsd.py"], GEMMA, ("gemma==3.3.0", "kauldron==1.4.2")),
        ("easydel", [], EASYDEL, ()),
        ("levanter", [], LEVANTER, ()),
        ("maxtext", [], MAXTEXT, ()),
    ],
    ids=["tunix", "gemma", "easydel", "levanter", "maxtext"],
)
def test_values_and_gradients_are_those_of_the_models_own_logits(
    tmp_path, library, example, packages, alone
):
    of = environments.find_python("3.12") if library == "maxtext" else sys.executable
    if of is None:
        pytest.skip("MaxText needs Python 3.12, which is not installed")
    python = environments.make(tmp_path, *packages, alone=alone, python=of)
    script = SUPPORT / "inside_other_models.py"
    examples = [ROOT / "examples" / name for name in example]
    environments.run([python, script, library, *examples], tmp_path)
