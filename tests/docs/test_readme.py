"""The code, commands and links of the README and the docs work as written."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT

from opsd_jax import losses
from opsd_jax.cli import main
from opsd_jax.config import loading

README = (ROOT / "README.md").read_text()


def test_the_loss_in_the_readme():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    rng = np.random.default_rng(0)
    params, teacher_params = jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)
    hidden, teacher_hidden = jnp.asarray(rng.normal(size=(2, 3, 4, 6)), jnp.float32)
    mask = jnp.asarray(np.arange(4) < np.array([4, 2, 3])[:, None])
    unembed = lambda params, hidden: hidden @ params
    got = names["opsd_loss"](
        params, hidden, teacher_params, teacher_hidden, unembed, mask, jnp.eye(3, dtype=bool)
    )
    only = losses.reverse_kl(
        student_logits=hidden[0] @ params, teacher_logits=teacher_hidden[0] @ teacher_params
    ).mean()
    np.testing.assert_allclose(got, only, rtol=1e-6)


def test_the_engine_in_the_docs_of_rollouts(capsys):
    page = (ROOT / "docs" / "rollouts.md").read_text()
    *options, engine = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for block in options:
        exec(block, {"config": loading.read("quickstart")})
    exec(engine, {})
    rows = [
        line.split(maxsplit=3)[:2] for line in capsys.readouterr().out.splitlines() if "e [" in line
    ]
    assert sorted(rows) == [[str(i), str(j)] for i in range(2) for j in range(4)]


@pytest.mark.parametrize(
    "command",
    re.findall(r"^opsd-jax (.*?)(?:\s+#.*)?$", README.replace("\\\n", ""), re.MULTILINE),
)
def test_the_commands_in_the_readme(command):
    remaining, overrides = main.split_overrides(command.split())
    arguments = main.parser().parse_args(remaining)
    if arguments.command == "train":
        loading.load(ROOT / arguments.config, overrides)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "benchmarks/README.md",
        *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
    ],
)
def test_links_to_files_exist(page):
    prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)\)", prose):
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_the_docs_of_the_losses_name_every_function_option_and_preset():
    page = (ROOT / "docs" / "losses.md").read_text()
    names = {*losses.__all__, *losses.OPSD._fields, *losses.PolicyGradient._fields, *losses.PRESETS}
    assert [name for name in sorted(names) if not re.search(rf"\b{re.escape(name)}", page)] == []
