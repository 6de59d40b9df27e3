"""The losses in models of other libraries, each in an environment of its own."""

import environments
import pytest
from paths import ROOT, SUPPORT

# gemma requires kauldron, which requires more than the model needs: TensorFlow data sets, clouds.
GEMMA = (
    "absl-py", "chex", "clu", "einops", "etils[edc,enp,epath,epy,etree]", "flax", "grain",
    "immutabledict", "jax==0.10.2", "jaxtyping", "lark", "numpy", "orbax-checkpoint",
    "sentencepiece", "tensorflow-cpu", "treescope", "typeguard>=4",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "example", "packages", "alone"),
    [
        ("tunix", "tunix_qwen3.py", ("google-tunix==0.1.7",), ()),
        ("gemma", "gemma_opsd.py", GEMMA, ("gemma==3.3.0", "kauldron==1.4.2")),
    ],
    ids=["tunix", "gemma"],
)
def test_values_and_gradients_are_those_of_the_models_own_logits(
    tmp_path, library, example, packages, alone
):
    python = environments.make(tmp_path, *packages, alone=alone)
    script = SUPPORT / "inside_other_models.py"
    environments.run([python, script, library, ROOT / "examples" / example], tmp_path)
