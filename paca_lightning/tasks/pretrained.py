"""Loads a Hugging Face model from a directory or a hub id, and names what is wrong with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from paca_lightning.core.dtypes import long_dtype
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import looks_local, where_it_was_sought
from paca_lightning.core.sealed_files import check_weights
from paca_lightning.core.unchanged import unchanged
from paca_lightning.tasks.decoder_blocks import checkpoint_activations, compile_blocks

NOT_LOADED = "could not be loaded"
"""What the error for a model says whose files cannot be read, or are not there."""

MODEL_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json")

DTYPES = ("auto", "float32", "bfloat16", "float16")


def build_for_training(
    model: str,
    *,
    revision: str | None = None,
    pretrained: bool = True,
    activation_checkpointing: bool | Literal["selective"] = False,
    compile: bool = False,
    liger: bool = False,
    streamed: bool = False,
    build: Callable[..., PreTrainedModel] | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """A model as :func:`build_causal_lm` builds it, with its decoder blocks checkpointed and compiled as asked.

    Args:
        model: Directory with ``config.json`` and weights, or hub id.
        revision: Branch, tag or commit on the hub.
        pretrained: Whether to load weights.
        activation_checkpointing: See :func:`~paca_lightning.tasks.decoder_blocks.checkpoint_activations`.
        compile: Whether to compile each decoder block.
        liger: See :func:`~paca_lightning.tasks.liger.use_liger`.
        streamed: Build on the meta device, and leave the path of the weights at ``model.checkpoint_directory``: the
            strategy loads them shard by shard, and no process ever holds all.
        build: Builds another kind of model than :func:`build_causal_lm`, with the same arguments.
        **settings: Further settings of :func:`build_causal_lm`.

    Raises:
        PaCAError: If the model cannot be loaded, checkpointed or compiled.
    """
    with torch.device("meta") if streamed else nullcontext():
        built = (build or build_causal_lm)(model, revision=revision, pretrained=pretrained, **settings)
    if streamed:
        vars(built)["checkpoint_directory"] = checkpoint_directory(model, revision)
    if liger:
        from paca_lightning.tasks.liger import use_liger

        use_liger(built)
    checkpoint_activations(built, activation_checkpointing)
    if compile:
        compile_blocks(built)
    return built


def build_causal_lm(model: str, **settings: Any) -> PreTrainedModel:
    """A causal language model in train mode, on which activation checkpointing and dropout depend.

    Args:
        model: Directory with ``config.json`` and weights, or hub id.
        **settings: As for :func:`load_model`.

    Raises:
        PaCAError: As :func:`load_model`, or if the weights lack a tensor.
    """
    loaded, missing = load_model(AutoModelForCausalLM, model, **settings)
    check_complete(model, missing)
    return loaded


def check_complete(model: str, missing: list[str]) -> None:
    """Refuse files that lack a part of a model.

    Args:
        model: Directory or hub id.
        missing: Names of what they lack, as :func:`load_model` gives them.

    Raises:
        PaCAError: If there are any.
    """
    if missing:
        raise PaCAError(
            f"The weights of {model!r} lack {len(missing)} tensors that its config.json names, such as {missing[0]!r}. "
            "They would stay random. Get the whole model, or set pretrained=False to train from random weights."
        )


def load_model(
    auto_class: Any,
    model: str,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    pretrained: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    in_memory: bool = False,
    **changes: Any,
) -> tuple[PreTrainedModel, list[str]]:
    """A model of any of transformers' auto classes in train mode, and the names of what its files lack.

    Under ``torch.device("meta")`` no weights are read, whatever ``pretrained`` says.

    Args:
        auto_class: Such as ``AutoModelForCausalLM``.
        model: Directory with ``config.json`` and weights, or hub id.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ... Default: ``sdpa`` if the model has it, or
            else ``eager``.
        pretrained: False gives random weights of the shape in ``config.json`` and reads no weight file.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the model.
        in_memory: Copy the weights into memory. On the CPU they are views of the mapped files otherwise, and change
            with them.
        **changes: Entries of the model's config to change, such as ``num_labels``.

    Raises:
        PaCAError: If the directory is missing or holds no model, or is an export whose weights changed, a file changes
            while it is read, the hub cannot be reached, or the model refuses a setting.
    """
    dtype = long_dtype(dtype)
    if dtype not in DTYPES:
        raise PaCAError(f"dtype={dtype!r} is unknown. Choose one of {list(DTYPES)}.")
    _check_directory(model)
    source = {"revision": revision, "trust_remote_code": trust_remote_code}
    missing: list[str] = []
    with _named_errors(model, auto_class, attn_implementation):
        if pretrained and torch.get_default_device().type != "meta":
            with unchanged(directory := Path(model).expanduser(), MODEL_FILES):
                check_weights(directory)
                result: Any = auto_class.from_pretrained(
                    model,
                    dtype=dtype,
                    attn_implementation=attn_implementation,
                    output_loading_info=True,
                    **source,
                    **changes,
                )
                loaded, found = result
                if in_memory:
                    _copy_mapped(loaded)
            missing = sorted(found["missing_keys"])
        else:
            config = AutoConfig.from_pretrained(model, **source, **changes)
            loaded = auto_class.from_config(
                config,
                dtype=(config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    if attn_implementation is None and getattr(loaded.config, "attn_logit_softcapping", None):
        loaded.set_attn_implementation("eager")  # transformers before 5.21 takes SDPA, which leaves softcapping out
    return loaded.train(), missing


def read_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model.

    Args:
        model: Directory with ``config.json``, or hub id.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the model.

    Raises:
        PaCAError: If there is none, or the hub cannot be reached.
    """
    _check_directory(model)
    with _named_errors(model):
        config: Any = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    return config


@contextmanager
def _named_errors(model: str, auto_class: Any = None, attn_implementation: str | None = None) -> Iterator[None]:
    """Raise what transformers finds wrong with a model as a PaCAError."""
    try:
        yield
    except PaCAError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if "Unrecognized configuration class" in str(error):
            raise PaCAError(
                f"The model {model!r} {NOT_LOADED} as a model of this task: transformers has no such head for it "
                f"({auto_class.__name__})."
            ) from error
        hint = (
            "Leave attn_implementation out to take what the model has."
            if attn_implementation is not None and "attention" in str(error)
            else "Without network, give a local directory that holds config.json, the weights (*.safetensors) and the "
            "tokenizer, as save_pretrained() writes it."
        )
        raise PaCAError(f"The model {model!r} {NOT_LOADED}: {str(error).strip()}\n{hint}") from error


def checkpoint_directory(model: str, revision: str | None = None) -> str:
    """Directory of a model's safetensors files; those of a hub id are downloaded first.

    Args:
        model: Directory or hub id.
        revision: Branch, tag or commit on the hub.

    Raises:
        PaCAError: If the hub cannot be reached.
    """
    if Path(model).expanduser().is_dir():
        return str(Path(model).expanduser())
    try:
        return str(
            snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
        )
    except (OSError, ValueError) as error:
        raise PaCAError(
            f"The weights of {model!r} could not be downloaded: {error}\nWithout network, give a local directory."
        ) from error


@torch.no_grad()
def _copy_mapped(model: PreTrainedModel) -> None:
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.untyped_storage().resizable():  # memory that PyTorch did not allocate: the mapped file's
            tensor.data = tensor.clone()


def _check_directory(model: str) -> None:
    path = Path(model).expanduser()
    if looks_local(model) and not path.is_dir():
        raise PaCAError(
            f"The model directory {model!r} does not exist ({where_it_was_sought(model)}). Correct `model`, or give a "
            "hub id: owner/name."
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise PaCAError(
            f"The directory {model!r} has no config.json, so it is not a Hugging Face model. It holds: "
            f"{sorted(entry.name for entry in path.iterdir())[:10]}."
        )
