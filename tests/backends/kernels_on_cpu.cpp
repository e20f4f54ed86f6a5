// kernels.cu for the CPU: every thread of every block, one after another.
//
// A launch is told as CUDA's driver is told: by name, sizes, and an array of pointers to the parameters.

#include <cstring>
#include <functional>
#include <string>
#include <utility>

#define __global__

static struct { unsigned x; } blockIdx, blockDim, threadIdx;

static double __dmul_rn(double a, double b) { return a * b; }
static double __dadd_rn(double a, double b) { return a + b; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __double2float_rn(double a) { return (float)a; }
static void atomicAdd(unsigned *place, unsigned value) { *place += value; }

static unsigned __float_as_uint(float value)
{
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

#include "kernels.cu"

using Launch = std::function<void()>;

template <class... Types, std::size_t... Places>
static Launch bound(void (*kernel)(Types...), void **parameters, std::index_sequence<Places...>)
{
    return [kernel, ... values = *static_cast<Types *>(parameters[Places])] { kernel(values...); };
}

template <class... Types>
static Launch bound(void (*kernel)(Types...), void **parameters)
{
    return bound(kernel, parameters, std::index_sequence_for<Types...>());
}

static Launch named(const std::string &name, void **parameters)
{
    if (name == "scaled") return bound(scaled, parameters);
    if (name == "weighted") return bound(weighted, parameters);
    if (name == "guided") return bound(guided, parameters);
    if (name == "count_bad") return bound(count_bad, parameters);
    return {};
}

extern "C" void *prepare(const char *name, unsigned blocks, unsigned threads, void **parameters)
{
    Launch thread = named(name, parameters);
    if (!thread) return nullptr;
    return new Launch([=] {
        blockDim.x = threads;
        for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) thread();
    });
}

extern "C" void perform(void *launch)
{
    (*static_cast<Launch *>(launch))();
    delete static_cast<Launch *>(launch);
}
