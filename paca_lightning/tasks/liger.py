"""Liger's fused kernels for a model's norms, activations and rotary embeddings."""

from importlib.util import find_spec

import torch
import transformers
from transformers import PreTrainedModel

from paca_lightning.core.errors import PaCAError


def check_liger() -> None:
    """Check that Liger's kernels can run here.

    Raises:
        PaCAError: If Liger or Triton is not installed, or there is no GPU.
    """
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    if missing:
        raise PaCAError(
            f"liger=True needs {' and '.join(missing)}, not installed here. Run: pip install 'paca-lightning[liger]'."
        )
    if not torch.accelerator.is_available():
        raise PaCAError("liger=True needs a GPU: Liger's kernels are written in Triton. Set liger=False.")


def use_liger(model: PreTrainedModel) -> None:
    """Put Liger's kernels into a model, in place. Its linear layers stay as they are, so that PaCA can convert them.

    Liger's own losses are left out: :class:`~paca_lightning.tasks.loss.CausalLMLoss` computes the loss in chunks, too.
    Liger replaces rotary embeddings in all models of this kind in the process.

    Args:
        model: Before or after its conversion by PaCA.

    Raises:
        PaCAError: If the kernels cannot run here, or Liger has none for this model.
    """
    check_liger()
    replace_modules(model)


def replace_modules(model: PreTrainedModel) -> None:
    """Let transformers' integration replace what Liger has kernels for.

    Raises:
        PaCAError: If it replaces nothing, or transformers has no such integration.
    """
    try:
        from transformers.integrations.liger import apply_liger_kernel
    except ImportError as error:  # 5.0
        raise PaCAError(f"liger=True needs a later transformers than {transformers.__version__}.") from error
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
    leaves = (module for module in model.modules() if next(module.children(), None) is None)
    if not any(repr(leaf).startswith("Liger") for leaf in leaves):  # norms, which every supported model has
        raise PaCAError(f"Liger has no kernels for {type(model).__name__}. Set liger=False.")
