"""The vLLM plugin: what registers, what reads an artifact's config, and the layers that multiply."""
