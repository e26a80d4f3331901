"""What a checkpoint's files say about themselves: shard headers, the index, and whether they fit the configuration."""
