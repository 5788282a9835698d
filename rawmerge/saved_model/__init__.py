"""What transformers would save of a model: which tensors, in which dtype, in which file; and a plan made like it."""
