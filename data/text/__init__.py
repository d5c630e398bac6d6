"""Plain text: rows of tokens, published sets, detokenization."""
