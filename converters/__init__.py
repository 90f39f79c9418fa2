"""Checkpoint layouts: who calls which tensor what, and how it is stored on disk."""
