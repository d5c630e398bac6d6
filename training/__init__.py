"""Training: arguments, objectives, optimizer, adapters, and the trainer's callbacks."""
