"""Which library carries an operation: wishes, errors, and what `pmvis doctor` is told."""

from __future__ import annotations

import pytest
import torch

from pmvis_core import doctor, ops
from pmvis_core.errors import ResourceError
from tests.ops_runs import needs_kernel, python

IMAGES = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
STATES = "from pmvis_core import ops\nprint({row.state.split()[0] for row in ops.status()})"


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend is 'cuda', expected one of"):
        ops.lab_similarity(IMAGES, backend="cuda")  # type: ignore[arg-type]


def test_a_wish_that_cannot_be_granted_is_an_error():
    with pytest.raises(ResourceError, match="cannot run as `jit` on `cpu`") as caught:
        ops.lab_similarity(IMAGES, backend="jit")
    assert caught.value.hint is not None
    assert "pmvis doctor" in caught.value.hint


@needs_kernel
def test_forcing_the_kernel_names_what_it_cannot_do():
    with pytest.raises(ResourceError, match="the window is too wide"):
        ops.lab_similarity(IMAGES, dilation=65, backend="compiled")
    assert ops.lab_similarity(IMAGES, dilation=65).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("value", ["off", "torch", "0", "FALSE"])
def test_the_environment_asks_for_the_twins(value: str):
    assert python(STATES, PMVIS_NATIVE=value) == "{'torch'}"


@pytest.mark.parametrize("value", ["", "auto", "on", "compiled", "jit"])
@needs_kernel
def test_the_environment_asks_for_kernels(value: str):
    # A GPU's kernels are another matter: hide it.
    printed = python(STATES, PMVIS_NATIVE=value, CUDA_VISIBLE_DEVICES="")
    assert printed == "{'compiled'}"


def test_compiled_means_compiled():
    script = (
        "import torch\nfrom pmvis_core import ops\n"
        "try:\n    ops.lab_similarity(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))\n"
        "except ops.library.ResourceError as error:\n    print(error)"
    )
    printed = python(script, PMVIS_NATIVE="compiled", PMVIS_CPU_ISA="base", PMVIS_LIB_DIR="/absent")
    assert printed == "" or "cannot run as `compiled` on `cpu`" in printed


def test_an_unknown_value_is_named():
    script = (
        "from pmvis_core.errors import UsageError\n"
        "try:\n    import pmvis_core.ops\nexcept UsageError as error:\n    print(error)"
    )
    printed = python(script, PMVIS_NATIVE="fast")
    assert printed == (
        "PMVIS_NATIVE is `fast`, expected `auto`, `compiled`, `jit`, `torch` or `off`"
    )


def test_the_doctor_tells():
    rows = {finding.name: finding for finding in doctor.examine() if finding.part == "native"}
    for row in ops.status():
        found = rows[row.name]
        assert (found.value, found.reason) == (row.state, row.reason)
        good = row.state.startswith(("compiled", "jit"))
        assert (found.state is doctor.State.GOOD) == good
