"""Models in shards: what each shard holds, and that together they compute what the whole model computes."""
