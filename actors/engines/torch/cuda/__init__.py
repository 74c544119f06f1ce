"""The embedded engine's fast path on NVIDIA GPUs."""
