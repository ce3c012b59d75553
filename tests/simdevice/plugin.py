"""Has tests run on another device than the CPU: ``python -m pytest -p simdevice.plugin``, with ``tests`` in PYTHONPATH.

``NNSIGHT_GO_TEST_DEVICE=cuda`` has them run on a GPU, by default it is the device that is none. What tests make lies
there, and so do the models.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils._device import DeviceContext

import simdevice

DEVICE = os.environ.get("NNSIGHT_GO_TEST_DEVICE", simdevice.NAME)
COUNTERS = simdevice.begin() if DEVICE == simdevice.NAME else None

from nnsight_go import LanguageModel  # noqa: E402  (the accelerator has to be there first)
from on_a_server import listed, names  # noqa: E402

# Tests that see the CPU, by the reason.
OTHERS = {
    "numpy wants tensors of the CPU": """
        test_values.test_numpy_arrays_and_numbers_of_numpy
        test_values.test_values[asarray]
        test_values.test_values[numpy function]
        test_values.test_values[numpy]
        test_values.test_what_was_handed_over_is_a_value_of_its_own
    """,
    "it compares with a tensor of the CPU": """
        test_cache.test_options
        test_edits.test_an_edit_is_read_as_it_was_written
        test_edits.test_sizes_that_are_the_models_are_known
        test_edits.test_the_invoke_sees_the_edited_value
        test_graphs.test_another_process_runs_it
    """,
    "transformers does not open a model there without accelerate": """
        test_generate.test_real_models_write_what_transformers_writes
        test_generate.test_real_names
    """,
    "torch unpickles no tensors of a device of ours": "test_saving.test_saved_values_are_ordinary_tensors",
}
_others = listed(OTHERS)


def _prepare() -> None:
    """Puts there what nobody has put elsewhere."""
    torch.set_default_device(DEVICE)
    LanguageModel.__init__.__kwdefaults__.update(device_map=DEVICE)
    stack = torch.overrides._get_current_function_mode_stack
    torch.overrides._get_current_function_mode_stack = lambda: [  # what traces leave behind, tests look for
        mode for mode in stack() if not isinstance(mode, DeviceContext)
    ]


_prepare()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Leaves out what sees the CPU, what runs on a server, and models that transformers opens."""
    items[:] = [
        item
        for item in items
        if "loopback" not in item.name and "hosted" not in item.name and _others.keys().isdisjoint(names(item))
    ]
