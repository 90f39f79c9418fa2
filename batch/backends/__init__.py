"""Where prepared requests are run: `run(requests) -> results`."""
