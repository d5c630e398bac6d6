"""Plain text: rows of tokens, published data sets, detokenization."""
