"""``model.scan(prompt)``: shapes and dtypes of everything in a block, without weights and without running it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from . import positions, shapes
from .errors import InputError, OpError
from .native import become
from .positions import here
from .proxy import Proxy
from .recorder import Recorder, proxies


class ScanRecorder(Recorder):
    """Records a block that is never run: what was saved becomes a tensor on the meta device."""

    def force(self, wanted: Iterable[Proxy]) -> NoReturn:
        """Refuses: there are no values."""
        raise InputError(
            "this line needs a value, and scan() knows only shapes and dtypes",
            hint="Use model.trace(...) for values.",
            **positions.fields(here()),
        )

    def set_index(self, target: Proxy, index: Any, value: Any) -> None:
        """Records ``target[index] = value``, and makes sure that the sizes fit."""
        super().set_index(target, index, value)
        for node in shapes.values((target, index, value)):
            shapes.infer(self, node)
        place = len(self.nodes) - 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            written = torch.empty_like(self.metas[target._id])
            try:
                written[shapes.on_meta(self, index)] = shapes.on_meta(self, value)
            except NotImplementedError:
                pass  # how much is written depends on values
            except (IndexError, RuntimeError, ValueError) as error:
                raise OpError(
                    str(error), op="setitem", invoke=self.nodes[place][1], **positions.fields(self.nodes[place][2])
                ) from error

    def unknown(self, id: int, error: Exception) -> NoReturn:
        """Tells why the shape of a node is not known: the operation is wrong, or only a run tells it."""
        node = self.nodes[id]
        name = str(node[4]) if isinstance(node[4], str) else None
        unknown = isinstance(error, NotImplementedError)
        raise OpError(
            "the sizes of what this line gives are known once it is computed, and scan() computes nothing"
            if unknown
            else str(error),
            op=name,
            invoke=node[1],
            **positions.fields(node[2]),
        ) from error

    def finish(self) -> None:
        """Infers every shape, so that a wrong operation is found, and hands out the saved ones."""
        self.conclude()
        for node, made in enumerate(self.made):
            if made is not None:
                shapes.infer(self, node)
        saved = list({id(p): p for p in proxies(self.saved())}.values())
        become(saved, [self.meta(p) for p in saved])
        self.close("it was not saved")
        for act in self.when_done:
            act()
