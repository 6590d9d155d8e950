"""Refuses rows of other tasks by name: preference pairs, ratings, images and sound, multiple-choice questions."""

from paca_lightning.core.errors import PaCAError
from paca_lightning.tasks.data.fields import Row, is_empty

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_REVISIONS = {"reflection", "corrected"}
_PREFERENCES = (("chosen", "rejected"), ("chosen_response", "rejected_response"))


def refuse_other_tasks(row: Row) -> None:
    """Check that a row belongs to supervised fine-tuning on text.

    Raises:
        PaCAError: It belongs to another task; the message names the task and the way out.
    """
    filled = {name for name, value in row.items() if not is_empty(value)}
    for names in _PREFERENCES:
        if found := filled & set(names):
            raise PaCAError(
                f"the fields {_listed(found)} make it a preference pair, which belongs to preference training (DPO): "
                "use PreferenceDataModule, with PreferenceModule. To train on the preferred answers alone, make them "
                "the last turns of the conversations and remove the other ones"
            )
    rating = "kto_tag" if "kto_tag" in filled else "label"
    if rating == "kto_tag" or isinstance(row.get(rating), bool):
        raise PaCAError(
            f"the field {rating!r} rates the answer as good or bad, which belongs to training on ratings (KTO): use "
            "PreferenceDataModule, with PreferenceModule. To train on the good answers alone, keep the rows with "
            f"{rating!r}: true, and remove the field"
        )
    if found := filled & set(_MEDIA):
        raise PaCAError(
            f"the field {_listed(found)} belongs to a model of images, video or sound; InstructionDataModule takes "
            "text alone. Remove such rows, or the field if the text suffices"
        )
    if {"instruction", "output"} <= filled and (found := filled & _REVISIONS):
        raise PaCAError(
            f"beside {_listed(found)}, 'output' is a draft (axolotl's reflection), and it alone would be trained. Put "
            f"the final answer into 'output' and remove {_listed(found)}, or write draft, critique and final answer as "
            "a conversation"
        )
    if {"question", "choices"} <= filled:
        raise PaCAError(
            "the fields 'question' and 'choices' make it a multiple-choice question: use MMLUDataModule, or "
            "write it as a conversation"
        )


def _listed(names: set[str]) -> str:
    return " and ".join(repr(name) for name in sorted(names))
