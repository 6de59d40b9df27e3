"""Small configs for tests: the quickstart's, its decoder, and stage options from its sections."""

from opsd_jax.config import loading
from opsd_jax.options import parse
from opsd_jax.stages import algorithm_of


def quickstart():
    """Returns the quickstart's config, which a test can change."""
    return loading.read("quickstart")


def decoder(**changes):
    """Returns the section `model` of the quickstart's decoder, with changes."""
    model = quickstart().model
    model.update(changes)
    return model


def stage_options(section, **changes):
    """Returns the options of a stage's section, with changes."""
    section = section.copy_and_resolve_references()
    section.update(changes)
    algorithm = algorithm_of(section.algorithm, "algorithm")
    return parse(algorithm.options, section, section.algorithm)
