"""Llama 4 text and vision model over a paged KV cache."""
