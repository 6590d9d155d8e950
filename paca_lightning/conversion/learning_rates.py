"""Learning rates that suit PaCA: one place for the summary's remark and for the space that a search starts from.

Adam moves a column by about ``scaling * lr`` a step, so these are values of that product. Where they come from: 4e-3
to 9.5e-3 was best for SmolLM2-135M in short runs with random columns, and LoRA wanted 1 to 3.4 times less
(docs/learning.md); 2.5e-3 (Llama-3-8B and Llama-3.1-70B, conversations) and 4e-4 (Llama-2-7B, MMLU) are in the scripts
of PaCA's authors; 1e-2 is what our tiny test models learn with.
"""

SUITABLE = ((50e6, 1e-2), (1e9, 4e-3), (float("inf"), 2e-3))
"""Parameters of the model up to which a row holds, and the ``scaling * lr`` in the middle of what works."""

FAR = 20.0
"""Factor from the middle at which a learning rate is worth a remark."""


def suitable_step(parameters: int) -> float:
    """The ``scaling * lr`` that suits a model with so many parameters, with Adam."""
    return next(step for largest, step in SUITABLE if parameters <= largest)


def remark_on(step: float, parameters: int) -> str | None:
    """What to say of a ``scaling * lr`` with Adam that lies far outside of what works; None if it does not."""
    middle = suitable_step(parameters)
    if middle / FAR <= step <= middle * FAR:
        return None
    return (
        f"This is far {'below' if step < middle else 'above'} what suits PaCA with Adam on a model of this size, about "
        f"{middle:g}: `paca-lightning fit --lr auto` searches one."
    )
