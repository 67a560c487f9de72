"""How codes become bfloat16 numbers in registers: all that differs from one format of weights to the next.

The kernels read codes as 32-bit words and want pairs of bfloat16, which is what a register holds. A function per format
says which instructions make the pairs of a word, once: `on` is what carries the instructions out, `Instructions` as
machine code for a GPU or `Integers` as integer arithmetic, for the interpreter and for tests of every code there is.

A word of n codes gives n / 2 pairs; pair p has code p in its low half and code p + n / 2 in its high half, so that one
mask serves both. What a row's codes need beside themselves are bytes: zeros of int4, scales of nvfp4. They are turned
once for all of the words they belong to.

Exactness. Integers of eight bits are put into the mantissa of 128 or of 256 and come out by a subtraction. Those of
four are subnormal numbers as they lie, or nearly, and what makes normal numbers of them subtracts the zero too; they
are left too small by 2^7, since no bfloat16 number is large enough. Floats of eight or four bits are moved to where
bfloat16 has its exponent and mantissa; with the smaller bias of their own exponents they are then too small by 2^120 or
2^126, subnormal ones too, which one multiplication puts right. That of nvfp4 brings in the block's scale as well, 2
significant bits times 4. It is left too small by 2^9, or large scales would leave the range on the way. The sums take
`Codes.factor` back.

Patterns that e4m3 keeps for NaN are read as 480 and -480, the numbers they would be.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WORD = 32  # bits


@runtime_checkable
class Machine(Protocol):
    """32-bit registers with integers, a float32 number or two bfloat16 numbers; a constant is an `int`."""

    def masked(self, a: Any, mask: int) -> Any: ...
    def masked_or(self, a: Any, mask: int, c: int) -> Any: ...
    def xor_masked(self, a: Any, mask: int, c: int) -> Any: ...
    def left(self, a: Any, bits: int) -> Any: ...
    def right(self, a: Any, bits: int) -> Any: ...
    def add(self, a: Any, b: Any) -> Any: ...
    def times(self, a: Any, b: int) -> Any: ...
    def modulo(self, a: Any, b: int) -> Any: ...
    def bytes_of(self, a: Any, b: Any, selector: int) -> Any: ...
    def subtract_pairs(self, a: Any, b: Any) -> Any: ...
    def multiply_pairs(self, a: Any, b: Any) -> Any: ...
    def multiply_add_pairs(self, a: Any, b: Any, c: Any) -> Any: ...
    def subtract(self, a: Any, b: Any) -> Any: ...
    def rounded_pair(self, a: Any) -> Any: ...


# ---------------------------------------------------------------------------------------------------------------
# Formats


def int4_pairs(on: Machine, word: Any, bias: Any) -> list[Any]:
    """2^-7 (8 + code) plus `bias`, 2^-7 of minus 8 and the zero.

    Where a code is and nothing else, the bits of a bfloat16 number are 16 or 1 times the code in units of 2^-133: one
    shift serves four codes.
    """
    pairs = []
    for two in (word, on.right(word, 8)):
        for nibble, exponent in ((0x000F000F, 126), (0x00F000F0, 122)):
            unsigned = on.xor_masked(two, nibble, 0x88888888)  # the signs of all codes: one constant for a register
            pairs.append(on.multiply_add_pairs(unsigned, _power(exponent), bias))
    return pairs


def int4_bias(on: Machine, zeros: Sequence[Any]) -> list[Any]:
    """Of the rows of the zeros: -2^-7 (8 + zero) in both halves, as 1 less 2^-7 (128 + 8 + zero)."""
    shifted = [on.add(on.times(zero, 0x00010001), 0x43084308) for zero in zeros]
    return [on.multiply_add_pairs(number, _negative(_power(-7)), _power(0)) for number in shifted]


def int8_pairs(on: Machine, word: Any, _: Any) -> list[Any]:
    """128 and the lower seven bits, less 128 or, for a code below 0, 256."""
    pairs = []
    for two in (word, on.right(word, 8)):
        low, high = (on.masked_or(two, bits, 0x43004300) for bits in (0x007F007F, 0x00800080))
        pairs.append(on.subtract_pairs(low, high))
    return pairs


def fp8_pairs(on: Machine, word: Any, _: Any) -> list[Any]:
    return [_e4m3(on, on.bytes_of(word, word, selector)) for selector in (0xA280, 0xB391)]


def _e4m3(on: Machine, extended: Any) -> Any:
    """Of two codes as signed integers of 16 bits: their sign is bit 15 after a shift, too."""
    return on.multiply_pairs(on.masked(on.left(extended, 4), 0x87F087F0), _power(120))


def nvfp4_pairs(on: Machine, word: Any, scale: Any) -> list[Any]:
    """A multiplication by two powers of 2 moves the sign to bit 15 and the rest to bits 6 to 8 at once."""
    pairs = []
    for two in (word, on.right(word, 8)):
        for nibble, powers in ((0x000F000F, 1 << 12 | 1 << 6), (0x00F000F0, 1 << 8 | 1 << 2)):
            spread = on.times(on.masked(two, nibble), powers)
            pairs.append(on.multiply_pairs(on.masked(spread, 0x81C081C0), scale))
    return pairs


def nvfp4_scales(on: Machine, scales: Sequence[Any]) -> list[Any]:
    """Of a block in two rows, to 2^117 scale in both halves of a register for each row."""
    both = _e4m3(on, on.bytes_of(scales[0], scales[1], 0xC480))
    both = on.multiply_pairs(both, _power(117))
    return [on.bytes_of(both, both, selector) for selector in (0x1010, 0x3232)]


def split_scale(on: Machine, scale: Any, dtype: Any) -> tuple[Any, Any]:
    """A float32 scale as a sum of bfloat16 numbers, each in both halves; one of bfloat16 has no second, None."""
    high = on.rounded_pair(scale)
    if dtype == jnp.bfloat16:
        return high, None
    return high, on.rounded_pair(on.subtract(scale, on.left(high, 16)))


def scaled(on: Machine, pair: Any, high: Any, low: Any) -> Any:
    """`pair * (high + low)`, rounded; the small product is rounded first, which the result hardly ever shows."""
    if low is None:
        return on.multiply_pairs(pair, high)
    return on.multiply_add_pairs(pair, high, on.multiply_pairs(pair, low))


def _power(exponent: int) -> int:
    """2^exponent in both halves."""
    return (127 + exponent << 7) * 0x00010001


def _negative(pair: int) -> int:
    return pair ^ 0x80008000


INT4_BIAS = _negative(_power(-4))  # where zeros are 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codes:
    """A format of codes.

    Attributes:
      bits: of a code.
      dtype: of the array that holds them.
      scales: dtypes of scales.
      pairs: `(on, word, side)`, the registers of a word.
      sides: `(on, bytes)` of the same bytes of two rows, eight apart, what `pairs` takes for each; None: none exist.
      side: what `pairs` takes where there are none.
      block: inputs of which each has its scale in a register; None: scales meet sums.
      factor: of the sums.
    """

    bits: int
    dtype: Any
    scales: tuple[str, ...] = ("float32", "bfloat16", "float16")
    pairs: Callable[[Machine, Any, Any], list[Any]]
    sides: Callable[[Machine, Sequence[Any]], list[Any]] | None = None
    side: int | None = None
    block: int | None = None
    factor: float = 1.0

    @property
    def per_word(self) -> int:
        return WORD // self.bits

    def bytes(self, inputs: int) -> int:
        """Elements of `dtype` that hold the codes of some inputs."""
        return inputs * self.bits // 8


CODES = {
    "int4": Codes(bits=4, dtype=jnp.uint8, pairs=int4_pairs, sides=int4_bias, side=INT4_BIAS, factor=2.0**7),
    "int8": Codes(bits=8, dtype=jnp.int8, pairs=int8_pairs),
    "fp8": Codes(bits=8, dtype=jnp.float8_e4m3fn, pairs=fp8_pairs),
    "nvfp4": Codes(
        bits=4,
        dtype=jnp.uint8,
        scales=("float8_e4m3fn",),
        pairs=nvfp4_pairs,
        sides=nvfp4_scales,
        block=16,
        factor=2.0**9,
    ),
}


# ---------------------------------------------------------------------------------------------------------------
# Machines


_A, _B, _C = 0xF0, 0xCC, 0xAA  # truth tables of the operands of a LOP3


class Instructions:
    """Emits the instructions. Logic and permutation as one each, which the compiler would not always find."""

    def masked(self, a: Any, mask: int) -> ir.Value:
        return self._logic(_A & _B, a, mask, 0)

    def masked_or(self, a: Any, mask: int, c: int) -> ir.Value:
        return self._logic(_A & _B | _C, a, mask, c)

    def xor_masked(self, a: Any, mask: int, c: int) -> ir.Value:
        return self._logic((_A ^ _C) & _B, a, mask, c)

    def left(self, a: Any, bits: int) -> ir.Value:
        return arith.shli(a, _constant(bits))

    def right(self, a: Any, bits: int) -> ir.Value:
        return arith.shrui(a, _constant(bits))

    def add(self, a: Any, b: Any) -> ir.Value:
        return arith.addi(_value(a), _value(b))

    def times(self, a: Any, b: int) -> ir.Value:
        return arith.muli(a, _constant(b))

    def modulo(self, a: Any, b: int) -> ir.Value:
        return arith.remui(a, _constant(b))

    def bytes_of(self, a: Any, b: Any, selector: int) -> ir.Value:
        return self._asm("prmt.b32 $0, $1, $2, $3;", a, b, selector)

    def subtract_pairs(self, a: Any, b: Any) -> ir.Value:
        return self._asm("sub.rn.bf16x2 $0, $1, $2;", a, b)

    def multiply_pairs(self, a: Any, b: Any) -> ir.Value:
        return self._asm("mul.rn.bf16x2 $0, $1, $2;", a, b)

    def multiply_add_pairs(self, a: Any, b: Any, c: Any) -> ir.Value:
        return self._asm("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c)

    def subtract(self, a: Any, b: Any) -> ir.Value:
        f32 = ir.F32Type.get()
        difference = arith.subf(arith.bitcast(f32, _value(a)), arith.bitcast(f32, _value(b)))
        return arith.bitcast(ir.IntegerType.get_signless(32), difference)

    def rounded_pair(self, a: Any) -> ir.Value:
        number = arith.bitcast(ir.F32Type.get(), _value(a))
        return llvm.inline_asm(
            ir.IntegerType.get_signless(32), [number, number], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f"
        )

    def _logic(self, table: int, a: Any, b: Any, c: Any) -> ir.Value:
        return self._asm(f"lop3.b32 $0, $1, $2, $3, {table};", a, b, c)

    def _asm(self, ptx: str, *operands: Any) -> ir.Value:
        i32 = ir.IntegerType.get_signless(32)
        return llvm.inline_asm(i32, [_value(x) for x in operands], ptx, ",".join(["=r"] + ["r"] * len(operands)))


def _constant(value: int) -> ir.Value:
    return mgpu.c(value - (value >> 31 << 32), ir.IntegerType.get_signless(32))


def _value(x: Any) -> ir.Value:
    return _constant(x) if isinstance(x, int) else x


class Integers:
    """The same on arrays of uint32; as the instructions are defined, but for results that are subnormal or no number.

    Numbers are taken apart by hand, since a CPU may take subnormal operands for 0. The sum of `multiply_add_pairs` is
    rounded to float32 first.
    """

    def masked(self, a: Any, mask: int) -> Any:
        return a & jnp.uint32(mask)

    def masked_or(self, a: Any, mask: int, c: int) -> Any:
        return a & jnp.uint32(mask) | jnp.uint32(c)

    def xor_masked(self, a: Any, mask: int, c: int) -> Any:
        return (a ^ jnp.uint32(c)) & jnp.uint32(mask)

    def left(self, a: Any, bits: int) -> Any:
        return a << bits

    def right(self, a: Any, bits: int) -> Any:
        return a >> bits

    def add(self, a: Any, b: Any) -> Any:
        return jnp.asarray(a, jnp.uint32) + jnp.asarray(b, jnp.uint32)

    def times(self, a: Any, b: int) -> Any:
        return a * jnp.uint32(b)

    def modulo(self, a: Any, b: int) -> Any:
        return a % jnp.uint32(b)

    def bytes_of(self, a: Any, b: Any, selector: int) -> Any:
        result = jnp.zeros_like(a | b)
        for place in range(4):
            choice = selector >> 4 * place & 15
            byte = ((b if choice & 4 else a) >> 8 * (choice & 3)) & 0xFF
            if choice & 8:
                byte = (byte >> 7) * jnp.uint32(0xFF)
            result |= byte << 8 * place
        return result

    def subtract_pairs(self, a: Any, b: Any) -> Any:
        return self._by_halves(lambda x, y: _number(x) - _number(y), a, b)

    def multiply_pairs(self, a: Any, b: Any) -> Any:
        return self._by_halves(_product, a, b)

    def multiply_add_pairs(self, a: Any, b: Any, c: Any) -> Any:
        return self._by_halves(lambda x, y, z: _product(x, y) + _number(z), a, b, c)

    def subtract(self, a: Any, b: Any) -> Any:
        a, b = (jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.uint32), jnp.float32) for x in (a, b))
        return jax.lax.bitcast_convert_type(a - b, jnp.uint32)

    def rounded_pair(self, a: Any) -> Any:
        """By hand, to the nearest, of two the even: XLA would leave a rounding out whose result it widens again."""
        return (a + 0x7FFF + (a >> 16 & 1) >> 16) * jnp.uint32(0x00010001)

    def _by_halves(self, operation: Callable[..., Any], *pairs: Any) -> Any:
        pairs = jnp.broadcast_arrays(*(jnp.asarray(pair, jnp.uint32) for pair in pairs))
        result = operation(*(jnp.stack([pair & 0xFFFF, pair >> 16]) for pair in pairs)).astype(jnp.bfloat16)
        low, high = jax.lax.bitcast_convert_type(result, jnp.uint16).astype(jnp.uint32)
        return low | high << 16


def _parts(bits: Any) -> tuple[Any, Any, Any]:
    """Sign, mantissa as an integer and exponent of a bfloat16 number: sign * mantissa * 2^exponent."""
    field = (bits >> 7 & 0xFF).astype(jnp.int32)
    mantissa = (bits & 0x7F).astype(jnp.float32) + jnp.where(field > 0, 128.0, 0.0)
    return jnp.where(bits >> 15, -1.0, 1.0), mantissa, jnp.maximum(field, 1) - 134


def _number(bits: Any) -> Any:
    sign, mantissa, exponent = _parts(bits)
    return sign * mantissa * _two_to(exponent)


def _product(x: Any, y: Any) -> Any:
    (sign, mantissa, exponent), (sign_y, mantissa_y, exponent_y) = _parts(x), _parts(y)
    half = (exponent + exponent_y) // 2  # the whole may be no exponent of float32
    return sign * sign_y * (mantissa * mantissa_y) * _two_to(half) * _two_to(exponent + exponent_y - half)


def _two_to(exponent: Any) -> Any:
    """float32; within the range of its normal numbers."""
    bits = (jnp.clip(exponent, -126, 127) + 127).astype(jnp.uint32) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
