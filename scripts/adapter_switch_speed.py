"""How long a switch between adapters takes: 8 of them on a model of the shape of Llama-3.2-1B, in bf16, random weights.

    python -m scripts.adapter_switch_speed --rank 16

Needs about 4 GiB of memory and no files. Prints the CPU times, on one core, of the switches, and that of one write of
all columns: a switch writes those of the adapter that goes and of the one that comes.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paca_lightning import PaCAConfig, apply_paca, load_adapter, paca_layers, save_adapter, set_adapter, unload

ONE_B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def main() -> None:
    """Build the model, load the adapters, switch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**ONE_B)).eval()
    torch.set_default_dtype(torch.float32)
    names = [f"adapter-{number}" for number in range(options.adapters)]
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            apply_paca(model, PaCAConfig(r=options.rank, seed=number))
            with torch.no_grad():
                for _, layer in paca_layers(model):
                    layer.paca_delta.normal_(std=0.01)
            save_adapter(model, Path(scratch, name))
            unload(model)
        for name in names:
            load_adapter(model, Path(scratch, name), name=name)
    layers = [layer for _, layer in paca_layers(model)]
    numbers = sum(layer.paca_delta.numel() for layer in layers)
    times: dict[str, list[float]] = {"adapter to adapter": [], "adapter to base": [], "base to adapter": []}
    for _ in range(options.rounds):
        for name in names:
            times["adapter to adapter"].append(_timed(model, name))
        times["adapter to base"].append(_timed(model, None))
        times["base to adapter"].append(_timed(model, names[-1]))
    print(f"{len(names)} adapters, r={options.rank}, {len(layers)} layers, {numbers:,} trained numbers each")
    print(f"one write of all columns (write_columns): {1e3 * _write(layers):.1f} ms")
    for kind, seconds in times.items():
        median, least = 1e3 * statistics.median(seconds), 1e3 * min(seconds)
        print(f"{kind}: {median:.1f} ms, median of {len(seconds)}; least {least:.1f} ms")


def _timed(model: LlamaForCausalLM, name: str | None) -> float:
    start = time.process_time()
    set_adapter(model, name)
    return time.process_time() - start


def _write(layers: list) -> float:
    start = time.process_time()
    for layer in layers:
        layer.write_columns()
    return time.process_time() - start


if __name__ == "__main__":
    main()
