"""What we are measured against, in its own libraries: PEFT, Opacus and Flower are used here as their users do."""
