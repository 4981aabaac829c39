"""The loop, and the sampler that runs it."""
