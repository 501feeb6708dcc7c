"""One run: how it is put together, what it writes, and how it is taken up again."""
