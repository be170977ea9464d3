from __future__ import annotations

import pytest

from ddpm_deploy.errors import SpecError
from ddpm_deploy.precision import PrecisionRecord, read_precision


def test_a_graph_says_its_precision_or_is_float32() -> None:
    assert read_precision(None, source="g").precision == "fp32"
    said = PrecisionRecord(precision="bf16", groups={"bf16": "2 Conv"}, error=0.01)
    assert read_precision(said.to_json(), source="g") == said
    assert read_precision('{"precision": "fp16", "groups": {}}', source="g").error is None


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "[]",
        "{}",
        '{"precision": "int8"}',
        '{"precision": 16}',
        '{"precision": "fp16", "groups": []}',
        '{"precision": "fp16", "groups": {"fp16": 2}}',
        '{"precision": "fp16", "error": "small"}',
    ],
)
def test_what_is_damaged_is_refused_and_not_taken_for_float32(damaged: str) -> None:
    with pytest.raises(SpecError, match="g says that it is in mixed precision, but not how"):
        read_precision(damaged, source="g")
