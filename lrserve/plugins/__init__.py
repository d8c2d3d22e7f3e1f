"""What other programs load lrserve through: the vLLM plugin and the transformers quantizer."""
