"""What a model is trained with: arguments, objectives, optimizer, adapters, and the trainer's callbacks."""
