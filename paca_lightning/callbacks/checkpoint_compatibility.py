"""What a checkpoint of a PaCA run tells beside its deltas, and how a run that restores it compares and applies that."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from paca_lightning.adapters.checkpoint import NOTE
from paca_lightning.adapters.fingerprint import check_base
from paca_lightning.adapters.new_tokens import check_run_has
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.select import waits_for_data
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.new_tokens import parse_new_tokens
from paca_lightning.core.private.lightning import spawns_workers
from paca_lightning.layers.base import paca_layers

BASE = "paca_base"
"""Key of a checkpoint of an earlier version: values of the base columns, by layer. Now the note has them."""

AFTER_SPAWN = (
    " After a run in spawned processes the module of this process holds the merged weights: evaluate it without a "
    "ckpt_path and without PaCAStrategy, build the module again, or use strategy='ddp'."
)


def check_checkpoint(checkpoint: dict[str, Any], pl_module: LightningModule, *, resumes: bool) -> None:
    """Refuse a checkpoint that no run with this module's new tokens, or no PaCA run at all, has written.

    Args:
        checkpoint: What was read.
        pl_module: With its model built.
        resumes: Whether its training goes on.

    Raises:
        PaCAError: If it is to go on, and the checkpoint has weights, but no delta; or if new tokens differ.
    """
    state = checkpoint.get("state_dict", {})
    if resumes and state and not any(key.endswith("paca_delta") for key in state):
        raise PaCAError(
            "The checkpoint was written without PaCA, so its optimizer and loops belong to another training. To start "
            "from its weights, call module.load_state_dict(checkpoint['state_dict']) and fit without ckpt_path."
        )
    if (new := parse_new_tokens(checkpoint.get(NOTE, {}).get("new_tokens"))) is not None:
        check_run_has(pl_module, new, "The checkpoint")


def saved_base(checkpoint: dict[str, Any]) -> dict[str, list[float]] | None:
    """Some values of the base columns of the run that saved a checkpoint; None if it is of sharded ranks and old."""
    samples: dict[str, list[float]] | None = checkpoint.get(NOTE, {}).get("fingerprint", checkpoint.get(BASE))
    return samples


def check_restored_base(saved: dict[str, list[float]] | None, trainer: Trainer, pl_module: LightningModule) -> None:
    """Compare the base model with the values that a restored checkpoint holds, if it holds any.

    Raises:
        PaCAError: If it is another one.
    """
    if saved is not None:
        check_base(saved, pl_module, hint=AFTER_SPAWN if spawns_workers(trainer) else "")


def columns_are_chosen(module: nn.Module) -> bool:
    """Whether no layer waits for data to choose its columns."""
    return not any(waits_for_data(layer) for _, layer in paca_layers(module))


def scalings(report: ConversionReport | None) -> dict[str, float]:
    """Each layer's scaling by path."""
    return {} if report is None else {layer.path: layer.scaling for layer in report.layers}


def check_scalings(saved: dict[str, float], here: dict[str, float]) -> None:
    """Refuse a checkpoint whose deltas would enter the weights with another scaling.

    Raises:
        PaCAError: If a layer's scaling differs.
    """
    for path, scaling in saved.items():
        if here.get(path, scaling) != scaling:
            raise PaCAError(
                f"The checkpoint trained {path!r} with scaling {scaling:g} (alpha / r), and this run has "
                f"{here[path]:g}: the deltas would mean other weights. Use the alpha it was trained with."
            )
