"""What a server does with an averaged adapter before it goes down again."""
