"""Serving artifacts: the vLLM plugin, the transformers quantizer, engines in subprocesses, the server."""
