"""One KV cache shared by every replica; knows nothing of Ray, transformers or TensorRT-LLM."""
