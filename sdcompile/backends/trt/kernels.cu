// What sampling does to latents between two calls of the denoiser: one thread for every value.
//
// Each step is rounded as numpy rounds it on the host (runtime/arrays.py): the intrinsics ending in _rn are never
// contracted into a fused multiply-add, so host and device agree bit for bit.
//
// scripts/compile_kernels.py makes kernels.ptx of this file; a test compiles it for the CPU as well.

#define MOST_TERMS 32

struct Terms {
    const float *arrays[MOST_TERMS];
    double values[MOST_TERMS];
    unsigned count;
};

extern "C" __global__ void scaled(const float *array, double factor, float *result, unsigned size)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size)
        result[i] = __double2float_rn(__dmul_rn((double)array[i], factor));
}

extern "C" __global__ void weighted(Terms terms, float *result, unsigned size)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size)
        return;
    double total = 0.0;
    for (unsigned k = 0; k < terms.count; ++k)
        total = __dadd_rn(total, __dmul_rn((double)terms.arrays[k][i], terms.values[k]));
    result[i] = __double2float_rn(total);
}

extern "C" __global__ void guided(
    const float *negative, const float *positive, float scale, float *result, unsigned size)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size)
        result[i] = __fadd_rn(negative[i], __fmul_rn(scale, __fsub_rn(positive[i], negative[i])));
}

// Adds to *count how many values are NaN or infinite: those whose exponent bits are all ones.
extern "C" __global__ void count_bad(const float *array, unsigned *count, unsigned size)
{
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size && (__float_as_uint(array[i]) & 0x7f800000u) == 0x7f800000u)
        atomicAdd(count, 1u);
}
