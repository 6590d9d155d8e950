"""Loads the tokenizer of a data module and its chat template."""

from collections.abc import Sequence
from pathlib import Path

from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from paca_lightning.core.errors import PaCAError
from paca_lightning.core.paths import looks_local, where_it_was_sought
from paca_lightning.tasks.data.new_tokens import extend_tokenizer

DEFAULT_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""For tokenizers without a template: ChatML whose turns end with the tokenizer's own end-of-sequence token.

So generation stops as usual, and the model needs no embedding of a token it has never seen.
"""


def load_tokenizer(
    name: str,
    chat_template: str | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    new_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerBase:
    """Load a tokenizer, set its chat template, and add new tokens.

    Args:
        name: A local directory or a hub id.
        chat_template: A Jinja template, or the path of a file with one, that replaces the tokenizer's own.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the tokenizer.
        new_tokens: Tokens to add (see ``extend_tokenizer``).

    Returns:
        The tokenizer; its `chat_template` is the given one, else its own, else `DEFAULT_CHAT_TEMPLATE`.

    Raises:
        PaCAError: There is no such tokenizer, it has neither a chat template nor an end-of-sequence token, or a new
            token cannot be added.
    """
    tokenizer = plain_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    extend_tokenizer(tokenizer, new_tokens)
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    elif tokenizer.chat_template is None:
        if tokenizer.eos_token is None:
            raise PaCAError(
                f"tokenizer {name!r}: has no chat template, and no end-of-sequence token to end a turn with. "
                "Set `chat_template`."
            )
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def plain_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is.

    Args:
        name: A local directory or a hub id.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run code that comes with the tokenizer.

    Raises:
        PaCAError: There is no such tokenizer.
    """
    if looks_local(name) and not Path(name).expanduser().exists():
        raise PaCAError(
            f"tokenizer {name!r}: does not exist ({where_it_was_sought(name)}). Correct it, or give a hub id: "
            "owner/name."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise PaCAError(
            f"tokenizer {name!r}: cannot be loaded ({str(error).splitlines()[0]}). Give a directory that "
            "`save_pretrained` wrote, or a hub id; offline, a hub id works only if it was downloaded before, so save "
            "the tokenizer on a connected machine and give its directory."
        ) from error
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with. Any will do, as padding is masked and never trained."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that decides how a tokenizer renders and tokenizes a conversation."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    template, special = tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items())
    return Hasher.hash([type(tokenizer).__name__, backend, template, special])


def _read_template(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PaCAError(
            f"chat_template {chat_template!r}: is neither a Jinja template nor a readable file ({error})."
        ) from error
