/* A CUDA runtime without a GPU. It shows where ONNX Runtime would place the nodes of a graph, and which
 * calls it would make to run it.
 *
 * Device memory is host memory, kernels and libraries compute nothing, and the device claims to be an
 * H100. Values are meaningless. Placement, control flow, copies, allocations and synchronisations are
 * ONNX Runtime's own, and the stub counts them.
 *
 * One shared object replaces libcuda, libcudart, libcublas, libcublasLt, libcurand and libcudnn
 * (stub.py creates a link for each name). On x86-64 and aarch64 Linux a caller may pass more arguments
 * than a function declares, so entry points that only need to succeed declare none.
 */

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

/* --- counters ------------------------------------------------------------------------------- */

/* In the order of COUNTERS in stub.py */
enum counter {
  DEVICE_ALLOCATIONS,
  DEVICE_BYTES,
  PINNED_ALLOCATIONS,
  HOST_TO_DEVICE_COPIES,
  HOST_TO_DEVICE_BYTES,
  DEVICE_TO_HOST_COPIES,
  DEVICE_TO_HOST_BYTES,
  DEVICE_TO_DEVICE_COPIES,
  DEVICE_TO_DEVICE_BYTES,
  SYNCHRONIZATIONS,
  LAUNCHES,
  LIBRARY_CALLS,
  GRAPH_CAPTURES,
  GRAPH_LAUNCHES,
  CAPTURE_VIOLATIONS,
  COUNTER_COUNT
};

static long long counters[COUNTER_COUNT];

static void count(enum counter which, long long amount) {
  __atomic_fetch_add(&counters[which], amount, __ATOMIC_RELAXED);
}

void gemma3_stub_counters(long long *out) { memcpy(out, counters, sizeof counters); }

/* --- memory --------------------------------------------------------------------------------- */

enum { OK = 0, OUT_OF_MEMORY = 2, CAPTURE_UNSUPPORTED = 900 };
enum { HOST_TO_DEVICE = 1, DEVICE_TO_HOST = 2, DEVICE_TO_DEVICE = 3 };
enum { MEMORY_HOST = 1, MEMORY_DEVICE = 2 };
enum { MAX_REGIONS = 65536, DEVICES = 2 };

static int fills_memory; /* new device memory is all ones, which is NaN in every float type */

static struct region {
  char *start;
  size_t size;
  int kind;
} regions[MAX_REGIONS];
static int region_count;
static int lock;
static int current_device;
static int is_capturing;

static void acquire(void) {
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) {
  }
}

static void release(void) { __atomic_store_n(&lock, 0, __ATOMIC_RELEASE); }

/* Stream capture forbids allocation and synchronisation. */
static int forbidden_in_capture(void) {
  if (!is_capturing) return OK;
  count(CAPTURE_VIOLATIONS, 1);
  return CAPTURE_UNSUPPORTED;
}

static int allocate(void **out, size_t size, int kind) {
  /* Untouched pages cost nothing, so a large model's arena fits on a small machine. */
  void *memory = mmap(NULL, size ? size : 1, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return OUT_OF_MEMORY;
  if (kind == MEMORY_DEVICE && fills_memory) memset(memory, 0xff, size);
  acquire();
  int index = 0;
  while (index < region_count && regions[index].start) index++;
  if (index == MAX_REGIONS) {
    release();
    munmap(memory, size ? size : 1);
    return OUT_OF_MEMORY;
  }
  if (index == region_count) region_count++;
  regions[index] = (struct region){memory, size, kind};
  release();
  *out = memory;
  return OK;
}

/* As on a GPU, let new memory hold what is not a number, from now on. */
void gemma3_stub_fill_memory(void) { fills_memory = 1; }

static int deallocate(void *memory) {
  if (!memory) return OK;
  acquire();
  for (int index = 0; index < region_count; index++) {
    if (regions[index].start == (char *)memory) {
      munmap(memory, regions[index].size ? regions[index].size : 1);
      regions[index].start = NULL;
      break;
    }
  }
  release();
  return OK;
}

static int kind_of(const void *pointer) {
  int kind = 0;
  acquire();
  for (int index = 0; index < region_count && !kind; index++) {
    const struct region *region = &regions[index];
    if (region->start && (const char *)pointer >= region->start &&
        (const char *)pointer < region->start + region->size) {
      kind = region->kind;
    }
  }
  release();
  return kind;
}

static int device_allocate(void **out, size_t size) {
  int problem = forbidden_in_capture();
  if (problem) return problem;
  count(DEVICE_ALLOCATIONS, 1);
  count(DEVICE_BYTES, (long long)size);
  return allocate(out, size, MEMORY_DEVICE);
}

int cudaMalloc(void **out, size_t size) { return device_allocate(out, size); }
int cudaMallocAsync(void **out, size_t size, void *stream) {
  (void)stream;
  return device_allocate(out, size);
}
int cudaMallocFromPoolAsync(void **out, size_t size, void *pool, void *stream) {
  (void)pool, (void)stream;
  return device_allocate(out, size);
}
int cudaFree(void *memory) { return deallocate(memory); }
int cudaFreeAsync(void *memory, void *stream) {
  (void)stream;
  return deallocate(memory);
}

static int pinned_allocate(void **out, size_t size) {
  count(PINNED_ALLOCATIONS, 1);
  return allocate(out, size, MEMORY_HOST);
}

int cudaHostAlloc(void **out, size_t size, unsigned flags) {
  (void)flags;
  return pinned_allocate(out, size);
}
int cudaMallocHost(void **out, size_t size) { return pinned_allocate(out, size); }
int cudaFreeHost(void *memory) { return deallocate(memory); }

static void copy(void *target, const void *source, size_t size) {
  int to_device = kind_of(target) == MEMORY_DEVICE, from_device = kind_of(source) == MEMORY_DEVICE;
  if (to_device && from_device) {
    count(DEVICE_TO_DEVICE_COPIES, 1), count(DEVICE_TO_DEVICE_BYTES, (long long)size);
  } else if (to_device) {
    count(HOST_TO_DEVICE_COPIES, 1), count(HOST_TO_DEVICE_BYTES, (long long)size);
  } else if (from_device) {
    count(DEVICE_TO_HOST_COPIES, 1), count(DEVICE_TO_HOST_BYTES, (long long)size);
  }
  memmove(target, source, size);
}

int cudaMemcpy(void *target, const void *source, size_t size, int kind) {
  (void)kind;
  int problem = forbidden_in_capture();
  if (problem) return problem;
  count(SYNCHRONIZATIONS, 1);
  copy(target, source, size);
  return OK;
}
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, void *stream) {
  (void)kind, (void)stream;
  copy(target, source, size);
  return OK;
}
int cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                      size_t width, size_t height, int kind, void *stream) {
  (void)kind, (void)stream;
  for (size_t row = 0; row < height; row++)
    copy((char *)target + row * target_pitch, (const char *)source + row * source_pitch, width);
  return OK;
}
int cudaMemcpyFromSymbol(void *target, const void *symbol, size_t size, size_t offset, int kind) {
  (void)symbol, (void)offset, (void)kind;
  memset(target, 0, size);
  return OK;
}
int cudaMemset(void *target, int value, size_t size) {
  if (kind_of(target)) memset(target, value, size);
  return OK;
}
int cudaMemsetAsync(void *target, int value, size_t size, void *stream) {
  (void)stream;
  count(LAUNCHES, 1);
  return cudaMemset(target, value, size);
}
int cudaMemGetInfo(size_t *available, size_t *total) {
  *total = (size_t)80 << 30;
  *available = (size_t)79 << 30;
  return OK;
}
struct pointer_attributes {
  int type, device;
  void *device_pointer, *host_pointer;
  long reserved[8];
};
int cudaPointerGetAttributes(struct pointer_attributes *out, const void *pointer) {
  memset(out, 0, sizeof *out);
  out->type = kind_of(pointer);
  out->device = current_device;
  out->device_pointer = out->host_pointer = (void *)(uintptr_t)pointer;
  return OK;
}

/* --- the device ----------------------------------------------------------------------------- */

/* An H100 SXM: (offset in cudaDeviceProp of CUDA 13, attribute number, bytes, value);
 * -1 means that there is no offset or no number. */
static const struct fact {
  short offset, attribute;
  char size;
  long long value;
} FACTS[] = {
    {288, -1, 8, 85899345920LL}, /* total memory */
    {296, 8, 8, 49152},          /* shared memory per block */
    {304, 12, 4, 65536},         /* registers per block */
    {308, 10, 4, 32},            /* warp size */
    {320, 1, 4, 1024},           /* threads per block */
    {324, 2, 4, 1024},
    {328, 3, 4, 1024},
    {332, 4, 4, 64},
    {336, 5, 4, 2147483647},
    {340, 6, 4, 65535},
    {344, 7, 4, 65535},
    {352, 9, 8, 65536},  /* constant memory */
    {360, 75, 4, 9},     /* compute capability 9.0 */
    {364, 76, 4, 0},
    {368, 14, 8, 512},   /* texture alignment */
    {384, 16, 4, 132},   /* multiprocessors */
    {560, 31, 4, 1},     /* concurrent kernels */
    {588, 41, 4, 1},     /* unified addressing */
    {592, 37, 4, 5120},  /* bus width in bits */
    {596, 38, 4, 52428800},
    {604, 39, 4, 2048},  /* threads per multiprocessor */
    {624, 81, 8, 233472},
    {632, 82, 4, 65536},
    {668, 95, 4, 1},     /* cooperative launch */
    {672, 97, 8, 232448},
    {688, 106, 4, 32},
    {696, 111, 8, 1024},
    {-1, 120, 4, 1},     /* clusters */
};
static const char NAME[] = "stub of an NVIDIA H100";
enum { PROPERTIES_SIZE = 1008, FACT_COUNT = sizeof FACTS / sizeof FACTS[0] };

int cudaGetDeviceProperties(char *out, int device) {
  (void)device;
  memset(out, 0, PROPERTIES_SIZE);
  strcpy(out, NAME);
  for (int index = 0; index < FACT_COUNT; index++) {
    if (FACTS[index].offset >= 0)
      memcpy(out + FACTS[index].offset, &FACTS[index].value, (size_t)FACTS[index].size);
  }
  return OK;
}
int cudaDeviceGetAttribute(int *out, int attribute, int device) {
  (void)device;
  *out = 0;
  for (int index = 0; index < FACT_COUNT; index++) {
    if (FACTS[index].attribute == attribute) *out = (int)FACTS[index].value;
  }
  return OK;
}
int cudaGetDeviceCount(int *out) { return *out = DEVICES, OK; }
int cudaGetDevice(int *out) { return *out = current_device, OK; }
int cudaSetDevice(int device) {
  if (device < 0 || device >= DEVICES) return 101; /* invalid device */
  current_device = device;
  return OK;
}
int cudaDriverGetVersion(int *out) { return *out = 13000, OK; }
int cudaRuntimeGetVersion(int *out) { return *out = 13000, OK; }
int cudaGetLastError(void) { return OK; }
int cudaPeekAtLastError(void) { return OK; }
static const char *error_text(int error) {
  if (error == CAPTURE_UNSUPPORTED) return "operation not permitted while a stream is captured";
  return error ? "error of the CUDA stub" : "no error";
}
const char *cudaGetErrorString(int error) { return error_text(error); }
const char *cudaGetErrorName(int error) { return error_text(error); }
struct function_attributes {
  size_t shared, constant, local;
  int max_threads, registers, ptx, binary, rest[32];
};
int cudaFuncGetAttributes(struct function_attributes *out, const void *function) {
  (void)function;
  memset(out, 0, 48); /* the size that all versions of the structure share */
  out->max_threads = 1024;
  out->registers = 32;
  out->ptx = out->binary = 90;
  return OK;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *out) { return *out = 2, OK; }

/* --- streams, events, graphs ---------------------------------------------------------------- */

static char token; /* every opaque handle points here */

static int handle(void **out) { return *out = &token, OK; }
static int synchronize(void) {
  int problem = forbidden_in_capture();
  if (!problem) count(SYNCHRONIZATIONS, 1);
  return problem;
}

int cudaStreamCreate(void **out) { return handle(out); }
int cudaStreamCreateWithFlags(void **out) { return handle(out); }
int cudaStreamCreateWithPriority(void **out) { return handle(out); }
int cudaEventCreate(void **out) { return handle(out); }
int cudaEventCreateWithFlags(void **out) { return handle(out); }
int cudaStreamSynchronize(void) { return synchronize(); }
int cudaDeviceSynchronize(void) { return synchronize(); }
int cudaEventSynchronize(void) { return synchronize(); }
int cudaEventElapsedTime(float *out) { return *out = 0.01f, OK; }
int cudaStreamIsCapturing(void *stream, int *out) {
  (void)stream;
  return *out = is_capturing, OK;
}
int cudaStreamBeginCapture(void) {
  count(GRAPH_CAPTURES, 1);
  is_capturing = 1;
  return OK;
}
int cudaStreamEndCapture(void *stream, void **graph) {
  (void)stream;
  is_capturing = 0;
  return handle(graph);
}
int cudaGraphInstantiate(void **out) { return handle(out); }
int cudaGraphInstantiateWithFlags(void **out) { return handle(out); }
int cudaGraphLaunch(void) {
  count(GRAPH_LAUNCHES, 1);
  return OK;
}
int cudaLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
  (void)stream;
  function(data);
  return OK;
}
int cudaMemPoolCreate(void **out) { return handle(out); }
int cudaDeviceGetDefaultMemPool(void **out) { return handle(out); }
int cudaLibraryLoadData(void **out) { return handle(out); }
int cudaLibraryGetKernel(void **out) { return handle(out); }

/* --- kernels -------------------------------------------------------------------------------- */

static int launch(void) {
  count(LAUNCHES, 1);
  return OK;
}
int cudaLaunchKernel(void) { return launch(); }
int __cudaLaunchKernel(void) { return launch(); }
int __cudaLaunchKernel_ptsz(void) { return launch(); }
int cudaLaunchKernelExC(void) { return launch(); }
int cudaLaunchCooperativeKernel(void) { return launch(); }
int __cudaGetKernel(void **out, const void *entry) {
  (void)entry;
  return handle(out);
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *registered;
  (void)binary;
  return &registered;
}
void __cudaRegisterFatBinaryEnd(void) {}
void __cudaUnregisterFatBinary(void) {}
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
unsigned __cudaPushCallConfiguration(void) { return 0; }
struct dimensions {
  unsigned x, y, z;
};
int __cudaPopCallConfiguration(struct dimensions *grid, struct dimensions *block, size_t *shared,
                               void **stream) {
  *grid = *block = (struct dimensions){1, 1, 1};
  *shared = 0;
  *stream = NULL;
  return OK;
}

/* --- the driver ----------------------------------------------------------------------------- */

int cuInit(unsigned flags) {
  (void)flags;
  return OK;
}
int cuDriverGetVersion(int *out) { return *out = 13000, OK; }
int cuDeviceGetCount(int *out) { return *out = DEVICES, OK; }
int cuDeviceGet(int *out, int index) { return *out = index, OK; }
int cuDeviceGetName(char *out, int size, int device) {
  (void)device;
  return snprintf(out, (size_t)size, "%s", NAME), OK;
}
int cuDeviceGetAttribute(int *out, int attribute, int device) {
  return cudaDeviceGetAttribute(out, attribute, device);
}
int cuDeviceTotalMem_v2(size_t *out, int device) {
  (void)device;
  return *out = (size_t)80 << 30, OK;
}
int cuTensorMapEncodeTiled(void) { return OK; }
static int driver_entry(void) { return OK; }
int cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                     unsigned long long flags, int *status) {
  (void)symbol, (void)version, (void)flags;
  *function = (void *)(uintptr_t)&driver_entry;
  if (status) *status = OK;
  return OK;
}

/* --- cuBLAS and cuDNN ----------------------------------------------------------------------- */

#define HANDLE(name) \
  int name(void **out) { return handle(out); }
#define COMPUTES(name) \
  int name(void) { return count(LIBRARY_CALLS, 1), OK; }
#define SUCCEEDS(name) \
  int name(void) { return OK; }

HANDLE(cublasCreate_v2)
HANDLE(cublasLtCreate)
HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate)
HANDLE(cublasLtMatrixLayoutCreate)
HANDLE(cublasLtMatrixTransformDescCreate)
COMPUTES(cublasLtMatmul)
COMPUTES(cublasLtMatrixTransform)
COMPUTES(cublasSgemm_v2)
COMPUTES(cublasDgemm_v2)
COMPUTES(cublasSgeam)
COMPUTES(cublasDgeam)
COMPUTES(cublasScopy_v2)
COMPUTES(cublasSscal_v2)
COMPUTES(cublasGemmEx)
COMPUTES(cublasGemmBatchedEx)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasSgemmBatched)
COMPUTES(cublasDgemmBatched)
COMPUTES(cublasSgemmStridedBatched)
COMPUTES(cublasDgemmStridedBatched)
int cublasGetMathMode(void *library, int *out) {
  (void)library;
  return *out = 0, OK;
}
const char *cublasGetStatusName(void) { return "status of the CUDA stub"; }
const char *cublasGetStatusString(void) { return "status of the CUDA stub"; }
int cublasLtMatmulAlgoGetHeuristic(void *library, void *operation, void *a, void *b, void *c,
                                   void *d, void *preference, int wanted, void *results,
                                   int *found) {
  (void)library, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
  memset(results, 0, wanted > 0 ? 96 : 0); /* sizeof(cublasLtMatmulHeuristicResult_t) */
  return *found = wanted > 0, OK;
}

HANDLE(cudnnCreate)
size_t cudnnGetVersion(void) { return 90000; } /* too old for cuDNN's attention */
const char *cudnnGetErrorString(void) { return "error of the CUDA stub"; }
void cudnnGetLastErrorString(char *out, size_t size) {
  if (size) *out = 0;
}
int cudnnBackendCreateDescriptor(int kind, void **out) {
  (void)kind;
  return handle(out);
}

SUCCEEDS(cudnnDestroy)
SUCCEEDS(cudnnSetStream)

/* stub.py writes SUCCEEDS(...) for every other symbol that the installed provider imports. */
#include "cuda_stub_rest.h"
