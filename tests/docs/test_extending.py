"""Every example of docs/extending.md runs, and its addition can be used."""

import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
import tiny_tokenizer
from paths import ROOT

from opsd_jax import losses
from opsd_jax.config.run_options import parse_run
from opsd_jax.data.contexts import CONTEXTS, Context
from opsd_jax.data.options import DataOptions
from opsd_jax.data.text import Prompts
from opsd_jax.data.tokenizer import PretrainedTokenizer
from opsd_jax.evaluation.benchmarks import BENCHMARKS
from opsd_jax.models import architecture, presets
from opsd_jax.options import ConfigError
from opsd_jax.problem import Problem
from opsd_jax.run import pipeline
from opsd_jax.stages import ALGORITHMS, teacher
from opsd_jax.verify import verifiers
from opsd_jax.verify.verdict import Verdict

PAGE = (ROOT / "docs" / "extending.md").read_text()
TABLES = {
    "ALGORITHMS": ALGORITHMS,
    "losses.DIVERGENCES": losses.DIVERGENCES,
    "CONTEXTS": CONTEXTS,
    "TEACHERS": teacher.TEACHERS,
    "VERIFIERS": verifiers.VERIFIERS,
    "ARCHITECTURES": architecture.ARCHITECTURES,
    "PRESETS": presets.PRESETS,
    "BENCHMARKS": BENCHMARKS,
}


@pytest.fixture
def example(monkeypatch):
    """Returns a function `title -> module` that runs the examples of a section of the page."""
    before = {name: dict(table) for name, table in TABLES.items()}

    def run(title):
        text = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        module = types.ModuleType("my_stage")
        monkeypatch.setitem(sys.modules, "my_stage", module)
        for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            assert code.count("\n") <= 32
            exec(code, module.__dict__)
        return module

    yield run
    for name, table in TABLES.items():
        table.clear()
        table.update(before[name])


def test_the_page_names_every_table_and_its_file():
    for name, path in re.findall(r"\| `([\w.]+)`.* \| `(opsd_jax/[\w/.]+)`", PAGE):
        assert name in TABLES
        assert name.rpartition(".")[2] in (ROOT / path).read_text()


def test_a_divergence(example):
    example("A divergence")
    options = losses.OPSD(divergence="total_variation")
    options.check()
    logits = jax.random.normal(jax.random.key(0), (2, 2, 3, 5))
    outcomes = tuple(jnp.array(mask) for mask in ([True, True], [False] * 2, [False] * 2))
    loss = losses.opsd(
        student=logits[0],
        teacher=logits[1],
        mask=jnp.ones((2, 3), bool),
        outcomes=outcomes,
        options=options,
    )
    p, q = (np.exp(np.asarray(x, np.float64)) for x in logits)
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    expected = 0.5 * np.abs(p - q).sum(-1)
    np.testing.assert_allclose(loss.tokens["divergence"], expected, rtol=1e-5)


def test_a_context(example, tmp_path):
    example("A privileged context")
    config = tiny_config.quickstart()
    config.opsd.contexts = ("first_step",)
    options = parse_run(config).sections["opsd"]
    find = CONTEXTS["first_step"].find(options)
    problem = Problem(0, "q", "Add. Then stop.", "3")
    assert find(problem, 0, ()) == "Add"
    assert find(Problem(0, "q", "", "3"), 0, ()) is None
    tiny_tokenizer.write(tmp_path, "qwen3")
    tokenizer = PretrainedTokenizer(tmp_path)
    # The config was made before the kind was added, so it has no wording for it.
    prompts = Prompts(DataOptions(), tokenizer)
    ids, _ = prompts.teacher(problem, Context("first_step", "Add"), 400)
    assert "The solution begins like this:\nAdd" in tokenizer.decode(ids)


def test_a_teacher(example):
    example("A teacher")
    options = teacher.TeacherOptions(kind="my_stage:HALFWAY")
    options.check("opsd.teacher")
    with pytest.raises(ConfigError, match=r"opsd.teacher.kind is 'json:dumps'; expected the name"):
        teacher.TeacherOptions(kind="json:dumps").check("opsd.teacher")
    made = teacher.make_teacher(options)
    params = {"w": jnp.array([2.0])}
    stored = made.init(params)
    stored = made.update(stored, {"w": jnp.array([4.0])}, 1, True)
    np.testing.assert_array_equal(stored["w"], [3.0])
    assert "1 updates ago" in teacher.warning(options)


def test_a_verifier(example):
    example("A verifier")
    verifier = verifiers.from_options(verifiers.VerifierOptions(kind="ends_well"))
    problem = Problem(0, "q", "", "46")
    job = verifier.prepare(problem, "It is 46.")
    assert verifier.judge(job) == Verdict(True, "match")


def test_a_model_family(example, tmp_path):
    example("A model family")
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"architectures": ["AquilaForCausalLM"], **sizes}))
    assert architecture.from_json(path).head_dim == 8
    assert presets.PRESETS["aquila-tiny"]["hidden_size"] == 1024


def test_a_benchmark(example):
    example("A benchmark")
    assert BENCHMARKS["minerva"].source.columns.question == "question"


def test_a_stage(example, tmp_path):
    module = example("A stage")
    config = module.get_config()
    config.evaluation.update({"problems": 8, "samples": 2, "slots": 16})
    config.smooth.steps = 2
    pipeline.run(parse_run(config), tmp_path)
    losses_by_step = [
        json.loads(line)["loss"] for line in (tmp_path / "smooth/metrics.jsonl").open()
    ]
    assert len(losses_by_step) == 2
    config.smooth.penalty = -1.0
    with pytest.raises(ValueError, match=r"smooth.penalty is -1.0; expected at least 0"):
        parse_run(config)
