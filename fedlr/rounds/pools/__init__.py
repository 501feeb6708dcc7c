"""Where clients train on this machine: one after the other, or many at once over one resident base model."""
