"""PEFT adapters: their files, what they add, and the modules that they wrap."""
