"""Answer prompts with a model and its adapter."""

from paca_lightning.errors import PaCAError
from paca_lightning.reversal import merge
from paca_lightning.tasks.samples import greedy_answer
from paca_lightning.tools.loading import load_with_adapter


def generate(
    model: str, prompts: list[str], adapter: str | None = None, max_new_tokens: int = 128, dtype: str = "auto"
) -> None:
    """Print a model's greedy answer to each prompt, in the chat template of training.

    That is the one of the tokenizer in the adapter's directory; of the model's where there is none; and ChatML, as
    training uses it, for a tokenizer without a template.

    Args:
        model: Hugging Face directory or hub id of the base model.
        prompts: What the user says, each in a conversation of its own: '["What is your name?"]'.
        adapter: Adapter directory, such as the one that AdapterCheckpoint wrote. Default: the base model alone.
        max_new_tokens: Longest answer, in tokens.
        dtype: Of the weights: auto (as saved), float32, bfloat16 or float16.

    Raises:
        PaCAError: If the model, its tokenizer or the adapter cannot be used.
    """
    if max_new_tokens < 1:
        raise PaCAError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if not prompts:
        raise PaCAError("There is no prompt. Give a list: --prompts '[\"What is your name?\"]'.")
    built, tokenizer = load_with_adapter(model, adapter, dtype)
    merge(built)
    for prompt in prompts:
        print(f"> {prompt}\n{greedy_answer(built, tokenizer, prompt, max_new_tokens)}\n")
