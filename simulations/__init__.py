"""The researcher's house: simulated federations, their comparison and their plans."""
