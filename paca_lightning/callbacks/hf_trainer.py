"""PaCATrainerCallback: PaCA in Hugging Face's Trainer and the trainers that build on it, such as TRL's."""

from pathlib import Path
from typing import Any

import rich
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import override

from paca_lightning.adapters.adapter import load_adapter, save_adapter
from paca_lightning.adapters.fingerprint import base_samples, check_base
from paca_lightning.adapters.state_dict import keep_everything, keep_trained_state
from paca_lightning.callbacks.checkpoint_compatibility import BASE, check_scalings
from paca_lightning.callbacks.life_cycle import config_beside_adapter, convert_beside_adapter, present_conversion
from paca_lightning.conversion.along_rates import set_along_rates
from paca_lightning.conversion.report import ConversionReport
from paca_lightning.conversion.state import config_of, conversion_of
from paca_lightning.conversion.write_back import attach, layers_stepped_by
from paca_lightning.core.config import PaCAConfig
from paca_lightning.core.dtensor import is_first_rank
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable, written_aside
from paca_lightning.layers.base import paca_layers

SCALING = "scaling"


class PaCATrainerCallback(TrainerCallback, ExportableState):
    """Train some input columns of each frozen weight in Hugging Face's Trainer, or in TRL's (PaCA, arXiv 2503.01905).

    Pass it as ``Trainer(callbacks=[PaCATrainerCallback(PaCAConfig(r=16))])``. It converts the model when the Trainer is
    built, or takes a model that was converted before, and writes the trained columns back after every optimizer step.
    Checkpoints hold what is trained and are adapter directories too. They resume bitwise, and serve
    ``load_best_model_at_end``. At the end of training the adapter is saved, and the model's state dict is whole again.

    Args:
        config: What to train. Default: the settings of the adapter or of the converted model, or 16 columns of every
            linear layer but the output head. A selection that looks at data needs
            ``apply_paca(model, config, calibration=batches)`` before the Trainer is built.
        adapter: Directory of a trained adapter to start from.
        dirpath: Directory for the adapter at the end of training. Default: ``adapter`` in ``output_dir``.
        full_checkpoints: Keep the base weights in checkpoints.

    Attributes:
        report: What was converted, once the Trainer is built.

    Raises:
        PaCAError: If the adapter is damaged, or ``config`` contradicts it.
    """

    def __init__(
        self,
        config: PaCAConfig | None = None,
        *,
        adapter: str | None = None,
        dirpath: str | None = None,
        full_checkpoints: bool = False,
    ) -> None:
        self.config = config_beside_adapter(config, adapter) if config is not None or adapter is not None else None
        self.adapter = adapter
        self.dirpath = dirpath
        self.full_checkpoints = full_checkpoints
        self.report: ConversionReport | None = None
        self._model: nn.Module | None = None
        self._handle: RemovableHandle | None = None

    @override
    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Check the run and convert the model, before the Trainer builds an optimizer."""
        _check_backend(args)
        check_writable(self._directory(args), "PaCATrainerCallback(dirpath=...)")
        config = self.config or config_of(model) or PaCAConfig()
        if self.adapter is not None and config.steps_by_input and conversion_of(model) is None:
            raise PaCAError(
                f"Each column of {self.adapter!r} moves by a step that fits its input, which the Trainer's batches do "
                f"not tell. Call load_adapter(model, {self.adapter!r}) and apply_paca(model, config, "
                "calibration=batches) before the Trainer is built, and leave adapter out."
            )
        self.report = convert_beside_adapter(model, config, self.adapter, data_follows=False)
        conversion = present_conversion(model)
        if self.adapter is not None and conversion.adapter != self.adapter:
            load_adapter(model, self.adapter)
            conversion.adapter = self.adapter
        self._follow(model)

    @override
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Compare with the checkpoint that is resumed, attach the write-back, and print the report."""
        _check_optimizer(model, optimizer)
        self._follow(model)
        _check_checkpoint(state, type(self).__name__, model)
        self._detach()
        # No split: the state of a checkpoint is loaded before this. The Trainer's own optimizer has a group of them.
        set_along_rates(optimizer, model, [] if lr_scheduler is None else [lr_scheduler], may_split=False)
        self._handle = attach(optimizer, model)
        if self.report is not None and state.is_world_process_zero:
            self.report.learning_rate = args.learning_rate
            self.report.along_rate = self.report.config.norms_lr * args.learning_rate
            rich.print(self.report)

    @override
    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Make the checkpoint an adapter directory, too."""
        checkpoint = Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
        if checkpoint.is_dir():  # a search for hyperparameters saves elsewhere
            save_adapter(model, checkpoint)

    @override
    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        """Save adapter and tokenizer. ``Trainer.save_model`` then writes a whole model with the trained columns."""
        self._detach()
        save_adapter(model, directory := self._directory(args))
        if is_first_rank() and hasattr(processing_class, "save_pretrained"):
            with written_aside(directory) as scratch:  # after the adapter, which a failing tokenizer does not cost
                processing_class.save_pretrained(scratch)
        keep_everything(model)

    @override
    def state(self) -> dict[str, Any]:
        """What a checkpoint tells beside the deltas: the scalings, and some values of the base model."""
        settings = {"adapter": self.adapter, "dirpath": self.dirpath, "full_checkpoints": self.full_checkpoints}
        if self._model is None or not any(paca_layers(self._model)):
            return {"args": settings, "attributes": {}}
        saved = {BASE: base_samples(self._model), SCALING: _scalings(self._model)}
        return {"args": settings, "attributes": {"checkpoint": saved}}

    def _follow(self, model: nn.Module) -> None:
        self._model = model
        if self.full_checkpoints:
            keep_everything(model)
        else:
            keep_trained_state(model)

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _directory(self, args: TrainingArguments) -> Path:
        return Path(self.dirpath or Path(args.output_dir or ".", "adapter"))


def _check_backend(args: TrainingArguments) -> None:
    for name, given in (("fsdp", args.fsdp), ("deepspeed", args.deepspeed)):
        if given:
            raise PaCAError(
                f"TrainingArguments({name}=...) cannot train PaCA: the optimizer steps other parameters than those of "
                "the layers. Use one device or DDP, or Lightning with PaCAStrategy and strategy='paca_fsdp2'."
            )


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    everything = {path for path, _ in paca_layers(model)}
    if not everything:
        raise PaCAError(
            "The model that the Trainer trains has no PaCA layers. Pass PaCATrainerCallback in callbacks=[...] when "
            "the Trainer is built. With model_init, which builds another model for each training, call apply_paca in "
            "it."
        )
    if missed := sorted(everything - set(layers_stepped_by(optimizer, model))):
        raise PaCAError(
            f"{len(missed)} of {len(everything)} PaCA layers are not in the optimizer ({missed[0]!r} is one), so they "
            "would not be trained. Let the Trainer build the optimizer, or build yours after apply_paca, from "
            "[p for p in model.parameters() if p.requires_grad]."
        )


def _check_checkpoint(state: TrainerState, name: str, model: nn.Module) -> None:
    """Compare a model with what the checkpoint tells of the run that saved it; a new run compares with itself."""
    states: dict[str, Any] = state.stateful_callbacks or {}  # type: ignore[assignment]  # what they are once exported
    saved = states.get(name, {})
    saved = saved[0] if isinstance(saved, list) else saved
    checkpoint = saved.get("attributes", {}).get("checkpoint", {})
    check_scalings(checkpoint.get(SCALING, {}), _scalings(model))
    if (base := checkpoint.get(BASE)) is not None:
        check_base(base, model)


def _scalings(model: nn.Module) -> dict[str, float]:
    return {path: layer.scaling for path, layer in paca_layers(model)}
