"""Models that train: GPT-2, Llama, Mixtral, a U-Transformer, and one with uneven layers (torch)."""
