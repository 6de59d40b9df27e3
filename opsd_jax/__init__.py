"""Post-training of reasoning models in JAX: SFT, RLVR, and on-policy self-distillation."""
