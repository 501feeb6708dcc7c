"""What a row is, and how wrong a model is on it: tokens, losses, made-up examples."""
