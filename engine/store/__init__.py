"""A durable store of keys and values: objects, their names, bytes and checksums."""
