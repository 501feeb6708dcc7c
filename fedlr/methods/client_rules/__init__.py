"""What clients do with noised gradients: (gradient, where they stand) -> what the optimizer gets. One file a family."""
