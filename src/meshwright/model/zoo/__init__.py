"""Models as torch modules that can be trained: GPT-2, Llama, Mixtral, a U-Transformer, a model with
uneven layers, and the transformers that an Architecture describes."""
