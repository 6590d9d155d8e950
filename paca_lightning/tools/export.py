"""Write a model and its adapter in a form that other programs load."""

from pathlib import Path
from typing import Literal

from paca_lightning.adapters.export import check_no_adapter, export_lora, export_merged
from paca_lightning.adapters.files import SETTINGS
from paca_lightning.adapters.peft_paca import export_peft_paca
from paca_lightning.adapters.saved import saved_config
from paca_lightning.core.errors import PaCAError
from paca_lightning.core.files import check_writable
from paca_lightning.tools.model_with_adapters import ModelWithAdapters


def export(
    model: str,
    adapter: str,
    output: str,
    format: Literal["merged", "lora", "peft-paca"] = "merged",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a model with its adapter as a plain Hugging Face checkpoint, or the adapter for PEFT.

    Args:
        model: Hugging Face directory or hub id of the base model.
        adapter: Adapter directory, such as the one that AdapterCheckpoint wrote, or one of PEFT's PaCA or of the fork
            by PaCA's authors, or a Lightning checkpoint of a run: a .ckpt file, or the directory of a sharded one. If
            an adapter has a tokenizer, that one is written, as it has the chat template of training.
        output: Directory to write. Other files in it stay, except weights of an earlier export.
        format: merged: a plain Hugging Face checkpoint in bf16. lora: an exact LoRA adapter of one rank, in PEFT's
            layout, for servers that know only LoRA. peft-paca: an adapter of PEFT's own PaCA (0.22).
        revision: Branch, tag or commit of the model on the hub.
        trust_remote_code: Run code that comes with the model.

    Raises:
        PaCAError: If the model or the adapter cannot be used, or --output cannot be written, or holds an adapter that
            would be lost or would be loaded with the merged model.
    """
    for name, source in (("--model", model), ("--adapter", adapter)):
        if Path(source).exists() and Path(source).resolve() == Path(output).resolve():
            raise PaCAError(f"--output is {name}: {output!r}. Give another directory; nothing was written.")
    if Path(output, SETTINGS).exists():
        raise PaCAError(f"--output holds a trained adapter, which would be lost: {output!r}. Give another directory.")
    check_writable(output, "--output")
    if format == "merged":
        check_no_adapter(output)
    # An adapter holds modules trained whole in fp32, which a bf16 model would round; deltas are fp32 in any model.
    whole = format != "merged" and bool(saved_config(adapter).modules_to_save)
    dtype = "float32" if whole else "auto"
    models = ModelWithAdapters(
        model, [adapter], dtype, revision=revision, trust_remote_code=trust_remote_code, with_head=True
    )
    built, tokenizer = models.model, models.tokenizer(models.names[0])
    if format == "merged":
        export_merged(built, output, tokenizer)
    elif format == "lora":
        export_lora(built, output, tokenizer)
    else:
        export_peft_paca(built, output, tokenizer)
    print(f"Written: {output}")
