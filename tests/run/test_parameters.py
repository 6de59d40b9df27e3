"""The models that a run samples from."""

import dataclasses
import pathlib

import jax
import pytest
import tiny_config
from ml_collections import ConfigDict

from opsd_jax import config as config_lib
from opsd_jax.config.run_options import parse_run
from opsd_jax.models.quantised import QuantisationOptions
from opsd_jax.options import ConfigError
from opsd_jax.run.parameters import Parameters

INT8 = QuantisationOptions(weights="int8", cache="int8")


def parameters(quantisation, **model):
    options = parse_run(tiny_config.quickstart())
    if model:
        options = dataclasses.replace(options, model=ConfigDict(model))
    options = dataclasses.replace(options, rollout_quantisation=quantisation)
    return Parameters(options, pathlib.Path(), jax.devices()[:1])


def test_only_the_rollouts_of_stages_are_in_8_bits():
    plain, quantised = parameters(QuantisationOptions()), parameters(INT8)
    assert plain.form.rollouts is plain.form.evaluated
    assert quantised.form.evaluated.model.policy is quantised.model.policy
    rollouts, evaluated = (s.layout for s in (quantised.form.rollouts, quantised.form.evaluated))
    dtypes = lambda tree: {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    assert dtypes(evaluated.abstract) == {"float32"}
    assert dtypes(rollouts.abstract) == {"float32", "int8"}
    cache = jax.eval_shape(lambda: quantised.form.rollouts.model.policy.init_cache(1, 8))
    assert dtypes(cache) == {"float32", "int8"}


def test_a_model_that_cannot_be_quantised_is_refused():
    own = {"make": "tiny_model:make", "vocab_size": 8, "hidden_size": 4}
    assert parameters(QuantisationOptions(), **own).form.rollouts.model.quantised is None
    with pytest.raises(ConfigError, match=r"has weights = 'int8'.*`quantised`"):
        parameters(INT8, **own)


def test_a_kernel_that_does_not_take_8_bits_is_refused():
    model = {**tiny_config.decoder(head_dim=128, num_heads=4, num_kv_heads=1), "cache": "paged"}
    assert parameters(QuantisationOptions(weights="int8"), **model)
    with pytest.raises(ConfigError, match=r"cache is 'int8', but each device has 1"):
        parameters(INT8, **model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampling_with_an_adapter_has_the_same_programs(dtype):
    """The weights for sampling have the same shapes, dtypes and shardings as without an adapter."""
    config = tiny_config.quickstart()
    config.adapter = config_lib.lora(rank=4)
    config.model.dtype, config.mesh, config.decode_mesh = dtype, (1, 4, 2), (2, 2, 2)
    found = Parameters(parse_run(config), pathlib.Path(), jax.devices())
    whole, adapted = (form.rollouts.layout.abstract for form in (found.whole, found.adapted))
    assert jax.tree.structure(whole) == jax.tree.structure(adapted)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(adapted), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
