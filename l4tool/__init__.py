"""l4tool: fetch, convert, quantize and batch-run Llama 4 checkpoints from the command line."""

__version__ = "0.1.0"
