"""The one way to write a checkpoint: planned from headers, resumable, durable piece by piece, published whole."""
