"""How factors start: from a seed, from the base's weights, or from public examples."""
