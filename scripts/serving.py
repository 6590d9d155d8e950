"""Hand a trained adapter to llama.cpp both ways, merged and as LoRA, and compare what it computes with transformers.

llama.cpp's own converters (`convert_hf_to_gguf.py`, `convert_lora_to_gguf.py`) read the exports, and llama.cpp itself
runs them in fp32. `make serving` fetches and builds it, and runs this on the adapter of `make demo`:

    python -m scripts.serving --llama-cpp .cache/llama-cpp/vendor/llama.cpp
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from paca_lightning import export_lora, export_merged, load_adapter

PROMPTS = ("What is your name?", "What is the capital of France?", "How many legs does a spider have?")
ANSWER = 24  # tokens
F32 = 0  # GGML_TYPE_F32


def transformers_logits(model: Any, sequences: list[list[int]]) -> list[Tensor]:
    """Logits (T, vocabulary) of each sequence."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([tokens])).logits[0] for tokens in sequences]


def answers(model: Any, tokenizer: Any) -> list[list[int]]:
    """Tokens of each prompt in the chat template, with the answer that is likeliest word by word."""
    found = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        found.append(model.generate(**given, max_new_tokens=ANSWER, do_sample=False)[0].tolist())
    return found


def llama_cpp_logits(model: Path, lora: Path | None, sequences: list[list[int]]) -> list[Tensor]:
    """Logits (T, vocabulary) of each sequence, as llama.cpp computes them with a cache in fp32."""
    from llama_cpp import Llama

    settings: dict[str, Any] = {"logits_all": True, "n_ctx": 512, "type_k": F32, "type_v": F32, "verbose": False}
    server = Llama(str(model), lora_path=None if lora is None else str(lora), **settings)
    found = []
    for tokens in sequences:
        server.reset()
        server.eval(tokens)
        found.append(torch.from_numpy(server.scores[: len(tokens)].copy()))
    server.close()
    return found


def convert(script: Path, source: Path, target: Path, *options: str) -> Path:
    """Run one of llama.cpp's converters, and return the GGUF file that it wrote.

    Raises:
        SystemExit: With its last words, if it fails.
    """
    command = [sys.executable, str(script), str(source), "--outfile", str(target), "--outtype", "f32", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)  # noqa: S603
    if done.returncode:
        sys.exit(f"{script.name} refused {source}:\n{done.stderr[-2000:]}")
    return target


def compare(name: str, expected: list[Tensor], found: Mapping[str, list[Tensor]], base: list[Tensor]) -> float:
    """Print how far each reader's logits are from transformers', and return the largest difference."""
    table = Table("read by llama.cpp", "largest difference of logits", "same likeliest token", title=name, box=None)
    worst = 0.0
    for reader, logits in {**found, "(the base model, for scale)": base}.items():
        pairs = list(zip(expected, logits, strict=True))
        difference = max(float((a - b).abs().max()) for a, b in pairs)
        same, count = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs), sum(len(a) for a, _ in pairs)
        table.add_row(reader, f"{difference:.2g}", f"{same} of {count}")
        worst = max(worst, difference) if reader in found else worst
    Console().print(table)
    return worst


def main() -> None:
    """Export, convert, run, compare; fails if llama.cpp computes something else."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct", help="directory of the base model")
    parser.add_argument("--adapter", default="runs/quickstart/version_0/adapter", help="directory of the adapter")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="directory of llama.cpp's converters")
    parser.add_argument("--tolerance", type=float, default=0.05, help="largest difference of logits that passes")
    arguments = parser.parse_args()
    to_gguf, lora_to_gguf = (arguments.llama_cpp / f"convert_{kind}_to_gguf.py" for kind in ("hf", "lora"))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    load_adapter(model, arguments.adapter)
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        export_merged(model, place / "merged", tokenizer)
        export_lora(model, place / "lora", tokenizer)
        merged = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32)
        sequences = answers(merged, tokenizer)
        base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        whole = convert(to_gguf, place / "merged", place / "merged.gguf")
        plain = convert(to_gguf, Path(arguments.model), place / "base.gguf")
        lora = convert(lora_to_gguf, place / "lora", place / "lora.gguf", "--base", arguments.model)
        found = {
            "merged": llama_cpp_logits(whole, None, sequences),
            "base model with the LoRA adapter": llama_cpp_logits(plain, lora, sequences),
        }
    for tokens in sequences:
        print(tokenizer.decode(tokens, skip_special_tokens=True).replace("\n", " | "))
    expected = transformers_logits(merged, sequences)
    worst = compare(arguments.adapter, expected, found, transformers_logits(base, sequences))
    if worst > arguments.tolerance:
        sys.exit(f"llama.cpp's logits differ by {worst:.2g} (--tolerance {arguments.tolerance}).")


if __name__ == "__main__":
    main()
