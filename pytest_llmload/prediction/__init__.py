"""GPU memory of a load, predicted on a machine without a GPU: fake tensors, and a model of the caching allocator."""
