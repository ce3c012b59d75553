"""From a call of torch's Python API to nodes of the graph.

Every torch call that touches a proxy comes to ``dispatch``, and a function is looked up once to get a
rule (``rules``). Most are one ATen operator of the same name, whose overload the engine chooses by the
arguments (``operators``); functions written in Python run their body, whose inner calls come back
here; the irregular ones have modules of their own. What no rule can record is computed at once on real
values (``computing``).

========================  ===========================================================================
``mode``                  what catches the calls, and hands them to their rules
``rules``                 which function has which rule: the tables
``operators``             a call of one ATen operator: names of arguments, several results, ``out=``
``computing``             a call on real values, now; what it changes and shares goes back to the graph
``draws``                 random numbers, drawn at their line
``conversion``            ``to``, ``float`` and kin, ``torch.tensor`` of proxies
``selection``             indexing, ``where``, ``nonzero`` and kin, ``max`` and kin
``properties``            attributes and questions that sizes and dtypes answer
``transforms``            ``torch.func`` and compiled functions, which go around the calls above
========================  ===========================================================================
"""

from .computing import compute
from .mode import Mode, dispatch

__all__ = ["Mode", "compute", "dispatch"]
