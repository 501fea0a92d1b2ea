"""Federated fine-tuning of foundation models across architectures and tasks, in JAX."""
