"""TensorRT-LLM behind the `Engine` protocol."""
