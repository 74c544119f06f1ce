"""The KV cache connector: TensorRT-LLM's two-sided interface over the shared cache."""
