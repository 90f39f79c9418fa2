"""Getting checkpoints from a hub: what is there, every byte of it checked, and where it lies on disk."""
