"""The runtime, bound: `Model`, `Session`, `Sampler`, `File`, and the block formats' encoders and decoders."""
