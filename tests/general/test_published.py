"""The cores of published linear attentions, one call each, against recorded outputs and gradients."""

from __future__ import annotations

import pytest
from implementations import every_implementation
from published import CASES, errors


@every_implementation
@pytest.mark.parametrize(("method", "case"), CASES)
def test_core_as_published(operators, method, case):
    for key, error in errors(operators, method, case).items():
        assert error <= 1e-10, f"{key}: {error:.1e}"
