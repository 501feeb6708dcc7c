"""One round: who is asked, what they send, what is refused, and how good the result is."""
