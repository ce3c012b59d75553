"""Where a model computes: ``module.device``, and ``module.to(device)`` as of torch's modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from . import positions
from .errors import InputError
from .positions import here

if TYPE_CHECKING:
    from .native import Native


class Placed:
    """What modules know of their device. A model stays on the one it was opened for."""

    _native: Native

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._native.device

    @property
    def devices(self) -> set[torch.device]:
        """The devices that the parameters are on: one."""
        return {self.device}

    def to(self, device: torch.device | str | int) -> Self:
        """The module itself, where it is on that device already.

        Raises:
            InputError: it is on another one.
        """
        wanted, own = torch.device(device), self.device
        if wanted.type != own.type or (wanted.index or 0) != (own.index or 0):
            raise InputError(
                f"the model is on {own}, and does not move to {wanted}",
                hint=f'Open it there: LanguageModel(..., device_map="{wanted}").',
                **positions.fields(here()),
            )
        return self

    def cpu(self, *args: Any, **kwargs: Any) -> Self:
        """``to("cpu")``."""
        return self.to("cpu")

    def cuda(self, *args: Any, **kwargs: Any) -> Self:
        """``to("cuda")``."""
        return self.to("cuda")
