"""Any method of PEFT on any module: PEFT does the work, and this says what it cannot do."""

import copy
import importlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from paca_lightning.activation_checkpointing.blocks import are_checkpointed
from paca_lightning.adapters.files import CONFIG, base_model_entries, read_json, write_json
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.sealed_files import check_weights
from paca_lightning.other_methods.adapted import AdaptedModel, find_model, plain
from paca_lightning.other_methods.prompts import OwnPositions

if TYPE_CHECKING:
    from peft import PeftConfig

NAME = "default"
"""PEFT's name for the only adapter of a model."""

REFUSED = {
    "ADALORA": "its penalty and its budget need calls in PEFT's own training loop",
    "CPT": "its loss and its token types need PEFT's own forward and data",
    "MULTITASK_PROMPT_TUNING": "each batch must carry task_ids",
    "OSF": "it projects gradients by hooks on full weights",
    "POLY": "each batch must carry task_ids",
    "SHADOW": "it passes an object of its own between the blocks, which losses in the head do not take",
    "XLORA": "it mixes adapters that were trained before",
}
"""PEFT types that need more than a loss and an optimizer, and what."""

MOVES_WEIGHTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initializations of LoRA that change the base weights."""

DESCRIBING = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
"""Settings that say where an adapter comes from, not what it is."""

PEFT_ERRORS = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, ImportError, RuntimeError)


def import_peft() -> Any:
    """The library.

    Raises:
        PaCAError: If it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise PaCAError("PEFTStrategy needs PEFT. Run: pip install 'paca-lightning[peft]'.") from error


class PEFTModel(AdaptedModel):
    """A model with PEFT's layers in it.

    Args:
        wrapper: PEFT's own model around it.
    """

    def __init__(self, wrapper: Any) -> None:
        config = wrapper.peft_config[NAME]
        if (whole := getattr(config, "modules_to_save", None)) is not None:
            config.modules_to_save = list(dict.fromkeys(whole))  # PEFT adds heads to those of an adapter once more
        settings = {name: value for name, value in config.to_dict().items() if name not in DESCRIBING}
        super().__init__(_title(config), wrapper.get_base_model(), plain(settings))
        self.wrapper = wrapper

    def disabled(self) -> AbstractContextManager[None]:
        """Inside this context the model is the base model."""
        initial = str(self.settings.get("init_lora_weights"))
        if initial.startswith(MOVES_WEIGHTS):
            raise PaCAError(
                f"init_lora_weights={initial!r} moves a part of each base weight into the adapter, so PEFT cannot give "
                "the base model back. Load it again."
            )
        context: AbstractContextManager[None] = self.wrapper.disable_adapter()
        return context

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT saves of the adapter."""
        tensors: dict[str, Tensor] = import_peft().get_peft_model_state_dict(self.wrapper, adapter_name=NAME)
        return tensors

    def write(self, directory: Path) -> None:
        """Write the adapter as PEFT does, with sets in order: an adapter has the same bytes in each process."""
        self.wrapper.save_pretrained(str(directory))
        config = read_json(directory / CONFIG)
        sets = [name for name, value in vars(self.wrapper.peft_config[NAME]).items() if isinstance(value, set)]
        write_json(directory / CONFIG, config | {name: sorted(config[name]) for name in sets})

    def saved_settings(self, directory: str) -> dict[str, Any]:
        """The settings of an adapter of PEFT, but for those that say where it comes from."""
        saved = read_peft_config(directory).to_dict().items()
        return plain({name: value for name, value in saved if name not in DESCRIBING})

    def load(self, directory: str) -> None:
        """Load an adapter of PEFT into the present one.

        Raises:
            PaCAError: If it cannot be read, was damaged, does not fit, or cannot be trained further.
        """
        peft, config = import_peft(), self.wrapper.peft_config[NAME]
        if config.peft_type == "P_TUNING" or getattr(config, "prefix_projection", False):
            raise PaCAError(
                f"{directory}: {self.method} saves the prompts that its encoder made, not the encoder, so a run cannot "
                "begin from them. Resume from a checkpoint, or read the adapter with peft.PeftModel.from_pretrained."
            )
        check_weights(Path(directory))
        try:
            weights = peft.utils.load_peft_weights(directory, device="cpu")
            found = peft.set_peft_model_state_dict(self.wrapper, weights, adapter_name=NAME)
        except PEFT_ERRORS as error:
            raise PaCAError(f"{directory}: PEFT cannot load this adapter: {error}") from error
        # PEFT reports what it gave to a prompt's encoder as if it had no place.
        taken = {"prompt_embeddings"} if config.is_prompt_learning else set()
        if found is not None and (extra := [key for key in found.unexpected_keys if key not in taken]):
            raise PaCAError(f"{directory}: {extra[0]!r} has no place in the model.")

    def keep_wide(self) -> None:
        """Cast the parameters to fp32 that PEFT trains in fp32 beside a narrower base."""
        import_peft().tuners.tuners_utils.cast_adapter_dtype(self.wrapper, NAME)


def read_peft_config(directory: str) -> "PeftConfig":
    """The configuration of an adapter.

    Raises:
        PaCAError: If the directory holds none that PEFT can read.
    """
    peft = import_peft()
    try:
        return peft.PeftConfig.from_pretrained(directory)
    except (*PEFT_ERRORS, OSError) as error:
        raise PaCAError(f"{directory!r} is not an adapter of PEFT: {error}") from error


def adapt(module: nn.Module, config: "PeftConfig", path: str | None = None) -> PEFTModel:
    """Put PEFT's layers into a module; all other parameters are frozen.

    Args:
        module: Of a run, with its model built.
        config: Any configuration of PEFT. It is copied.
        path: Of the module to adapt. Default: the Hugging Face model, or without one the module itself.

    Raises:
        PaCAError: If PEFT or a run of ours cannot do what the configuration asks for.
    """
    peft, config = import_peft(), copy.deepcopy(config)
    if (reason := REFUSED.get(config.peft_type or "")) is not None:
        raise PaCAError(f"{type(config).__name__} cannot be trained by PEFTStrategy: {reason}.")
    path, base = find_model(module, path)
    if config.peft_type == "TRAINABLE_TOKENS" and not getattr(config, "token_indices", None):
        raise PaCAError("TrainableTokensConfig trains no token. List some: token_indices=[5, 6].")
    notes = _complete(config, base)
    prompts = config.is_prompt_learning
    if prompts:
        _check_prompts(config, base, path)
    # PEFT freezes what it adapts; what lies beside it is no part of the method either.
    module.requires_grad_(False)
    try:
        wrapper = peft.get_peft_model(base, config, adapter_name=NAME)
    except PEFT_ERRORS as error:
        raise PaCAError(f"PEFT cannot adapt {type(base).__name__} with {type(config).__name__}: {error}") from error
    if prompts:
        OwnPositions().install(wrapper, base.get_output_embeddings())  # type: ignore[operator]
        module.set_submodule(path, wrapper)
    adapted = PEFTModel(wrapper)
    adapted.notes = notes
    return adapted


def _complete(config: Any, base: nn.Module) -> list[str]:
    """Fill in what a configuration leaves to its surroundings, and say so."""
    notes = []
    if config.task_type is None:
        config.task_type = base_model_entries(base)["task_type"]
    if config.peft_type == "SHIRA" and config.random_seed is None:
        config.random_seed = 0
        notes.append("SHiRA's weights are drawn with random_seed 0: a resumed run and other ranks draw the same.")
    return notes


def _check_prompts(config: Any, base: nn.Module, path: str) -> None:
    name = type(config).__name__
    if not path or not hasattr(base, "get_output_embeddings"):
        raise PaCAError(
            f"{name} replaces a Hugging Face model by one with virtual tokens, and the module has none. Use a method "
            "that adapts layers, such as LoRA."
        )
    if config.task_type != "CAUSAL_LM":
        raise PaCAError(f"{name}: prompt methods need a causal language model, not {config.task_type}.")
    if config.peft_type == "PREFIX_TUNING" and are_checkpointed(base):
        raise PaCAError(
            "Prefix tuning passes its prefix as a key-value cache, which activation checkpointing drops. Set "
            "activation_checkpointing: false, or use prompt tuning."
        )


def _title(config: Any) -> str:
    variants = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    if config.peft_type == "LORA":
        return next((title for flag, title in variants.items() if getattr(config, flag, False)), "LoRA")
    return str(config.peft_type.value)
