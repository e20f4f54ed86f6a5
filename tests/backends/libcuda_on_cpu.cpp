// libcuda.so.1 on the CPU, as much of it as sdcompile calls: what NVIDIA's bindings for Python load.
//
// As in tests/backends/played_cuda.py, work is queued and done when the stream is waited for, and memory is filled
// with NaN; but here arguments arrive through the C interface.

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <dlfcn.h>
#include <vector>

#include "kernels_on_cpu.cpp"

using Address = unsigned long long;
using Queue = std::vector<Launch>;

static std::deque<Launch> queue;
static Queue *captured;
static float now;
static int stream, module;

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600 };

static int put(void *on, Launch work)
{
    if (on != &stream) return INVALID_HANDLE;
    if (captured) captured->push_back(std::move(work));
    else queue.push_back(std::move(work));
    return SUCCESS;
}

static void work_until(const std::function<bool()> &enough)
{
    while (!enough()) {
        Launch work = std::move(queue.front());
        queue.pop_front();
        work();
    }
}

static int copy(void *to, const void *from, std::size_t size, void *on)
{
    return put(on, [=] { std::memcpy(to, from, size); });
}

static void *filled(std::size_t size) { return std::memset(std::malloc(size), 0xff, size); }

extern "C" {

// For what plays TensorRT: the one stream there is, and work to put on it.
void *played_stream() { return &stream; }
int played_put(void (*work)()) { return put(&stream, work); }

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuDeviceGet(int *device, int index) { *device = index; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **context, int) { *context = &now; return SUCCESS; }
int cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
int cuCtxSetCurrent(void *context) { return context == &now ? SUCCESS : INVALID_VALUE; }

int cuStreamCreate(void **made, unsigned flags) { *made = &stream; return flags == 1 ? SUCCESS : INVALID_VALUE; }
int cuStreamDestroy_v2(void *on) { return on == &stream ? SUCCESS : INVALID_HANDLE; }
int cuStreamSynchronize(void *on)
{
    if (on != &stream || captured) return INVALID_HANDLE;
    work_until([] { return queue.empty(); });
    return SUCCESS;
}

int cuMemAlloc_v2(Address *made, std::size_t size) { *made = (Address)filled(size); return SUCCESS; }
int cuMemHostAlloc(void **made, std::size_t size, unsigned) { *made = filled(size); return SUCCESS; }
int cuMemFree_v2(Address place) { std::free((void *)place); return SUCCESS; }
int cuMemFreeHost(void *place) { std::free(place); return SUCCESS; }
int cuMemcpyHtoDAsync_v2(Address to, const void *from, std::size_t n, void *on) { return copy((void *)to, from, n, on); }
int cuMemcpyDtoHAsync_v2(void *to, Address from, std::size_t n, void *on) { return copy(to, (void *)from, n, on); }
int cuMemcpyDtoDAsync_v2(Address to, Address from, std::size_t n, void *on)
{
    return copy((void *)to, (void *)from, n, on);
}
int cuMemsetD32Async(Address to, unsigned value, std::size_t count, void *on)
{
    return put(on, [=] { for (std::size_t i = 0; i < count; ++i) ((unsigned *)to)[i] = value; });
}

int cuModuleLoadData(void **made, const void *image)
{
    *made = &module;
    return std::strstr((const char *)image, ".version 8.0") ? SUCCESS : INVALID_PTX;
}
int cuModuleUnload(void *held) { return held == &module ? SUCCESS : INVALID_HANDLE; }
int cuModuleGetFunction(void **made, void *held, const char *name)
{
    *made = new std::string(name);
    return held == &module ? SUCCESS : NOT_FOUND;
}
int cuLaunchKernel(
    void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared,
    void *on, void **parameters, void **extra)
{
    if (y != 1 || z != 1 || ty != 1 || tz != 1 || shared || extra) return INVALID_VALUE;
    void *launch = prepare(static_cast<std::string *>(kernel)->c_str(), x, threads, parameters);
    return launch ? put(on, [=] { perform(launch); }) : NOT_FOUND;
}

int cuEventCreate(void **made, unsigned) { *made = new float(0); return SUCCESS; }
int cuEventDestroy_v2(void *event) { delete static_cast<float *>(event); return SUCCESS; }
int cuEventRecord(void *event, void *on)
{
    float *at = static_cast<float *>(event);
    *at = -1;
    return put(on, [=] { *at = now += 1; });
}
int cuEventSynchronize(void *event)
{
    work_until([=] { return *static_cast<float *>(event) >= 0; });
    return SUCCESS;
}
int cuEventElapsedTime_v2(float *milliseconds, void *first, void *then)
{
    float a = *static_cast<float *>(first), b = *static_cast<float *>(then);
    *milliseconds = b - a;
    return a < 0 || b < 0 ? NOT_READY : SUCCESS;
}
int cuEventElapsedTime(float *milliseconds, void *first, void *then)
{
    return cuEventElapsedTime_v2(milliseconds, first, then);
}

int cuStreamBeginCapture_v2(void *on, int) { captured = new Queue; return on == &stream ? SUCCESS : INVALID_HANDLE; }
int cuStreamEndCapture(void *, void **graph) { *graph = std::exchange(captured, nullptr); return SUCCESS; }
int cuGraphInstantiateWithFlags(void **made, void *graph, unsigned long long)
{
    *made = new Queue(*static_cast<Queue *>(graph));
    return SUCCESS;
}
int cuGraphDestroy(void *graph) { delete static_cast<Queue *>(graph); return SUCCESS; }
int cuGraphExecDestroy(void *graph) { delete static_cast<Queue *>(graph); return SUCCESS; }
int cuGraphLaunch(void *graph, void *on)
{
    for (auto &work : *static_cast<Queue *>(graph)) put(on, work);
    return SUCCESS;
}

int cuGetProcAddress_v2(const char *symbol, void **found, int, std::uint64_t, int *status)
{
    std::string name = symbol;
    *found = nullptr;
    for (const char *suffix : {"_v2", "WithFlags", ""})
        if (!*found) *found = dlsym(RTLD_DEFAULT, (name + suffix).c_str());
    if (status) *status = *found ? 0 : 1;
    return *found ? SUCCESS : NOT_FOUND;
}
}
