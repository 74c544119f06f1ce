"""The demonstration: `python -m cluster.demo` shows what a shared KV cache does, on any machine."""
