"""Models and text: from what the user names to a folder of safetensors and windows of token ids."""
