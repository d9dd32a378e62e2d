"""PEFT adapters: their files, the tensors that they add, and the modules that they wrap."""
