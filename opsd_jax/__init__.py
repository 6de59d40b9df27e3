"""Post-training of reasoning models in JAX: SFT, RLVR, and on-policy self-distillation."""

__version__ = "0.1.0"
