"""Ground floor: errors, console output, atomic files, sizes, and what a Llama 4 is. Imports nothing above it."""
