"""A pytest plugin (``-p other_kernels``): tests the C++ kernels in the file that $CSMASK_CPU_MODULE names.

For ``make sanitize``. A path does not do it: an editable install's import finder comes before all of them.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import csmask_kernels
import torch  # noqa: F401 - before the kernels, which then run on the threads that it brings

FILE = os.environ["CSMASK_CPU_MODULE"]
_spec = importlib.util.spec_from_file_location("csmask_kernels._cpu", FILE)
csmask_kernels._cpu = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(csmask_kernels._cpu)


def pytest_report_header():
    from csmask import _cpp  # not above: csmask is imported where its tests import it

    used = getattr(_cpp.kernels, "__file__", None)
    if used != FILE:
        raise RuntimeError(f"expected the C++ kernels of {FILE}, csmask runs {used or _cpp.kernels_missing}")
    return f"C++ kernels: {used}"
