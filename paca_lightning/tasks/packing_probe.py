"""Tries whether a model keeps the documents of a packed row apart."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from transformers import PreTrainedModel

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.evaluating import evaluating, reshard_units
from paca_lightning.core.private.lightning import trainer_of
from paca_lightning.tasks.data.batch import TokenBatch
from paca_lightning.tasks.packed_rows import WAYS, PackedRows

_TOKENS = 8  # of each document: more than the kernels of convolutions hold
_NOISE = 4  # times the rounding noise is still noise
_ROUNDING = 1e-5  # share of the spread of the logits


def check_packing(module: LightningModule, datamodule: object, rows: PackedRows, model: PreTrainedModel) -> None:
    """Try the model before a run, if a data module packs its rows (see ``choose_way``)."""
    if getattr(datamodule, "hparams", {}).get("packing") and not rows.tried:
        choose_way(module, rows, model)


def check_first_batch(module: LightningModule, batch: TokenBatch, rows: PackedRows, model: PreTrainedModel) -> None:
    """Try the model at the first training batch, if it is packed, on any rank (see ``choose_way``)."""
    if not rows.tried and isinstance(batch, Mapping) and "position_ids" in batch:
        rows.tried = True
        restarts = bool((batch["position_ids"].diff(dim=-1) != 1).any())
        if module.trainer.strategy.reduce_boolean_decision(restarts, all=False):
            choose_way(module, rows, model)


def choose_way(module: LightningModule, rows: PackedRows, model: PreTrainedModel) -> None:
    """Find a way to tell a model the documents of packed rows with which it keeps them apart.

    Three documents are packed into a row, once in another order, and compared with the same documents in rows of their
    own. A few tokens, without gradients, dropout, compiling and random numbers: nothing is left behind.

    Args:
        module: Its ``forward`` makes logits (B, T, V) of a batch, by ``rows``. It may be sharded with FSDP2.
        rows: Gets the way.
        model: The model in the module.

    Raises:
        PaCAError: If the model mixes documents in every way.
    """
    rows.tried = True
    trainer, name = trainer_of(module), type(model).__name__
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        rank_zero_warn(
            f"Whether {name} keeps packed documents apart is not tried, as {type(strategy).__name__} runs the model "
            "in training steps only. strategy='paca_fsdp2' can try it."
        )
        return
    # Not from the weight's shape, as some strategies shard it.
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", model.config.get_text_config().vocab_size)
    failures: list[str] = []
    for way in WAYS:
        rows.way = way
        with _as_in_evaluation(module):
            failure = _failure(module, vocabulary, module.device)
        apart = failure is None
        # One decision for all ranks, as each must run the same collectives.
        if strategy is not None:
            apart = strategy.reduce_boolean_decision(apart, all=True)
        if apart:
            if failures:
                rank_zero_info(f"{name} mixes packed documents if told by {next(iter(WAYS))}: it gets {way}.")
            return
        failures.append(f"with {way}, {failure or 'another rank fails'}")
    raise PaCAError(
        f"{name} does not keep packed documents apart, so it would train across them: {'; '.join(failures)}. Set "
        "packing: false (or leave out `position_ids`, with a data module of your own)."
    )


def _failure(logits_of: Callable[[TokenBatch], Tensor], vocabulary: int, device: torch.device) -> str | None:
    """How a model fails to keep packed documents apart, in words; None if it does not fail."""
    ids = (torch.arange(4 * _TOKENS, device=device) * 7919 + 11) % vocabulary
    first, second, third, fourth = ids.view(4, 1, _TOKENS)
    positions = torch.arange(_TOKENS, device=device).repeat(1, 3)

    def packed(*documents: Tensor) -> Tensor:
        logits = logits_of({"input_ids": torch.cat(documents, 1), "position_ids": positions})
        return logits.view(3, _TOKENS, -1)

    try:
        apart = logits_of({"input_ids": torch.cat([first, second, third])})
        rows = [packed(first, second, third), packed(first, second, fourth), packed(third, second, first)]
    except Exception as error:  # models raise anything on inputs that they do not take
        return f"it fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    precision = torch.finfo(apart.dtype).eps
    # Some models give -inf to tokens that do not exist.
    apart, row, other_end, reordered = (logits.double().nan_to_num(0, 0, 0) for logits in (apart, *rows))
    spread = apart.std()
    # What follows a document cannot change its logits but by rounding, as when experts get other numbers of tokens.
    noise = (row[1] - other_end[1]).abs().max()
    change = (row[1] - reordered[1]).abs().max()
    if change > _NOISE * noise + _ROUNDING * spread:
        return f"what stands before a document changes its logits by {float(change / spread):.1g} of their spread"
    errors = (row - apart).norm(dim=-1) / (apart - apart.mean(-1, keepdim=True)).norm(dim=-1)
    # The median, as rounding may send single tokens to other experts.
    typical = errors.median(1).values.max()
    if typical > max(precision**0.5, 1e-2):
        return f"the logits of packed documents differ from those of each alone by {float(typical):.1g} of their spread"
    return None


@contextmanager
def _as_in_evaluation(module: LightningModule) -> Iterator[None]:
    """Run forwards of a module that leave nothing behind: in eval mode and eagerly, with random states restored."""
    trainer = trainer_of(module)
    precision = nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
    eagerly = torch.compiler.set_stance("force_eager")
    try:
        with evaluating(module), isolate_rng(), torch.no_grad(), eagerly, precision:
            yield
    finally:
        reshard_units(module)
