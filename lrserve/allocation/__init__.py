"""Rank plans: closed-form allocators, quality, speed, and the study that searches among them."""
