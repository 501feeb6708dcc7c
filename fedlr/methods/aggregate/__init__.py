"""Aggregators: (adapter that was broadcast, updates of the cohort) -> adapter. One file a family."""
