"""The inference path: pure decoding functions, the slot loop, the engine and the sampler."""
