"""Models that train: GPT-2, Llama, Mixtral, and one with uneven layers (torch)."""
