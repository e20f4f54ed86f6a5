"""torch's CPU normal generator, in numpy: the same seed gives the same noise as diffusers.

It refuses to know what the noise is for. Measured bit for bit equal to torch 2.13 on x86-64
with AVX2. torch builds without AVX2 kernels (and its AVX-512 and ARM ones) differ from AVX2
builds in the last bits themselves.

Sources: Matsumoto and Nishimura's MT19937; ATen/native/cpu/DistributionTemplates.h
(`normal_fill_AVX2`, `normal_kernel`); ATen/native/cpu/avx_mathfun.h, which is Cephes' logf and
sincosf, compiled with multiplications and additions contracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_BLOCK = 16
_F = np.float32

_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_QUARTER_PI = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)


class Generator:
    """`torch.Generator("cpu").manual_seed(seed)`: successive `randn` calls equal successive torch.randn calls.

    `seed` is any int; as in torch, only its low 32 bits matter.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._bits = np.random.MT19937()
        # RandomState seeds as Matsumoto's init_genrand does, which is what torch uses; MT19937(seed) does not.
        self._bits.state = np.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)  # type: ignore[assignment]
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> Floats:
        """Standard normal float32 values of `shape`, drawn as `torch.randn(shape, generator=g)` draws them."""
        size = math.prod(shape)
        values = self._many(size) if size >= _BLOCK else self._few(size)
        return values.reshape(tuple(shape))

    def _uniform(self, size: int) -> Floats:
        words = self._bits.random_raw(size)
        return (words & np.uint64(0xFFFFFF)).astype(_F) * _F(2.0**-24)

    def _many(self, size: int) -> Floats:
        """Box-Muller on blocks of 16 uniforms; a tail is made by drawing the last 16 values anew."""
        uniforms = self._uniform(size)
        whole = size // _BLOCK * _BLOCK
        if whole == size:
            return _box_muller(uniforms)
        values = np.empty(size, _F)
        values[:whole] = _box_muller(uniforms[:whole])
        values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values

    def _few(self, size: int) -> Floats:
        """Below 16 values torch draws one by one in double precision and keeps the second of each pair."""
        values = np.empty(size, _F)
        for index in range(size):
            if self._spare is not None:
                values[index], self._spare = self._spare, None
                continue
            first, second = self._double(), self._double()
            radius, angle = math.sqrt(-2.0 * math.log1p(-second)), 2.0 * math.pi * first
            values[index], self._spare = radius * math.cos(angle), radius * math.sin(angle)
        return values

    def _double(self) -> float:
        high, low = (int(word) for word in self._bits.random_raw(2))
        return float((high << 32 | low) & ((1 << 53) - 1)) * 2.0**-53


def randn(shape: Sequence[int], seed: int) -> Floats:
    """Noise of `shape` from a fresh generator: `torch.randn(shape, generator=Generator().manual_seed(seed))`."""
    return Generator(seed).randn(shape)


def noise_source(seeds: Sequence[int], shape: tuple[int, ...]) -> Callable[[int], Floats]:
    """Successive unit noise for so many images: all from one generator, or each from its own."""
    generators = [Generator(seed) for seed in seeds]
    if len(generators) == 1:
        return lambda images: generators[0].randn((images, *shape[1:]))
    return lambda images: np.concatenate([generator.randn((1, *shape[1:])) for generator in generators])


def _box_muller(uniforms: Floats) -> Floats:
    """Uniforms in [0, 1), 16 per block (8 radii, 8 angles) -> normals in torch's order (8 cosines, 8 sines)."""
    pairs = uniforms.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(_F(-2.0) * _log(_F(1.0) - pairs[:, 0]))
    sine, cosine = _sincos(_F(2.0 * math.pi) * pairs[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fma(a: Floats, b: Floats | float, c: Floats | float) -> Floats:
    """a * b + c rounded once: the product of two float32 is exact in float64."""
    product = a.astype(np.float64) * np.asarray(b, _F).astype(np.float64)
    return (product + np.asarray(c, _F).astype(np.float64)).astype(_F)


def _polynomial(x: Floats, coefficients: Sequence[float]) -> Floats:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, coefficient)
    return y


def _log(x: Floats) -> Floats:
    """Natural logarithm of normal positive floats, with the rounding of avx_mathfun's log256_ps."""
    bits = x.view(np.int32)
    exponent = ((bits >> 23) - 126).astype(_F)
    mantissa = ((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)).view(_F)
    small = mantissa < _F(math.sqrt(0.5))
    exponent = exponent - small.astype(_F)
    x = (mantissa - _F(1.0)) + np.where(small, mantissa, _F(0.0))
    square = x * x
    y = _polynomial(x, _LOG) * x
    y = _fma(y, square, exponent * _F(_LN2_LOW))
    y = _fma(-square, 0.5, y)
    return _fma(exponent, _LN2_HIGH, x + y)


def _sincos(x: Floats) -> tuple[Floats, Floats]:
    """Sine and cosine of x >= 0, with the rounding of avx_mathfun's sincos256_ps."""
    octant = (x * _F(4.0 / math.pi)).astype(np.int32)
    octant = (octant + 1) & ~1
    turns = octant.astype(_F)
    for part in _QUARTER_PI:
        x = _fma(turns, part, x)
    square = x * x
    near_cosine = _fma(_polynomial(square, _COS) * square, square, -(square * _F(0.5))) + _F(1.0)
    near_sine = _fma(_polynomial(square, _SIN) * square, x, x)
    straight = (octant & 2) == 0
    sine = np.where(straight, near_sine, near_cosine)
    cosine = np.where(straight, near_cosine, near_sine)
    return np.where(octant & 4, -sine, sine), np.where((octant - 2) & 4, cosine, -cosine)
