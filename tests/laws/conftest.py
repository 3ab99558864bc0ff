import pytest


@pytest.fixture(autouse=True)
def _row(request, record_property):
    """Tell the certificate which transform a test was for."""
    params = getattr(getattr(request.node, "callspec", None), "params", {})
    if "case" in params:
        record_property("row", str(params["case"]))
