"""Post-training of reasoning models in JAX: SFT, RLVR, and on-policy self-distillation.

from opsd_jax import losses                      # the loss functions, for any model
from opsd_jax import Model, Policy, from_nnx     # a model of your own (or from_linen)
from opsd_jax import config                      # configs, their sections and recipes
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that holds it, or that it is. A name is imported when it is first used,
# so that `import opsd_jax` imports no JAX.
_PUBLIC = {
    "ConfigError": "opsd_jax.options",
    "DataError": "opsd_jax.problem",
    "Model": "opsd_jax.policy",
    "Policy": "opsd_jax.policy",
    "Problem": "opsd_jax.problem",
    "config": "opsd_jax.config",
    "from_linen": "opsd_jax.policy",
    "from_nnx": "opsd_jax.policy",
    "losses": "opsd_jax.losses",
    "recipes": "opsd_jax.config.recipes",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'opsd_jax' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)
