"""What unquantized PaCA columns give back of the loss that NF4 costs, before any training.

The columns that PaCA trains start from the full-precision weight, and so undo a part of the quantization error. Prints
the held-out loss for each selection and rank, and the share of the NF4 loss that is regained.

    python scripts/nf4_columns.py models/SmolLM2-135M-Instruct text.jsonl --ranks 8 32 128

The second argument is plain text, or chat messages with one conversation a line (.jsonl): its first quarter calibrates
output_error, and the loss is over all tokens of the rest. Or it is the config of a run (.yaml): its first 8 training
batches calibrate, and the loss is over its validation answers.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from paca_lightning import PaCAConfig, apply_paca, disable_paca
from paca_lightning.core.tokens import IGNORE_INDEX
from paca_lightning.tools.compare.task import read_task
from scripts.first_batches import first_training_batches

LENGTH = 256

Batch = dict[str, Tensor]


def blocks(tokenizer: object, path: Path, limit: int) -> Tensor:
    """Running text cut into blocks of tokens, shape (blocks, LENGTH)."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        chats = [json.loads(line)["messages"] for line in text.splitlines()]
        text = "".join(tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    ids = torch.tensor(tokenizer(text)["input_ids"][: limit * LENGTH])
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(arguments: argparse.Namespace) -> tuple[list[Batch], list[Batch]]:
    """Held-out batches and batches for calibration."""
    if arguments.text.suffix == ".yaml":
        task = read_task([f"--config={arguments.text}"], arguments.text.stem, None, "nf4_columns")
        calibration = first_training_batches(task)
        return list(task.data.val_dataloader()), calibration
    ids = blocks(AutoTokenizer.from_pretrained(arguments.model), arguments.text, arguments.blocks)
    return labelled(ids[len(ids) // 4 :]), labelled(ids[: len(ids) // 4])


def labelled(ids: Tensor) -> list[Batch]:
    """Batches of 4 rows in which every token has a label."""
    return [{"input_ids": rows, "labels": rows} for rows in ids.split(4)]


@torch.no_grad()
def loss(model: nn.Module, held_out: list[Batch]) -> float:
    """Mean loss over all tokens that have a label."""
    counts = [int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in held_out]
    total = sum(model(**batch).loss.item() * count for batch, count in zip(held_out, counts, strict=True))
    return total / sum(counts)


def losses(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Name and loss of each model: as it is first, then plain NF4, then each selection and rank."""
    held_out, calibration = batches(arguments)
    dtype = getattr(torch, arguments.dtype)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype).eval()
    yield arguments.dtype, loss(base, held_out)
    plain = copy.deepcopy(base)
    apply_paca(plain, PaCAConfig(r=1, quantize="nf4"))
    with disable_paca(plain):
        yield "plain NF4", loss(plain, held_out)
    for selection, data in (("random", None), ("quant_error", None), ("output_error", calibration)):
        for r in arguments.ranks:
            model = copy.deepcopy(base)
            apply_paca(model, PaCAConfig(r=r, quantize="nf4", selection=selection), calibration=data)
            yield f"{selection}, r={r}", loss(model, held_out)


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--blocks", type=int, default=64, help=f"use at most this many blocks of {LENGTH} tokens")
    parser.add_argument("--dtype", default="float32", help="of the weights and of the computation")
    table = losses(parser.parse_args())
    (name, full), (second, plain) = next(table), next(table)
    print(f"{'model':<36} {'loss':>8} {'to NF4':>9} {'regained':>9}")
    print(f"{name:<36} {full:8.4f} {full - plain:+9.4f}")
    print(f"{second:<36} {plain:8.4f}", flush=True)
    for name, value in table:
        print(f"{name:<36} {value:8.4f} {value - plain:+9.4f} {(plain - value) / (plain - full):9.1%}", flush=True)


if __name__ == "__main__":
    main()
