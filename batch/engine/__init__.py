"""Continuous batching: sequences, block accounting, scheduler, sampler and the step loop."""
