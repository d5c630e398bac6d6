"""Model cards, and pushes of checkpoints and datasets to the Hub."""
