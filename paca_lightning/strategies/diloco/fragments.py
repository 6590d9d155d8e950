"""Parameters in parts that are exchanged in turns (Streaming DiLoCo, arXiv 2501.18512)."""

from torch import nn

from paca_lightning.core.errors import PaCAError


def split(parameters: list[nn.Parameter], count: int) -> list[list[nn.Parameter]]:
    """Parameters in a number of parts of about equal size, in order, none empty.

    Raises:
        PaCAError: If there are fewer parameters than parts.
    """
    if len(parameters) < count:
        raise PaCAError(f"fragments={count}, but only {len(parameters)} parameters are trained.")
    total, parts, seen = sum(p.numel() for p in parameters), [list[nn.Parameter]()], 0
    for index, parameter in enumerate(parameters):
        missing = count - len(parts)
        if parts[-1] and missing and (seen * count >= total * len(parts) or len(parameters) - index == missing):
            parts.append([])
        parts[-1].append(parameter)
        seen += parameter.numel()
    return parts
