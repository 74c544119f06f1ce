"""The TensorRT-LLM engine, tested with a double of TensorRT-LLM's LLM API."""
