"""GGUF weights as a transformers folder: `python -m cluster.gguf FILE.gguf FOLDER`.

transformers can read a GGUF file but then marks its configuration as quantised, and a model saved
like that cannot be loaded again. Building the model afresh from a clean configuration prevents it.
"""

import sys
from pathlib import Path


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write float32 safetensors, configuration, tokenizer and chat template into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    clean = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    clean.load_state_dict(read.state_dict())
    clean.generation_config = read.generation_config
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
