"""What `lrserve generate`, `serve`, `bench` and `eval` do."""
