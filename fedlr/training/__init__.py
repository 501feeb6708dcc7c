"""Local training of one client: per-example losses, clipped gradients, noised steps."""
