"""Tests on a real TensorRT-LLM with a real GPU; skipped, as a whole, where there is none.

They have never run: no machine of this project has TensorRT-LLM. The first one that does runs
`pytest tests/gpu_trtllm -s` with `KVCOMMONS_TRTLLM_MODEL` set to a model's folder.
"""
