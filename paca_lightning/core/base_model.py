"""How a task reaches the model before training, without knowing who trains it."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager


class KeepsBaseModel(ABC):
    """A callback that trains beside frozen weights, so that the model before training is there at any time.

    Attributes:
        adapter: The trained adapter that the run starts from, if it starts from one.
    """

    adapter: str | None

    @abstractmethod
    def disable(self) -> AbstractContextManager[None]:
        """Inside this context the model of the run is the base model.

        Raises:
            PaCAError: If there is no model yet, or the method cannot give its base back.
        """
