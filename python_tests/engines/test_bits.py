"""What every engine computes, bit for bit, is what was recorded: a change of the code that is to keep the bits does."""

from __future__ import annotations

import pytest
import torch
from builds import MARKED_ENGINES, need
from tools import bits


@pytest.mark.parametrize("engine", MARKED_ENGINES)
def test_bits_are_those_that_were_recorded(engine: str, on_cpu: None) -> None:
    need("native" if engine == "interpreted" else engine)
    if (reason := bits.why_not_comparable(engine)) is not None:
        pytest.skip(reason)
    different = bits.differing(engine)
    assert not different, f"{len(different)} cases give other bits:\n" + "\n".join(different)


def test_record_covers_every_engine_option_and_layout() -> None:
    words = {engine: {word for case in bits.draw(engine) for word in case.key.split("/")} for engine in bits.ENGINES}
    named = {*bits.DTYPES, *bits.METHODS, *map(str, bits.PENALTIES), *bits.GROUP_DIMS, "coupled", "decoupled", "decay"}
    named |= {"none", "plain", "dampened", "nesterov", "maximize", "group_scale", "group_lasso", "rates", "summed"}
    named |= {"scale3", "scale8", "channels_last", "transposed", "unit_norm"}
    recorded = bits.load()[0]["cases"]
    for engine in bits.ENGINES:
        assert named <= words[engine], engine
        assert {case.key for case in bits.draw(engine)} <= set(recorded), engine


def test_another_number_in_a_summed_case_is_noticed() -> None:
    """The bound that these cases are compared within is one of rounding: another weight decay is far outside of it."""
    record, numbers = bits.load()
    cases = [case for case in bits.draw("reference") if case.summed and case.dtype in ("float32", "float64")]
    assert len(cases) > 20
    for case in cases:
        first, last = record["cases"][case.key]
        case.options["weight_decay"] *= 1.01
        with bits.serving("reference") as name:
            result = bits.run(case, name)
        assert bool(((result.numbers - numbers[case.dtype][first:last]).abs() > result.bound).any()), case.key


def test_transposed_tensors_have_gaps() -> None:
    values = torch.arange(24.0).reshape(2, 3, 4)
    placed = bits.place(values, "transposed")
    assert torch.equal(placed, values)
    assert placed.stride() == (1, 5, 15) and placed.storage_offset() == 1
