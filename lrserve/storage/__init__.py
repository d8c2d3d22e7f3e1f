"""Artifacts on disk: staging, publishing, verifying, the model card, and the work folder."""
