"""Training: settings, objectives, optimizer, adapters, and the trainer's callbacks."""
