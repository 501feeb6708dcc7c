"""How an update travels: codecs between what a client trained and the update that the server aggregates."""
