"""Real engines, each in a process of its own: what they are asked, how they start, what they measure."""
