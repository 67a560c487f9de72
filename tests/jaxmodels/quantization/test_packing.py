"""Words of eight codes: goldens, every layout back and forth, and what cannot be packed."""

import numpy as np
import pytest

from jaxmodels.quantization.packing import pack_int4, unpack_int4

CODES = np.array([[(3 * k + 5 * n) % 16 for n in range(16)] for k in range(16)])


def test_goldens():
    awq, gptq = pack_int4(CODES, "awq").view(np.uint32), pack_int4(CODES, "gptq").view(np.uint32)
    assert [hex(word) for word in awq[0]] == ["0x39f5e4a0", "0xb17d6c28"]
    assert [hex(word) for word in awq[1]] == ["0x6c2817d3", "0xe4a09f5b"]
    assert [hex(word) for word in gptq[0, :3]] == ["0x52fc9630", "0xa741eb85", "0xfc9630da"]
    assert [hex(word) for word in gptq[1, :3]] == ["0xda741eb8", "0x2fc9630d", "0x741eb852"]


@pytest.mark.parametrize("layout", ["awq", "gptq", "sequential"])
@pytest.mark.parametrize("rows, columns", [(8, 8), (16, 40), (64, 24)])
def test_back_and_forth(layout, rows, columns):
    codes = np.random.default_rng(0).integers(0, 16, (rows, columns))
    words = pack_int4(codes, layout)
    assert words.dtype == np.int32 and words.shape == (
        (rows // 8, columns) if layout == "gptq" else (rows, columns // 8)
    )
    np.testing.assert_array_equal(unpack_int4(words, layout), codes)
    turned = np.asfortranarray(words)
    np.testing.assert_array_equal(unpack_int4(turned, layout), codes)


def test_what_cannot_be_packed(plain_calls):
    with pytest.raises(ValueError, match="eight codes go into a word; got an axis of 12"):
        pack_int4(np.zeros((8, 12), int), "awq")
    with pytest.raises(ValueError, match=r"codes must lie in 0\.\.15; got -1\.\.3"):
        pack_int4(np.tile([-1, 3], (8, 4)), "sequential")
    with pytest.raises(ValueError, match=r"layout must be one of .*'marlin'"):
        unpack_int4(np.zeros((8, 8), np.int32), "marlin")
