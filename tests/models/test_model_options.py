"""The options of the config section `model`."""

import pytest
import tiny_config

from opsd_jax import config as config_lib
from opsd_jax.models import decoder, pretrained
from opsd_jax.models.options import DecoderOptions, PretrainedOptions
from opsd_jax.models.presets import PRESETS
from opsd_jax.options import ConfigError, parse, section


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_parses_to_the_options_of_its_section(name):
    config = config_lib.preset(name)
    options = parse(DecoderOptions, config, "model")
    assert section(options).to_dict() == config.to_dict()
    assert decoder.config_of(options) == decoder.config_of(config)


def test_a_pretrained_section_parses_to_its_options():
    config = config_lib.pretrained("/models/x", preset="qwen3-8b")
    assert section(parse(PretrainedOptions, config, "model")).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, r"config\.model\.num_layers is 0; expected at least 1"),
        ("head_dim", 7, r"config\.model\.head_dim is 7; expected an even number"),
        ("hidden_size", "64", r"config\.model\.hidden_size is '64'; expected an integer"),
        ("dtype", "float16", r"config\.model\.dtype is 'float16'; expected 'float32' or"),
        ("remat", "some", r"config\.model\.remat is 'some'; expected one of 'none', 'full'"),
        ("cache", "ragged", r"config\.model\.cache is 'ragged'; expected one of 'auto', 'dense'"),
        ("rope_theta", 0.0, r"config\.model\.rope_theta is 0\.0; expected a number above 0"),
        ("context_parallel", True, r"model\.context_parallel is True with model\.remat = 'none'"),
    ],
)
def test_an_invalid_field_of_the_decoder_is_named(field, value, message):
    config = tiny_config.decoder().to_dict() | {field: value}
    with pytest.raises(ConfigError, match=message):
        decoder.from_config(config)


def test_an_invalid_field_of_rope_scaling_is_named():
    config = tiny_config.decoder()
    config.rope_scaling.factor = 0.5
    expected = r"config\.model\.rope_scaling\.factor is 0\.5; expected at least 1"
    with pytest.raises(ConfigError, match=expected):
        decoder.from_config(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "qwen3-9b"}, r"config\.model\.preset is 'qwen3-9b'; expected one of ''"),
        ({"preset": "qwen3-8b"}, r"config\.model\.path is ''; expected a directory"),
        ({"path": "/nowhere"}, r"config\.model\.path is '/nowhere'; expected a directory on this"),
    ],
)
def test_an_invalid_pretrained_section_is_an_error(changes, message):
    with pytest.raises(ConfigError, match=message):
        pretrained.from_config(config_lib.pretrained(**changes))
