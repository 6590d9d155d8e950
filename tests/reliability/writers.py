"""Everything that writes files for a user, each called twice with the same name."""

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from paca_lightning import PaCAConfig, apply_paca, export_lora, export_merged, save_adapter
from paca_lightning.core.files import replacing
from paca_lightning.strategies.checkpoint_io import LocalCheckpointIO
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.saving import save_directory
from paca_lightning.tasks.mmlu.accuracy import Score
from paca_lightning.tasks.mmlu.report import write_results
from paca_lightning.tools.run_parser import RunParser
from tests.tiny import tiny_llama, tiny_tokenizer


@cache
def converted() -> LlamaForCausalLM:
    model = tiny_llama()
    apply_paca(model, PaCAConfig(r=4))
    return model


def adapter(place: Path) -> None:
    save_adapter(converted(), place)


def merged(place: Path) -> None:
    export_merged(converted(), place, tiny_tokenizer())


def lora(place: Path) -> None:
    export_lora(converted(), place, tiny_tokenizer())


def checkpoint(place: Path) -> None:
    LocalCheckpointIO().save_checkpoint({"state_dict": {"delta": torch.ones(4096)}}, place)


def sharded_checkpoint(place: Path) -> None:
    content = {"state_dict": {"delta": torch.ones(4096)}, "optimizer_states": [], "epoch": 1}
    save_directory(content, Location.of(place))


def config(place: Path) -> None:
    parser = RunParser()
    parser.add_argument("--text", default="x" * 20_000)
    parser.save(parser.parse_args([]), place, overwrite=True)


def results(place: Path) -> None:
    scores = [Score("subject", f"subject {number}", 5, 10, 0.5, 0.4, 0.6) for number in range(500)]
    write_results(place, "mmlu", {"letter": scores}, {"model": "tiny"})


def table(place: Path) -> None:
    with replacing(place) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([[number] * 10 for number in range(2000)])


WRITERS: dict[str, Callable[[Path], None]] = {
    "adapter": adapter,
    "merged export": merged,
    "LoRA export": lora,
    "checkpoint": checkpoint,
    "sharded checkpoint": sharded_checkpoint,
    "config": config,
    "results": results,
    "table": table,
}
