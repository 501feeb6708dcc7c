"""The rules of papers: which block trains, how updates are averaged, what follows, what clients do."""
