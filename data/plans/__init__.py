"""Plans that a language model writes for solved problems, and the filters that judge them."""
