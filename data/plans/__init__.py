"""Plans written by a language model for solved problems, and the filters that select them."""
