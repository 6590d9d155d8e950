"""CPU time of saves with and without checksums: `python -m tests.reliability.checksum_cost`."""

import argparse
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from paca_lightning import PaCAConfig, apply_paca, export_merged, save_adapter
from paca_lightning.strategies.checkpoint_io import LocalCheckpointIO
from paca_lightning.strategies.fsdp2.location import Location
from paca_lightning.strategies.fsdp2.saving import save_directory


@contextmanager
def without_crcs() -> Iterator[None]:
    """Inside, PyTorch writes zeros in place of the CRC-32 of each record."""
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


WITHOUT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "adapter": lambda: patch("paca_lightning.adapters.adapter.tensor_checksum", lambda tensor: "0" * 32),
    "sharded": lambda: patch("paca_lightning.strategies.fsdp2.saving.shared_checksums", lambda directory, names: {}),
    "export_merged": lambda: patch("paca_lightning.adapters.export.seal_weights", lambda directory: None),
    "checkpoint": without_crcs,
}
"""Inside, a save hashes nothing."""


def decoder(width: int, r: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=4096,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    apply_paca(model, PaCAConfig(r=r))
    return model


def saves(width: int, r: int) -> dict[str, Callable[[Path], Any]]:
    """What saves one model in each format."""
    model = decoder(width, r)
    trained = [tensor for tensor in model.parameters() if tensor.requires_grad]
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name.endswith(("paca_delta", "paca_indices"))
    }
    moments = {f"{number}.{kind}": torch.randn_like(t) for number, t in enumerate(trained) for kind in ("avg", "sq")}
    content = {"state_dict": state, "optimizer_states": [{"state": moments}]}

    def sharded(place: Path) -> None:
        save_directory(content, Location.of(place))

    return {
        "adapter": lambda place: save_adapter(model, place),
        "sharded": sharded,
        "export_merged": lambda place: export_merged(model, place),
        "checkpoint": lambda place: LocalCheckpointIO().save_checkpoint(content, place),
    }


def cpu_seconds(save: Callable[[Path], Any], place: Path, inside: AbstractContextManager[Any]) -> float:
    with inside:
        start = time.process_time()
        save(place)
        return time.process_time() - start


def size(place: Path) -> int:
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    disable_progress_bar()
    for width, r in ((128, 8), (256, 64), (512, 256)):
        for name, save in saves(width, r).items():
            with tempfile.TemporaryDirectory() as scratch:
                place = Path(scratch) / "saved"
                cpu_seconds(save, place, nullcontext())
                bytes_saved = size(place)
                times: dict[bool, list[float]] = {True: [], False: []}
                for number in range(2 * options.rounds):
                    hashed = number % 2 == 0
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
                    times[hashed].append(cpu_seconds(save, place, nullcontext() if hashed else WITHOUT[name]()))
            with_, without = min(times[True]), min(times[False])  # others on the machine only add
            mib, share = bytes_saved / 2**20, 100 * (with_ / without - 1)
            print(f"{name:14} {mib:7.1f} MiB  {1000 * with_:7.1f} ms, unhashed {1000 * without:7.1f} ms  {share:+.1f}%")


if __name__ == "__main__":
    main()
