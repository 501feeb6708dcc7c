"""The configuration: its schema, the parts it may name, and what goes together."""
