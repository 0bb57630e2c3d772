"""From prompt to frames: cache, sampler, decoder, pipeline, session."""
