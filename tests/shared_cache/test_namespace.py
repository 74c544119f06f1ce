"""A namespace that misses one difference would hand an engine garbage to attend to."""

from dataclasses import fields, replace

import pytest

from shared_cache.namespace import BlockLayout, Namespace

LAYOUT = BlockLayout(
    num_layers=2, kv_factor=2, num_kv_heads=3, tokens_per_block=4, head_dim=5, dtype="bfloat16"
)
NAMESPACE = Namespace(model="m", revision="r", engine="torch", layout=LAYOUT)

OTHER_LAYOUTS = [replace(LAYOUT, dtype="float16")] + [
    replace(LAYOUT, **{field.name: getattr(LAYOUT, field.name) + 1})
    for field in fields(LAYOUT)
    if field.name != "dtype"
]
OTHERS = [replace(NAMESPACE, layout=layout) for layout in OTHER_LAYOUTS] + [
    replace(NAMESPACE, **{field.name: 7 if field.type is int else "other"})
    for field in fields(NAMESPACE)
    if field.name != "layout"
]


def test_every_field_changes_the_fingerprint() -> None:
    fingerprints = {namespace.fingerprint for namespace in (NAMESPACE, *OTHERS)}
    assert len(fingerprints) == 1 + len(OTHERS)


def test_the_fingerprint_is_fixed_for_this_format_version() -> None:
    assert NAMESPACE.fingerprint == "5f11147e704c94b95c479cf8cfb5253b"


@pytest.mark.parametrize("namespace", [NAMESPACE, *OTHERS])
def test_text_and_back(namespace: Namespace) -> None:
    assert Namespace.from_json(namespace.to_json()) == namespace


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"model": "m"}', '{"layout": 3}', '{"layout": {}}', "\x00"],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Namespace.from_json(text)


def test_block_bytes() -> None:
    assert LAYOUT.block_bytes == 2 * 2 * 3 * 4 * 5 * 2
    assert replace(LAYOUT, dtype="float8_e4m3fn").block_bytes == 2 * 2 * 3 * 4 * 5


def test_an_unknown_dtype_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match="known are float32"):
        replace(LAYOUT, dtype="int4")
