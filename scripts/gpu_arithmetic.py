"""What a PaCA step must cost on a GPU beside a frozen model's, by counting FLOPs and bytes: the table in docs/gpu.md.

    python -m scripts.gpu_arithmetic     # prints the table

Counted for Llama-3-8B in bf16, one sequence, all seven linear layers of a block trained, AdamW.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from paca_lightning.tools.presets import preset_config

FLOPS = 989e12
"""Of an H100 SXM per second, bf16 on dense tensor cores (NVIDIA's data sheet)."""

BANDWIDTH = 3.35e12
"""Of its memory, bytes per second (same)."""

SECTOR = 32
"""Bytes that the memory moves for one scattered element."""

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: What is done.
        flops: Multiplications and additions of tensor cores.
        bytes: Moved to or from memory, where that is what bounds the part.
    """

    name: str
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """At the device's full rates: no part can be faster."""
        return max(self.flops / FLOPS, self.bytes / BANDWIDTH)


def linear_shapes() -> list[tuple[int, int]]:
    """(out_features, in_features) of all trained layers of Llama-3-8B."""
    config = preset_config("llama3-8b")
    hidden, inner = config.hidden_size, config.intermediate_size
    narrow = hidden * config.num_key_value_heads // config.num_attention_heads
    block = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    block += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return block * config.num_hidden_layers


def frozen_step(tokens: int) -> list[Part]:
    """The floor: forward, and gradients of activations. Norms and activations are left out, in both."""
    config = preset_config("llama3-8b")
    weights = sum(outputs * inputs for outputs, inputs in linear_shapes()) + config.hidden_size * config.vocab_size
    # Causal attention: two products forward, five in the backward, half of each.
    attention = 7 * tokens**2 * config.hidden_size * config.num_hidden_layers
    return [
        Part("products with weights, forward and backward", 4 * weights * tokens),
        Part("attention", attention),
    ]


def added_by_paca(tokens: int, r: int) -> list[Part]:
    """What PaCA adds to it."""
    shapes = linear_shapes()
    outputs, layers = sum(out for out, _ in shapes), len(shapes)
    trained = outputs * r
    return [
        Part("gather of `x[..., indices]`", 0, layers * tokens * r * (SECTOR + BF16)),
        Part("gradient of the delta: reads dY once", 2 * tokens * trained, BF16 * tokens * outputs),
        Part("AdamW: delta, gradient and two moments", 0, trained * FP32 * 7),
        Part("write-back: delta, base columns, scattered columns", 0, trained * (FP32 + BF16 + 2 * SECTOR)),
    ]


def rows() -> Iterator[list[str]]:
    """Of the table: for two lengths, each part's work, its time at full rates, and its share of the floor."""
    for tokens in (2048, 8192):
        floor = sum(part.seconds for part in frozen_step(tokens))
        for part in frozen_step(tokens):
            yield [f"{tokens:,}", part.name, f"{part.flops / 1e12:.1f}", "", f"{1e3 * part.seconds:.2f}", ""]
        added = added_by_paca(tokens, 16)
        for part in added:
            share = f"{part.seconds / floor:.2%}"
            work = [f"{part.flops / 1e12:.2f}", f"{part.bytes / 1e9:.2f}"]
            yield [f"{tokens:,}", f"PaCA r=16: {part.name}", *work, f"{1e3 * part.seconds:.2f}", share]
        total = sum(part.seconds for part in added)
        yield [
            f"{tokens:,}",
            "**PaCA r=16 beside the floor**",
            "",
            "",
            f"{1e3 * total:.2f}",
            f"**{total / floor:.2%}**",
        ]


def table() -> str:
    """The table in Markdown."""
    columns = ["tokens", "part", "TFLOP", "GB", "ms at full rates", "of the floor"]
    lines = [columns, ["---"] * len(columns), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
