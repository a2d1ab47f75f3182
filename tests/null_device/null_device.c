/* A CUDA device that computes nothing and keeps books, for tests on machines without a GPU.
 *
 * Preloaded as libcuda.so.1, this file answers in place of CUDA's runtime, its driver and cuBLAS.
 * Everything above them is real: PyTorch's dispatch, its caching allocator, autograd, Inductor,
 * Triton down to ptxas. Kernels, matrix products and copies are written down in the books and not
 * carried out, so that what a program launches, copies, waits for and allocates can be read, but
 * no value: device memory is an address range that nobody may touch, and what is copied from it to
 * the host is zero.
 *
 * A function that is missing here is the real library's, which finds no GPU and fails.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <library_types.h>

#define API __attribute__((visibility("default")))
/* Most functions only give an answer, or none. */
#define ANSWERS(name, parameters, answer) \
  API cudaError_t name parameters {       \
    answer;                               \
    return cudaSuccess;                   \
  }
#define DRIVER_ANSWERS(name, parameters, answer) \
  API CUresult name parameters {                 \
    answer;                                      \
    return CUDA_SUCCESS;                         \
  }
#define CUBLAS_ANSWERS(name, parameters, answer) \
  API int name parameters {                      \
    answer;                                      \
    return 0;                                    \
  }

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of books, memory and kernel names */

/* ---- Books: how often each thing happened ------------------------------------------------- */

typedef struct {
  const char *kind; /* kernel triton gemm library graph copy fill sync malloc free pinned */
  char *name;
  long count;
  double amount; /* bytes, or the FLOPs of matrix products, of all of them together */
} Entry;

enum { ENTRIES = 1 << 14 }; /* names; a power of two */
static Entry entries[ENTRIES];

static Entry *entry_of(const char *kind, const char *name) {
  uint32_t hash = 2166136261u;
  for (const char *c = kind; *c; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
  for (const char *c = name; *c; c++) hash = (hash ^ (unsigned char)*c) * 16777619u;
  for (uint32_t probe = 0; probe < ENTRIES; probe++) {
    Entry *entry = &entries[(hash + probe) & (ENTRIES - 1)];
    if (!entry->name) {
      entry->kind = kind;
      entry->name = strdup(name);
      return entry;
    }
    if (!strcmp(entry->kind, kind) && !strcmp(entry->name, name)) return entry;
  }
  fprintf(stderr, "null device: the books are full\n");
  abort();
}

static void note(const char *kind, const char *name, double amount) {
  pthread_mutex_lock(&lock);
  Entry *entry = entry_of(kind, name);
  entry->count++;
  entry->amount += amount;
  pthread_mutex_unlock(&lock);
}

/* For stand-ins of libraries that are not faked here. */
API void null_device_note_library(const char *name) { note("library", name, 0); }

API void null_device_reset(void) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < ENTRIES; i++) free(entries[i].name);
  memset(entries, 0, sizeof entries);
  pthread_mutex_unlock(&lock);
}

typedef void (*Visitor)(const char *kind, const char *name, long count, double amount);

API void null_device_visit(Visitor visit) {
  for (int i = 0; i < ENTRIES; i++) {
    Entry entry = entries[i];
    if (entry.name) visit(entry.kind, entry.name, entry.count, entry.amount);
  }
}

/* ---- Errors -------------------------------------------------------------------------------- */

static __thread cudaError_t last_error = cudaSuccess;

static cudaError_t failed(cudaError_t error) { return last_error = error; }

API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

API cudaError_t cudaPeekAtLastError(void) { return last_error; }

API const char *cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    default: return "an error that the null device does not know";
  }
}

API const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : cudaGetErrorName(error);
}

/* ---- Memory -------------------------------------------------------------------------------- */

#define SPAN (1ull << 42) /* bytes of addresses; those that were freed are not given out again */
#define PAGE (2ull << 20)
#define DEFAULT_MIB (140ull << 10) /* about an H200's */

typedef struct {
  char *start;
  size_t size;
} Block;

typedef struct {
  Block *blocks;
  int count, capacity;
} Blocks;

static Blocks on_device, pinned;
static char *first_address, *next_address;
static size_t device_bytes, used_bytes;

static void add_block(Blocks *all, void *start, size_t size) {
  if (all->count == all->capacity) {
    all->capacity = all->capacity ? 2 * all->capacity : 1024;
    all->blocks = realloc(all->blocks, all->capacity * sizeof(Block));
  }
  all->blocks[all->count++] = (Block){start, size};
}

static size_t remove_block(Blocks *all, void *start) {
  for (int i = all->count - 1; i >= 0; i--) {
    if (all->blocks[i].start == start) {
      size_t size = all->blocks[i].size;
      all->blocks[i] = all->blocks[--all->count];
      return size;
    }
  }
  return 0;
}

__attribute__((constructor)) static void reserve_addresses(void) {
  const char *mib = getenv("NULL_DEVICE_MIB");
  device_bytes = (mib ? strtoull(mib, NULL, 10) : DEFAULT_MIB) << 20;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  first_address = next_address = mmap(NULL, SPAN, PROT_NONE, flags, -1, 0);
  if (first_address == MAP_FAILED) {
    fprintf(stderr, "null device: no range of addresses\n");
    abort();
  }
}

static int is_device_memory(const void *p) {
  return (const char *)p >= first_address && (const char *)p < first_address + SPAN;
}

static int is_pinned(const void *p) {
  int found = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < pinned.count && !found; i++) {
    Block block = pinned.blocks[i];
    found = (const char *)p >= block.start && (const char *)p < block.start + block.size;
  }
  pthread_mutex_unlock(&lock);
  return found;
}

API cudaError_t cudaMalloc(void **p, size_t size) {
  size_t rounded = (size + PAGE - 1) / PAGE * PAGE;
  *p = NULL;
  pthread_mutex_lock(&lock);
  if (used_bytes + rounded <= device_bytes && next_address + rounded <= first_address + SPAN) {
    *p = next_address;
    next_address += rounded;
    used_bytes += rounded;
    add_block(&on_device, *p, rounded);
  }
  pthread_mutex_unlock(&lock);
  note("malloc", "cudaMalloc", size);
  return *p ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}

API cudaError_t cudaFree(void *p) {
  pthread_mutex_lock(&lock);
  used_bytes -= remove_block(&on_device, p);
  pthread_mutex_unlock(&lock);
  if (p) note("free", "cudaFree", 0);
  return cudaSuccess;
}

API cudaError_t cudaMallocAsync(void **p, size_t size, cudaStream_t stream) {
  return cudaMalloc(p, size);
}

API cudaError_t cudaFreeAsync(void *p, cudaStream_t stream) { return cudaFree(p); }

API cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  *available = device_bytes - used_bytes;
  *total = device_bytes;
  return cudaSuccess;
}

API cudaError_t cudaHostAlloc(void **p, size_t size, unsigned flags) {
  if (posix_memalign(p, 4096, size ? size : 1)) return failed(cudaErrorMemoryAllocation);
  pthread_mutex_lock(&lock);
  add_block(&pinned, *p, size);
  pthread_mutex_unlock(&lock);
  note("pinned", "cudaHostAlloc", size);
  return cudaSuccess;
}

API cudaError_t cudaFreeHost(void *p) {
  pthread_mutex_lock(&lock);
  remove_block(&pinned, p);
  pthread_mutex_unlock(&lock);
  free(p);
  return cudaSuccess;
}

API cudaError_t cudaHostRegister(void *p, size_t size, unsigned flags) {
  pthread_mutex_lock(&lock);
  add_block(&pinned, p, size);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void *p) {
  pthread_mutex_lock(&lock);
  remove_block(&pinned, p);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *p) {
  memset(found, 0, sizeof *found);
  if (is_device_memory(p)) {
    found->type = cudaMemoryTypeDevice;
    found->devicePointer = (void *)p;
  } else {
    found->type = is_pinned(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    found->hostPointer = (void *)p;
  }
  return cudaSuccess;
}

/* Names a copy as in "DtoH sync". */
static cudaError_t copy(void *to, const void *from, size_t size, const char *how) {
  int to_device = is_device_memory(to), from_device = is_device_memory(from);
  char name[16];
  snprintf(name, sizeof name, "%cto%c %s", from_device ? 'D' : 'H', to_device ? 'D' : 'H', how);
  note("copy", name, size);
  if (!to_device && from_device) memset(to, 0, size);
  if (!to_device && !from_device) memcpy(to, from, size);
  return cudaSuccess;
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return copy(to, from, size, "sync");
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
  return copy(to, from, size, "async");
}

API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                  size_t width, size_t height, enum cudaMemcpyKind kind,
                                  cudaStream_t stream) {
  for (size_t row = 0; row < height; row++)
    copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, "async");
  return cudaSuccess;
}

API cudaError_t cudaMemset(void *p, int value, size_t size) {
  note("fill", "cudaMemset", size);
  if (!is_device_memory(p)) memset(p, value, size);
  return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t stream) {
  return cudaMemset(p, value, size);
}

ANSWERS(cudaMemcpyToSymbol, (const void *symbol, const void *from, size_t size, size_t offset,
        enum cudaMemcpyKind kind), )
API cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) { return cudaMalloc(p, 4096); }

ANSWERS(cudaDeviceGetDefaultMemPool, (cudaMemPool_t *pool, int device), *pool = NULL)

/* ---- The device: an H200 ------------------------------------------------------------------- */

#define DEVICE_NAME "NVIDIA H200"

/* The driver's enumeration has the runtime's values, attribute by attribute. */
static int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrTotalConstantMemory: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 64 << 10;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 228 << 10;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 64 << 10;
    case cudaDevAttrManagedMemory: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 227 << 10;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1 << 10;
    case cudaDevAttrMemoryPoolsSupported: return 1;
    default: return 0;
  }
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *device, int index) {
  memset(device, 0, sizeof *device);
  strcpy(device->name, DEVICE_NAME);
  device->totalGlobalMem = device_bytes;
  device->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  device->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
  device->warpSize = attribute(cudaDevAttrWarpSize);
  device->memPitch = 2147483647;
  device->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  for (int axis = 0; axis < 3; axis++) {
    device->maxThreadsDim[axis] = attribute(cudaDevAttrMaxBlockDimX + axis);
    device->maxGridSize[axis] = attribute(cudaDevAttrMaxGridDimX + axis);
  }
  device->totalConstMem = attribute(cudaDevAttrTotalConstantMemory);
  device->major = attribute(cudaDevAttrComputeCapabilityMajor);
  device->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  device->textureAlignment = 512;
  device->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  device->concurrentKernels = 1;
  device->asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
  device->unifiedAddressing = 1;
  device->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  device->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  device->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  device->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  device->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
  device->managedMemory = 1;
  device->cooperativeLaunch = 1;
  device->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  device->reservedSharedMemPerBlock = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  return cudaSuccess;
}

ANSWERS(cudaDeviceGetAttribute, (int *value, enum cudaDeviceAttr which, int device),
        *value = attribute(which))
ANSWERS(cudaGetDeviceCount, (int *count), *count = 1)
ANSWERS(cudaGetDevice, (int *device), *device = 0)
ANSWERS(cudaDeviceSynchronize, (void), note("sync", "cudaDeviceSynchronize", 0))
ANSWERS(cudaDeviceCanAccessPeer, (int *can, int device, int peer), *can = 0)
ANSWERS(cudaDriverGetVersion, (int *version), *version = CUDART_VERSION)
ANSWERS(cudaRuntimeGetVersion, (int *version), *version = CUDART_VERSION)
ANSWERS(cudaDeviceGetPCIBusId, (char *id, int size, int device), snprintf(id, size, "0000:00:00.0"))
ANSWERS(cudaSetDevice, (int device), )
ANSWERS(cudaProfilerStart, (void), )
ANSWERS(cudaProfilerStop, (void), )

/* ---- Streams, events and graphs ------------------------------------------------------------ */

/* Everything is over as soon as it is asked for. Launches are counted when a graph is captured;
 * a launch of the graph counts as one. */

static void *new_handle(void) {
  static uintptr_t newest = 0x1000;
  return (void *)__sync_add_and_fetch(&newest, 16);
}

ANSWERS(cudaStreamCreateWithFlags, (cudaStream_t *stream, unsigned flags), *stream = new_handle())

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return cudaStreamCreateWithFlags(stream, flags);
}

API cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithFlags(stream, 0);
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

ANSWERS(cudaStreamGetPriority, (cudaStream_t stream, int *priority), *priority = 0)
ANSWERS(cudaStreamSynchronize, (cudaStream_t stream), note("sync", "cudaStreamSynchronize", 0))
ANSWERS(cudaLaunchHostFunc, (cudaStream_t stream, cudaHostFn_t function, void *data),
        function(data))

API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                      void *data, unsigned flags) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}

ANSWERS(cudaStreamDestroy, (cudaStream_t stream), )
ANSWERS(cudaStreamQuery, (cudaStream_t stream), )
ANSWERS(cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags), )

typedef struct {
  struct timespec recorded;
} Event;

ANSWERS(cudaEventCreateWithFlags, (cudaEvent_t *event, unsigned flags),
        *event = calloc(1, sizeof(Event)))

API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

ANSWERS(cudaEventDestroy, (cudaEvent_t event), free(event))
ANSWERS(cudaEventRecordWithFlags, (cudaEvent_t event, cudaStream_t stream, unsigned flags),
        clock_gettime(CLOCK_MONOTONIC, &((Event *)event)->recorded))

API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

ANSWERS(cudaEventSynchronize, (cudaEvent_t event), note("sync", "cudaEventSynchronize", 0))

API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  struct timespec a = ((Event *)from)->recorded, b = ((Event *)to)->recorded;
  *milliseconds = (b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) * 1e-6;
  return cudaSuccess;
}

ANSWERS(cudaEventQuery, (cudaEvent_t event), )

static int capturing = 0;
static unsigned long long captures = 0;

static enum cudaStreamCaptureStatus capture_status(cudaStream_t stream) {
  return capturing && stream ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  capturing = 1;
  captures++;
  return cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  capturing = 0;
  *graph = new_handle();
  return cudaSuccess;
}

ANSWERS(cudaStreamIsCapturing, (cudaStream_t stream, enum cudaStreamCaptureStatus *status),
        *status = capture_status(stream))

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph,
                                         const cudaGraphNode_t **dependencies,
                                         const cudaGraphEdgeData **edges, size_t *count) {
  *status = capture_status(stream);
  if (id) *id = captures;
  if (graph) *graph = NULL;
  if (dependencies) *dependencies = NULL;
  if (count) *count = 0;
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph,
                                              unsigned long long flags) {
  *executable = new_handle();
  return cudaSuccess;
}

ANSWERS(cudaGraphLaunch, (cudaGraphExec_t graph, cudaStream_t stream),
        note("graph", "cudaGraphLaunch", 0))

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = 1; /* PyTorch warns of an empty graph */
  return cudaSuccess;
}

ANSWERS(cudaThreadExchangeStreamCaptureMode, (enum cudaStreamCaptureMode *mode), )
ANSWERS(cudaGraphDestroy, (cudaGraph_t graph), )
ANSWERS(cudaGraphExecDestroy, (cudaGraphExec_t graph), )

/* ---- Kernels of libraries ------------------------------------------------------------------ */

typedef struct {
  const void *stub; /* the host function that stands for it */
  const char *name;
} Kernel;

static Kernel *kernels;
static int num_kernels, kernel_capacity, num_sorted;

API void **__cudaRegisterFatBinary(void *binary) {
  static void *handle[1];
  return handle;
}

API void __cudaRegisterFunction(void **binary, const char *stub, char *device_stub,
                                const char *name, int threads, void *thread, void *block,
                                void *block_size, void *grid_size, int *warp_size) {
  pthread_mutex_lock(&lock);
  if (num_kernels == kernel_capacity) {
    kernel_capacity = kernel_capacity ? 2 * kernel_capacity : 1 << 16;
    kernels = realloc(kernels, kernel_capacity * sizeof(Kernel));
  }
  kernels[num_kernels++] = (Kernel){stub, name};
  pthread_mutex_unlock(&lock);
}

API void __cudaRegisterFatBinaryEnd(void **binary) {}
API void __cudaUnregisterFatBinary(void **binary) {}
API char __cudaInitModule(void **binary) { return 1; }
API void __cudaRegisterVar(void **binary, char *variable, char *address, const char *name,
                           int external, size_t size, int constant, int global) {}
API void __cudaRegisterManagedVar(void **binary, void **variable, char *address, const char *name,
                                  int external, size_t size, int constant, int global) {}

static int by_stub(const void *a, const void *b) {
  const char *x = ((const Kernel *)a)->stub, *y = ((const Kernel *)b)->stub;
  return (x > y) - (x < y);
}

static const char *kernel_name(const void *stub) {
  Kernel wanted = {stub, NULL};
  pthread_mutex_lock(&lock);
  if (num_sorted != num_kernels) {
    qsort(kernels, num_kernels, sizeof(Kernel), by_stub);
    num_sorted = num_kernels;
  }
  Kernel *found = bsearch(&wanted, kernels, num_kernels, sizeof(Kernel), by_stub);
  pthread_mutex_unlock(&lock);
  return found ? found->name : "unknown";
}

static int fits(dim3 grid, dim3 block) {
  unsigned long threads = (unsigned long)block.x * block.y * block.z;
  return grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 &&
         grid.z <= 65535 && threads && threads <= 1024;
}

static cudaError_t launch(const char *kind, const char *name, dim3 grid, dim3 block) {
  note(kind, name, 0);
  if (fits(grid, block)) return cudaSuccess;
  fprintf(stderr, "null device: %s on a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads\n",
          name, grid.x, grid.y, grid.z, block.x, block.y, block.z);
  return failed(cudaErrorInvalidConfiguration);
}

/* What <<<grid, block>>> compiles to: push, call the stub, which pops and launches. */
static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} call;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  call.grid = grid;
  call.block = block;
  call.shared = shared;
  call.stream = stream;
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = call.grid;
  *block = call.block;
  *shared = call.shared;
  *(void **)stream = call.stream;
  return cudaSuccess;
}

ANSWERS(__cudaGetKernel, (void **kernel, const void *stub), *kernel = (void *)stub)

API cudaError_t __cudaLaunchKernel(void *kernel, dim3 grid, dim3 block, void **arguments,
                                   size_t shared, cudaStream_t stream) {
  return launch("kernel", kernel_name(kernel), grid, block);
}

API cudaError_t cudaLaunchKernel(const void *stub, dim3 grid, dim3 block, void **arguments,
                                 size_t shared, cudaStream_t stream) {
  return launch("kernel", kernel_name(stub), grid, block);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *stub,
                                    void **arguments) {
  return launch("kernel", kernel_name(stub), how->gridDim, how->blockDim);
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *stub) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 90;
  found->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *stub, int threads, size_t shared, unsigned flags) {
  *blocks = 2;
  return cudaSuccess;
}

ANSWERS(cudaFuncSetAttribute, (const void *stub, enum cudaFuncAttribute which, int value), )

API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function,
                                                 unsigned version, unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result)
    *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

/* ---- The driver, as Triton and Inductor call it -------------------------------------------- */

#define CONTEXT ((CUcontext)64)

DRIVER_ANSWERS(cuDriverGetVersion, (int *version), *version = CUDA_VERSION)
DRIVER_ANSWERS(cuDeviceGet, (CUdevice *device, int index), *device = 0)
DRIVER_ANSWERS(cuDeviceGetCount, (int *count), *count = 1)
DRIVER_ANSWERS(cuDeviceGetName, (char *name, int size, CUdevice device),
               snprintf(name, size, DEVICE_NAME))
DRIVER_ANSWERS(cuDeviceGetAttribute, (int *value, CUdevice_attribute which, CUdevice device),
               *value = attribute(which))

API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

DRIVER_ANSWERS(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device), *context = CONTEXT)
DRIVER_ANSWERS(cuCtxGetCurrent, (CUcontext *context), *context = CONTEXT)
DRIVER_ANSWERS(cuCtxGetDevice, (CUdevice *device), *device = 0)

API CUresult cuCtxPopCurrent(CUcontext *context) { return cuCtxGetCurrent(context); }

DRIVER_ANSWERS(cuCtxGetLimit, (size_t *value, CUlimit which), *value = 0)
DRIVER_ANSWERS(cuGetErrorString, (CUresult error, const char **text),
               *text = "an error of the null device")

/* A module is nothing, a function is its name. */
DRIVER_ANSWERS(cuModuleLoadData, (CUmodule *module, const void *image), *module = new_handle())

API CUresult cuModuleLoad(CUmodule *module, const char *file) {
  return cuModuleLoadData(module, file);
}

API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                                CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}

DRIVER_ANSWERS(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name),
               *function = (CUfunction)strdup(name))

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 64
                                                            : 0;
  return CUDA_SUCCESS;
}

static CUresult launch_triton(CUfunction function, dim3 grid, dim3 block) {
  cudaError_t error = launch("triton", (const char *)function, grid, block);
  return error ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                            CUstream stream, void **arguments, void **extra) {
  return launch_triton(function, (dim3){grid_x, grid_y, grid_z}, (dim3){block_x, block_y, block_z});
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **arguments,
                              void **extra) {
  dim3 grid = {how->gridDimX, how->gridDimY, how->gridDimZ};
  dim3 block = {how->blockDimX, how->blockDimY, how->blockDimZ};
  return launch_triton(function, grid, block);
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function,
                                                         int threads, size_t shared) {
  *blocks = 2;
  return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                          const CUlaunchConfig *how) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr p) {
  *(CUdeviceptr *)value = p; /* Triton asks for the device's address of a tensor */
  return CUDA_SUCCESS;
}

API CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *properties,
                                           CUmemAllocationGranularity_flags which) {
  *size = PAGE;
  return CUDA_SUCCESS;
}

API CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                              CUdriverProcAddressQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result)
    *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

DRIVER_ANSWERS(cuInit, (unsigned flags), )
DRIVER_ANSWERS(cuCtxSetCurrent, (CUcontext context), )
DRIVER_ANSWERS(cuCtxPushCurrent, (CUcontext context), )
DRIVER_ANSWERS(cuCtxSetLimit, (CUlimit which, size_t value), )
DRIVER_ANSWERS(cuModuleUnload, (CUmodule module), )
DRIVER_ANSWERS(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute which, int value), )
DRIVER_ANSWERS(cuFuncSetCacheConfig, (CUfunction function, CUfunc_cache which), )

/* ---- cuBLAS -------------------------------------------------------------------------------- */

/* Its headers need headers of C++ that come with no wheel: here handles are addresses, and
 * enumerations and the status are ints. Matrices are column-major: C (m, n), A (m, k), B (k, n). */

typedef void *Handle;

/* Named by its sizes and, as cudaDataType numbers them, by the types of A and C. */
static int product(const char *function, int transpose_a, int transpose_b, long m, long n, long k,
                   int type_a, int type_c, long batch) {
  char name[200];
  snprintf(name, sizeof name, "%s %c%c m%ld n%ld k%ld batch%ld type%d->%d", function,
           transpose_a ? 'T' : 'N', transpose_b ? 'T' : 'N', m, n, k, batch, type_a, type_c);
  note("gemm", name, 2.0 * m * n * k * batch);
  return 0;
}

CUBLAS_ANSWERS(cublasCreate_v2, (Handle *handle), *handle = new_handle())

static __thread int math_mode, pointer_mode;

CUBLAS_ANSWERS(cublasSetMathMode, (Handle handle, int mode), math_mode = mode)
CUBLAS_ANSWERS(cublasGetMathMode, (Handle handle, int *mode), *mode = math_mode)
CUBLAS_ANSWERS(cublasSetPointerMode_v2, (Handle handle, int mode), pointer_mode = mode)
CUBLAS_ANSWERS(cublasGetPointerMode_v2, (Handle handle, int *mode), *mode = pointer_mode)
CUBLAS_ANSWERS(cublasDestroy_v2, (Handle handle), )
CUBLAS_ANSWERS(cublasSetStream_v2, (Handle handle, void *stream), )
CUBLAS_ANSWERS(cublasSetWorkspace_v2, (Handle handle, void *workspace, size_t size), )

API int cublasGemmEx(Handle handle, int ta, int tb, int m, int n, int k, const void *alpha,
                     const void *a, int type_a, int lda, const void *b, int type_b, int ldb,
                     const void *beta, void *c, int type_c, int ldc, int compute, int algorithm) {
  return product("GemmEx", ta, tb, m, n, k, type_a, type_c, 1);
}

API int cublasGemmStridedBatchedEx(Handle handle, int ta, int tb, int m, int n, int k,
                                   const void *alpha, const void *a, int type_a, int lda,
                                   long long stride_a, const void *b, int type_b, int ldb,
                                   long long stride_b, const void *beta, void *c, int type_c,
                                   int ldc, long long stride_c, int batch, int compute,
                                   int algorithm) {
  return product("GemmStridedBatchedEx", ta, tb, m, n, k, type_a, type_c, batch);
}

#define GEMM(name, real, type)                                                                 \
  API int cublas##name##_v2(Handle handle, int ta, int tb, int m, int n, int k,                \
                            const real *alpha, const real *a, int lda, const real *b, int ldb, \
                            const real *beta, real *c, int ldc) {                              \
    return product(#name, ta, tb, m, n, k, type, type, 1);                                     \
  }                                                                                            \
  API int cublas##name##StridedBatched(                                                        \
      Handle handle, int ta, int tb, int m, int n, int k, const real *alpha, const real *a,    \
      int lda, long long stride_a, const real *b, int ldb, long long stride_b,                 \
      const real *beta, real *c, int ldc, long long stride_c, int batch) {                     \
    return product(#name "StridedBatched", ta, tb, m, n, k, type, type, batch);                \
  }

GEMM(Sgemm, float, CUDA_R_32F)
GEMM(Dgemm, double, CUDA_R_64F)

#define VECTOR(letter, real, type)                                                             \
  API int cublas##letter##gemv_v2(Handle handle, int ta, int m, int n, const real *alpha,      \
                                  const real *a, int lda, const real *x, int step_x,           \
                                  const real *beta, real *y, int step_y) {                     \
    return product(#letter "gemv", ta, 0, m, 1, n, type, type, 1);                             \
  }                                                                                            \
  API int cublas##letter##dot_v2(Handle handle, int n, const real *x, int step_x,              \
                                 const real *y, int step_y, real *result) {                    \
    return product(#letter "dot", 1, 0, 1, 1, n, type, type, 1);                               \
  }

VECTOR(S, float, CUDA_R_32F)
VECTOR(D, double, CUDA_R_64F)

/* cuBLASLt: descriptions of a product and of its matrices are kept until the product is asked. */

enum { TRANSPOSE_A = 3, TRANSPOSE_B = 4, EPILOGUE = 7 }; /* attributes of a product */
enum { BATCH = 5 };                                      /* attribute of a matrix */

typedef struct {
  int transpose_a, transpose_b, epilogue;
} Product;

typedef struct {
  uint64_t rows, columns;
  int type, batch;
} Matrix;

typedef struct { /* cublasLtMatmulHeuristicResult_t */
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
} Heuristic;

API size_t cublasLtGetVersion(void) { return 130100; }
API size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }

CUBLAS_ANSWERS(cublasLtMatmulDescCreate, (Handle *handle, int compute, int scale),
               *handle = calloc(1, sizeof(Product)))

API int cublasLtMatmulDescSetAttribute(Handle handle, int which, const void *value, size_t size) {
  Product *product = handle;
  if (which == TRANSPOSE_A) product->transpose_a = *(const int *)value;
  if (which == TRANSPOSE_B) product->transpose_b = *(const int *)value;
  if (which == EPILOGUE) product->epilogue = *(const int *)value;
  return 0;
}

CUBLAS_ANSWERS(cublasLtMatmulDescDestroy, (Handle handle), free(handle))

API int cublasLtMatrixLayoutCreate(Handle *handle, int type, uint64_t rows, uint64_t columns,
                                   int64_t leading) {
  Matrix *matrix = malloc(sizeof(Matrix));
  *matrix = (Matrix){rows, columns, type, 1};
  *handle = matrix;
  return 0;
}

API int cublasLtMatrixLayoutSetAttribute(Handle handle, int which, const void *value,
                                         size_t size) {
  if (which == BATCH) ((Matrix *)handle)->batch = *(const int *)value;
  return 0;
}

CUBLAS_ANSWERS(cublasLtMatrixLayoutDestroy, (Handle handle), free(handle))
CUBLAS_ANSWERS(cublasLtMatmulPreferenceCreate, (Handle *handle), *handle = new_handle())
CUBLAS_ANSWERS(cublasLtMatmulPreferenceDestroy, (Handle handle), )
CUBLAS_ANSWERS(cublasLtMatmulPreferenceSetAttribute, (Handle handle, int which, const void *value,
               size_t size), )

API int cublasLtMatmulAlgoGetHeuristic(Handle handle, Handle description, Handle a, Handle b,
                                       Handle c, Handle d, Handle preference, int wanted,
                                       Heuristic *results, int *found) {
  memset(results, 0, wanted * sizeof *results);
  *found = wanted;
  return 0;
}

API int cublasLtMatmul(Handle handle, Handle description, const void *alpha, const void *a,
                       Handle described_a, const void *b, Handle described_b, const void *beta,
                       const void *c, Handle described_c, void *d, Handle described_d,
                       const void *algorithm, void *workspace, size_t workspace_size,
                       void *stream) {
  Product *how = description;
  Matrix *in = described_a, *out = described_d;
  long k = how->transpose_a ? in->rows : in->columns;
  char name[40];
  snprintf(name, sizeof name, "LtMatmul epilogue%d", how->epilogue);
  return product(name, how->transpose_a, how->transpose_b, out->rows, out->columns, k, in->type,
                 out->type, out->batch);
}
