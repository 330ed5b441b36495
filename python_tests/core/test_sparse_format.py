"""How rk.save_sparse stores elements: every form comes back, blocks that do not fit are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builds import generator
from torch import Tensor

from runner import same_bits
from rvsm_kernels.model.sparse_format import BITMASK, CSR, DENSE, decode, encode

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# ---- the elements of a tensor ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize(
    ("size", "share", "form"),
    [
        (0, 0.0, DENSE),
        (1, 0.0, DENSE),
        (3000, 0.0, DENSE),
        (5000, 0.6, BITMASK),
        (5001, 0.99, CSR),
        (70_000, 0.9999, CSR),
        (70_000, 1.0, CSR),
    ],
)
def test_every_form_comes_back(size: int, share: float, form: str, dtype: torch.dtype) -> None:
    gen = generator(size)
    flat = (torch.randn(size, generator=gen).clamp(-9, 9) * 10).to(dtype)
    flat[flat == 0] = 1
    flat[torch.rand(size, generator=gen) < share] = 0
    stored = encode(flat)
    assert stored.form == form or dtype in (torch.int8, torch.float64)
    bytes_of = {}
    for forms in ((DENSE,), (BITMASK,), (CSR,), (DENSE, BITMASK, CSR)):
        stored = encode(flat, forms)
        assert stored.form in forms
        back = decode(stored.form, stored.row, stored.blocks, size, dtype)
        assert same_bits(back, flat) if flat.is_floating_point() else torch.equal(back, flat)
        extra = 96 * (len(stored.blocks) - 1)
        bytes_of[forms] = extra + sum(b.numel() * b.element_size() for b in stored.blocks.values())
    assert bytes_of[DENSE, BITMASK, CSR] == min(bytes_of.values())


def test_special_elements() -> None:
    flat = torch.zeros(2000)
    flat[::100] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45]).repeat(4)
    flat[1::2] = -0.0
    for form in (BITMASK, CSR):
        stored = encode(flat, [form])
        assert len(stored.blocks["values"]) == 20
        back = decode(form, stored.row, stored.blocks, 2000, torch.float32)
        assert same_bits(back[::100], flat[::100])
        assert same_bits(back[1::2], torch.zeros(1000))  # zeros of either sign come back as +0
    assert same_bits(decode(DENSE, 0, encode(flat, [DENSE]).blocks, 2000, torch.float32), flat)


def _put(at: int, value: Callable[[Tensor], int]) -> Callable[[Tensor], None]:
    """A change of one element."""

    def change(t: Tensor) -> None:
        t[at] = value(t)

    return change


def _with(blocks: dict[str, Tensor], name: str, change: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    changed = {key: block.clone() for key, block in blocks.items()}
    wide = changed[name].long() if not changed[name].is_floating_point() else changed[name]
    found = change(wide)
    changed[name] = (wide if found is None else found).to(changed[name].dtype)
    return changed


WRONG: dict[str, tuple[str, str, Callable[[Tensor], Any]]] = {
    "a value too few": (CSR, "values", lambda t: t[1:]),
    "a column too many": (CSR, "columns", lambda t: torch.cat([t, t[:1]])),
    "columns out of order": (CSR, "columns", lambda t: t.flip(0)),
    "a column twice": (CSR, "columns", _put(1, lambda t: int(t[0]))),
    "beyond the end": (CSR, "columns", _put(-1, lambda t: 255)),
    "rows begin late": (CSR, "rows", _put(0, lambda t: 1)),
    "rows end early": (CSR, "rows", _put(-1, lambda t: 1)),
    "rows go back": (CSR, "rows", _put(1, lambda t: int(t[2]) + 1)),
    "a row too few": (CSR, "rows", lambda t: t[1:]),
    "a bit too many": (BITMASK, "mask", _put(0, lambda t: 255)),
    "a byte too few": (BITMASK, "mask", lambda t: t[1:]),
    "bits beyond the end": (BITMASK, "mask", _put(-1, lambda t: int(t[-1]) | 128)),
    "a value too many": (BITMASK, "values", lambda t: torch.cat([t, t[:1]])),
    "dense, a value too few": (DENSE, "values", lambda t: t[1:]),
}


@pytest.mark.parametrize(("form", "name", "change"), WRONG.values(), ids=WRONG)
def test_blocks_that_do_not_fit(form: str, name: str, change: Callable[[Tensor], Any]) -> None:
    """With a checksum that is right: bounds are looked at too."""
    flat = torch.zeros(1001)
    flat[5::17] = 1.5
    stored = encode(flat, [form])
    assert same_bits(decode(form, stored.row, stored.blocks, 1001, flat.dtype), flat)
    with pytest.raises(ValueError):  # noqa: PT011
        decode(form, stored.row, _with(stored.blocks, name, change), 1001, flat.dtype)
    missing = {key: block for key, block in stored.blocks.items() if key != name}
    with pytest.raises(ValueError, match=f"no {name} of"):
        decode(form, stored.row, missing, 1001, flat.dtype)


def test_other_forms_are_refused() -> None:
    for form, row in (("zip", 0), (CSR, 0), (CSR, 100)):
        with pytest.raises(ValueError, match="no form"):
            decode(form, row, {"values": torch.ones(1)}, 1, torch.float32)
