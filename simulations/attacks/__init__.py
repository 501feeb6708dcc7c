"""Hostile clients, in simulation only: what they do to their rows and to what they send.

`bad_clients` draws who they are, `labels` changes rows, `crafted` makes the updates, `pool` puts them between a pool
and the round that validates them, and `library` names the attacks. The server and the devices import nothing of this.
"""
