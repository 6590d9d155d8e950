"""The learning rates that a search tries where the user gives none."""

from paca_lightning.conversion.learning_rates import suitable_step
from paca_lightning.tools.compare.methods import AsConfigured, Method, PaCAMethod
from paca_lightning.tools.compare.own_methods import InsertedMethod
from paca_lightning.tools.compare.peft_methods import PEFTMethod
from paca_lightning.tools.compare.search import Space, between
from paca_lightning.tools.compare.task import PACA, Task, short_name

REACH = 8.0
"""Factor from the middle of a space to each of its ends."""

LORA, FULL, FEW_PARAMETERS = 0.4, 0.1, 4.0
"""Middles in units of PaCA's: of methods with a rank (measured for LoRA), of full fine-tuning, and of prompts and
scales (rough guesses: a search says if its best lies at an edge)."""


def default_space(method: Method, task: Task) -> Space:
    """The space to search for a method on a task's model."""
    step = suitable_step(sum(parameter.numel() for parameter in task.model.parameters()))
    middle = step * _factor(method, task)
    return Space(between(middle, middle / REACH, 1), between(middle, middle * REACH, 1))


def _factor(method: Method, task: Task) -> float:
    callbacks = {short_name(entry) for entry in task.settings["trainer"]["callbacks"]}
    if isinstance(method, PaCAMethod) or (isinstance(method, AsConfigured) and PACA in callbacks):
        config = method.config(task.paca) if isinstance(method, PaCAMethod) else task.paca
        return config.r / config.alpha_of(None, config.r)
    if isinstance(method, InsertedMethod):
        return LORA
    if isinstance(method, PEFTMethod):
        return LORA if method.size_field == "r" else FEW_PARAMETERS
    return LORA if isinstance(method, AsConfigured) and "PEFTStrategy" in callbacks else FULL
