"""What `lrserve serve` and `lrserve bench` do."""
