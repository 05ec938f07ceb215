"""What computes? Weights, named adapters on them, the LM head, the tokenizer and its template."""
