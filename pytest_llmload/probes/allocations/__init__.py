"""Find the code that allocated memory: a failed gate's load is repeated with every allocation recorded."""
