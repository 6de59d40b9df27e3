"""Engines: compiled at the first request of their shape, and kept."""

import functools
from types import SimpleNamespace

import jax
import pytest

from opsd_jax.parallel import mesh as mesh_lib
from opsd_jax.rollout import engines as engines_lib
from opsd_jax.rollout.engine import EngineShape
from opsd_jax.rollout.engines import Engines
from opsd_jax.rollout.layout import Layout

SIZES = {"slots": 64, "group_size": 8, "rollouts": 512, "prompt_tokens": 16, "response_tokens": 32}


@pytest.fixture
def compiled(monkeypatch):
    """Replaces `Engine` by a function that only records its arguments, in the returned list."""
    compiled = []

    def engine(model, abstract_params, mesh, shape, *, pad_id):
        compiled.append((model, abstract_params, mesh, shape, pad_id))
        return object()

    monkeypatch.setattr(engines_lib, "Engine", engine)
    return compiled


@pytest.fixture
def layout():
    return Layout(mesh_lib.make_mesh((4, 2, 1)), {"w": jax.ShapeDtypeStruct((), "float32")}, 0, id)


def test_a_shape_is_compiled_once(compiled, layout):
    engines = Engines(SimpleNamespace(model="model", layout=layout), pad_id=7)
    first = engines(**SIZES)
    shape = EngineShape(64, 8, 16, 32)  # prompts are a multiple of 4 x 2 shards
    assert compiled == [("model", layout.abstract, layout.mesh, shape, 7)]
    assert engines(**SIZES) is first
    assert engines(**SIZES | {"rollouts": 64}) is first  # of the same shape
    assert len(compiled) == 1
    assert engines(**SIZES | {"response_tokens": 48}) is not first
    assert len(compiled) == 2
    assert engines(**SIZES | {"speculation": 3}) is not first
    assert compiled[2][3] == shape._replace(speculation=3)


def test_the_layout_is_made_at_the_first_request(compiled, layout):
    calls = []

    class Sampler:
        model = "model"

        @functools.cached_property
        def layout(self):
            calls.append("layout")
            return layout

    engines = Engines(Sampler(), pad_id=0)
    assert not calls
    engines(**SIZES)
    engines(**SIZES | {"response_tokens": 48})
    assert calls == ["layout"]


def test_the_last_eight_engines_are_kept(compiled, layout):
    engines = Engines(SimpleNamespace(model="model", layout=layout), pad_id=0)
    made = [engines(**SIZES | {"response_tokens": n}) for n in range(1, 10)]
    assert engines(**SIZES | {"response_tokens": 2}) is made[1]
    assert engines(**SIZES | {"response_tokens": 1}) is not made[0]
    assert len(compiled) == 10
