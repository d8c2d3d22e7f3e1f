"""What `compress-and-export` does, stage by stage; `run.py` is the story on one page."""
