/* A CUDA card that computes nothing: preloaded before torch built for CUDA, it takes the place of the CUDA runtime, of
 * cuBLAS and of the few functions of the driver that torch asks for by name. torch's own code then runs as on a card:
 * its caching allocator, its streams and events, its pinned memory, and all that its and bitsandbytes' kernels do on
 * the host, such as the memory that they take. Kernels are counted, not run.
 *
 * Memory of the card is address space of the host that is never written: copies to it are dropped, and what is read
 * from it is zero. Copies and events are over at once. The size of the card comes from the environment; a tool asks
 * for counts with the function at the end. CARD_COUNT cards, one if it is not set, each have memory of that size and
 * a default stream. No more host memory can be pinned in one piece than CARD_PINNED_BYTES, where it is set. runtime.py
 * builds and preloads it, with a function that returns 0 for every other name that torch and triton need from these
 * libraries.
 *
 * A tool can have it compute: computing.py gives it work in the place of kernels. Then copies are made, and
 * both wait in the queues of their streams.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#undef cudaGetDeviceProperties

static const size_t PAGE = 4096;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
enum { MOST_CARDS = 8 };
static size_t total_bytes, used_bytes[MOST_CARDS], largest_pinned_bytes;
static int major, minor, cards;
static __thread int current; /* the number of the card that a thread has chosen */
static long launches, waits, allocations, pinned, managed_bytes;

__attribute__((constructor)) static void begin(void) {
    const char *memory = getenv("CARD_BYTES"), *capability = getenv("CARD_CAPABILITY"), *count = getenv("CARD_COUNT");
    const char *pinned_bytes = getenv("CARD_PINNED_BYTES");
    largest_pinned_bytes = pinned_bytes ? strtoull(pinned_bytes, NULL, 10) : (size_t)-1;
    total_bytes = memory ? strtoull(memory, NULL, 10) : (size_t)80 << 30;
    cards = count ? atoi(count) : 1;
    if (cards > MOST_CARDS) abort();
    major = capability ? atoi(capability) / 10 : 8;
    minor = capability ? atoi(capability) % 10 : 6; /* one that torch is built for: else a few of its kernels fail */
}

/* ---- Memory: a table of what was handed out, by address. ---- */

struct Range {
    char *start;
    size_t size;
    enum cudaMemoryType type;
    int card;
    struct Range *next;
};
static struct Range *ranges[4096];

static struct Range **bucket(const void *start) { return &ranges[((size_t)start >> 12) % 4096]; }

static void *reserve(size_t size) {
    void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

/* Counts bytes of a card as used; 0 where there are not as many. */
static int use(size_t size, int card) {
    pthread_mutex_lock(&lock);
    int fits = used_bytes[card] + size <= total_bytes;
    if (fits) {
        used_bytes[card] += size;
        allocations++;
    }
    pthread_mutex_unlock(&lock);
    return fits;
}

static void unuse(size_t size, int card) {
    pthread_mutex_lock(&lock);
    used_bytes[card] -= size;
    pthread_mutex_unlock(&lock);
}

static __thread cudaError_t last_error;

static cudaError_t failed(cudaError_t error) {
    last_error = error;
    return error;
}

/* As seen with torch on Windows, the error stays for the next kernel although torch has asked for it once. */
static __thread int stays;

static cudaError_t not_pinned(void) {
    stays = 1;
    return failed(cudaErrorMemoryAllocation);
}

static cudaError_t hand_out(void **start, size_t size, enum cudaMemoryType type) {
    size = (size + PAGE - 1) / PAGE * PAGE + (size ? 0 : PAGE);
    if (type == cudaMemoryTypeDevice && !use(size, current)) return failed(cudaErrorMemoryAllocation);
    if (type == cudaMemoryTypeHost && size > largest_pinned_bytes) return not_pinned();
    *start = reserve(size);
    struct Range *range = malloc(sizeof *range);
    pthread_mutex_lock(&lock);
    *range = (struct Range){*start, size, type, current, *bucket(*start)};
    *bucket(*start) = range;
    pinned += type == cudaMemoryTypeHost;
    managed_bytes += type == cudaMemoryTypeManaged ? size : 0;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

static void run_all(void);

static cudaError_t take_back(void *start) {
    if (!start) return cudaSuccess;
    run_all(); /* what is freed is free at once, so it waits for all */
    pthread_mutex_lock(&lock);
    struct Range **link = bucket(start), *range = NULL;
    while (*link && (*link)->start != start) link = &(*link)->next;
    if ((range = *link)) *link = range->next;
    pthread_mutex_unlock(&lock);
    if (!range) return failed(cudaErrorInvalidValue);
    if (range->type == cudaMemoryTypeDevice) unuse(range->size, range->card);
    munmap(range->start, range->size);
    free(range);
    return cudaSuccess;
}

static enum cudaMemoryType find(const void *place, int *card) {
    enum cudaMemoryType found = cudaMemoryTypeUnregistered;
    pthread_mutex_lock(&lock);
    for (int number = 0; number < 4096; number++)
        for (struct Range *range = ranges[number]; range; range = range->next)
            if ((char *)place >= range->start && (char *)place < range->start + range->size)
                found = range->type, *card = range->card;
    pthread_mutex_unlock(&lock);
    return found;
}
static enum cudaMemoryType type_of(const void *place) {
    int card;
    return find(place, &card);
}

cudaError_t cudaMalloc(void **start, size_t size) { return hand_out(start, size, cudaMemoryTypeDevice); }
cudaError_t cudaFree(void *start) { return take_back(start); }
cudaError_t cudaHostAlloc(void **start, size_t size, unsigned flags) {
    return hand_out(start, size, cudaMemoryTypeHost);
}
cudaError_t cudaFreeHost(void *start) { return take_back(start); }
cudaError_t cudaMallocManaged(void **start, size_t size, unsigned flags) {
    return hand_out(start, size, cudaMemoryTypeManaged);
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all_bytes) {
    *free_bytes = total_bytes - used_bytes[current];
    *all_bytes = total_bytes;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *place) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = find(place, &attributes->device);
    attributes->devicePointer = attributes->type == cudaMemoryTypeUnregistered ? NULL : (void *)place;
    attributes->hostPointer = attributes->type == cudaMemoryTypeDevice ? NULL : (void *)place;
    return cudaSuccess;
}

/* Expandable segments: addresses are reserved first, and memory is counted when it is made. */
CUresult cuMemAddressReserve(
    CUdeviceptr *start, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags
) {
    *start = (CUdeviceptr)reserve(size);
    return *start ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
CUresult cuMemAddressFree(CUdeviceptr start, size_t size) {
    return munmap((void *)start, size) ? CUDA_ERROR_INVALID_VALUE : 0;
}
CUresult cuMemCreate(
    CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *properties, unsigned long long flags
) {
    int card = properties->location.id;
    if (!use(size, card)) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = size + card; /* sizes are whole granules */
    return CUDA_SUCCESS;
}
CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
    unuse(handle - handle % MOST_CARDS, handle % MOST_CARDS);
    return CUDA_SUCCESS;
}
CUresult cuMemMap(
    CUdeviceptr start, size_t size, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags
) {
    return CUDA_SUCCESS;
}
CUresult cuMemUnmap(CUdeviceptr start, size_t size) { return CUDA_SUCCESS; }
CUresult cuMemSetAccess(CUdeviceptr start, size_t size, const CUmemAccessDesc *access, size_t count) {
    return CUDA_SUCCESS;
}

static void *name(void) {
    static size_t names = 0;
    return (void *)(__sync_add_and_fetch(&names, 1) * 16);
}

/* ---- Streams and events. On a card that computes, each stream has a queue; else everything is over at once.

   What lies in a queue is done in the order of its stream, after what it was told to wait for, and at the latest when
   the host waits for it. How much sooner is up to a card, so there are several orders. ---- */

enum Kind { WORK, COPY, FILL, RECORD, WAIT };
enum Order { LATE, DEFAULT_FIRST, OTHERS_FIRST, BY_CHANCE }; /* which streams are worked off as soon as they may be */

struct Event {
    long recorded, done; /* how often: a wait is for the last record before it */
    struct Stream *stream;
};
struct Item {
    enum Kind kind;
    long number; /* of the work, of an event's record, or the byte to fill with */
    struct Event *event;
    struct Stream *stream; /* in which the event was recorded */
    char *target;
    const char *source;
    size_t size;
    int owned; /* the source is a copy of memory that is not pinned, made when it was asked for */
    struct Item *next;
};
struct Stream {
    void *name;
    struct Item *first, *last;
    int busy;
};
static struct Stream streams[256];
static int stream_count;
static void (*run_work)(long); /* what a card that computes calls for each work, by its number */
static enum Order order;
static unsigned chance;
static pthread_mutex_t working = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP; /* one thread at a time does what is queued */
static __thread int quiet; /* copies and fills of this thread are part of a work: not done by themselves */

static void run_event(struct Event *event, struct Stream *stream, long number);

static struct Stream *stream_of(void *name) {
    if (!name) name = (void *)(size_t)current; /* the default stream of the card: others' names are multiples of 16 */
    pthread_mutex_lock(&lock);
    int number = 0;
    while (number < stream_count && streams[number].name != name) number++;
    if (number == stream_count) {
        if (number == sizeof streams / sizeof *streams) abort();
        streams[stream_count++].name = name;
    }
    pthread_mutex_unlock(&lock);
    return &streams[number];
}

static void run_one(struct Stream *stream) {
    struct Item *item = stream->first;
    if (stream->busy++) abort(); /* an event that waits for itself */
    switch (item->kind) {
    case WORK: run_work(item->number); break;
    case COPY: memmove(item->target, item->source, item->size); break;
    case FILL: memset(item->target, item->number, item->size); break;
    case RECORD:
        if (item->event->done < item->number) item->event->done = item->number;
        break;
    case WAIT: run_event(item->event, item->stream, item->number); break;
    }
    pthread_mutex_lock(&lock);
    stream->first = item->next;
    if (!item->next) stream->last = NULL;
    pthread_mutex_unlock(&lock);
    stream->busy--;
    if (item->owned) free((void *)item->source);
    free(item);
}

static void run_event(struct Event *event, struct Stream *stream, long number) {
    pthread_mutex_lock(&working);
    while (event->done < number) run_one(stream);
    pthread_mutex_unlock(&working);
}

static void run_stream(struct Stream *stream) {
    pthread_mutex_lock(&working);
    while (stream->first) run_one(stream);
    pthread_mutex_unlock(&working);
}

static void run_all(void) {
    for (int number = 0; number < stream_count; number++) run_stream(&streams[number]);
}

static void enqueue(void *name, struct Item item) {
    struct Stream *stream = stream_of(name);
    struct Item *kept = malloc(sizeof *kept);
    *kept = item;
    pthread_mutex_lock(&lock);
    if (stream->last) stream->last->next = kept;
    else stream->first = kept;
    stream->last = kept;
    pthread_mutex_unlock(&lock);
    if (pthread_mutex_trylock(&working)) return; /* another thread is at it, which may need what this one holds */
    if (order == (stream->name < (void *)MOST_CARDS ? DEFAULT_FIRST : OTHERS_FIRST)) run_stream(stream);
    if (order == BY_CHANCE) {
        static int favoured, left;
        if (--left < 0) favoured = rand_r(&chance) % (stream_count + 1), left = rand_r(&chance) % 100;
        if (favoured < stream_count && !streams[favoured].busy) run_stream(&streams[favoured]);
    }
    pthread_mutex_unlock(&working);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return *stream = name(), cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    waits++;
    run_stream(stream_of(stream));
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return stream_of(stream)->first ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    waits++;
    run_all();
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    return *event = calloc(1, sizeof(struct Event)), cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t name, cudaStream_t stream, unsigned flags) {
    struct Event *event = (struct Event *)name;
    event->stream = stream_of(stream);
    event->recorded++;
    if (run_work) enqueue(stream, (struct Item){.kind = RECORD, .event = event, .number = event->recorded});
    else event->done = event->recorded;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t name, unsigned flags) {
    struct Event *event = (struct Event *)name;
    if (event->done < event->recorded)
        enqueue(stream, (struct Item){.kind = WAIT, .event = event, .stream = event->stream, .number = event->recorded});
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t name) {
    struct Event *event = (struct Event *)name;
    return event->done < event->recorded ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t name) {
    struct Event *event = (struct Event *)name;
    waits++;
    run_event(event, event->stream, event->recorded);
    return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    return *milliseconds = 0, cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    run_stream(stream_of(stream));
    return function(argument), cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *number, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count
) {
    return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}

/* What a tool asks of a card that computes. */
void card_compute(void (*run)(long), int chosen, unsigned seed) { run_work = run, order = chosen, chance = seed; }
void card_work(void *stream, long number) { enqueue(stream, (struct Item){.kind = WORK, .number = number}); }
void card_quiet(int on) { quiet = on; }

/* ---- Copies. Without a queue, from the card come zeros, to it goes nothing. ---- */

cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream
) {
    if (!run_work) {
        if (kind == cudaMemcpyDeviceToHost && size <= 1 << 20) memset(target, 0, size); /* more is put off, not read */
        if (kind == cudaMemcpyHostToHost) memmove(target, source, size);
        return cudaSuccess;
    }
    if (quiet) return cudaSuccess;
    int owned = kind == cudaMemcpyHostToDevice && type_of(source) == cudaMemoryTypeUnregistered;
    if (owned) source = memcpy(malloc(size), source, size);
    enqueue(stream, (struct Item){.kind = COPY, .target = target, .source = source, .size = size, .owned = owned});
    if (kind == cudaMemcpyDeviceToHost && type_of(target) == cudaMemoryTypeUnregistered) run_stream(stream_of(stream));
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    waits++;
    cudaMemcpyAsync(target, source, size, kind, NULL);
    run_all();
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *start, int value, size_t size, cudaStream_t stream) {
    if (run_work && !quiet)
        enqueue(stream, (struct Item){.kind = FILL, .target = start, .number = value, .size = size});
    return cudaSuccess;
}
cudaError_t cudaMemset(void *start, int value, size_t size) {
    cudaMemsetAsync(start, value, size, NULL);
    run_all();
    return cudaSuccess;
}

/* ---- The device. ---- */

cudaError_t cudaGetDeviceCount(int *count) { return *count = cards, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cards) return failed(cudaErrorInvalidDevice);
    return current = device, cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = "a card that computes nothing", .totalGlobalMem = total_bytes, .major = major, .minor = minor,
        .multiProcessorCount = 128, .warpSize = 32, .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 1536, .maxBlocksPerMultiProcessor = 24, .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535}, .sharedMemPerBlock = 48 << 10, .sharedMemPerBlockOptin = 99 << 10,
        .sharedMemPerMultiprocessor = 100 << 10, .reservedSharedMemPerBlock = 1 << 10, .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536, .totalConstMem = 64 << 10, .memPitch = 2147483647, .textureAlignment = 512,
        .l2CacheSize = 48 << 20, .memoryBusWidth = 384, .asyncEngineCount = 2, .concurrentKernels = 1,
        .unifiedAddressing = 1, .canMapHostMemory = 1, .managedMemory = 1, .concurrentManagedAccess = 1,
        .cooperativeLaunch = 1, .streamPrioritiesSupported = 1, .memoryPoolsSupported = 1,
    };
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp all;
    cudaGetDeviceProperties(&all, device);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = all.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = all.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = all.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = all.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = all.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxGridDimX: *value = all.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = all.maxGridSize[1]; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = all.maxThreadsDim[0]; break;
    case cudaDevAttrWarpSize: *value = all.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = all.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = all.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = all.minor; break;
    case cudaDevAttrManagedMemory: case cudaDevAttrConcurrentManagedAccess: *value = 1; break;
    case cudaDevAttrUnifiedAddressing: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) { /* the same numbers */
    return cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -5, cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *name, int size, int device) {
    return snprintf(name, size, "0000:%02d:00.0", device + 1), cudaSuccess;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    if (!stays) last_error = cudaSuccess;
    stays = 0;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "another";
}
const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "another error";
}
CUresult cuGetErrorString(CUresult error, const char **words) {
    *words = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "another error";
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)ranges, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(
    size_t *granularity, const CUmemAllocationProp *properties, CUmemAllocationGranularity_flags option
) {
    return *granularity = 2 << 20, CUDA_SUCCESS;
}

/* ---- Kernels. A launch begins by pushing its shape; what that returns tells whether to go on. ---- */

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) { return launches++, 1; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *shape, const void *kernel, void **arguments) {
    return launches++, cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 32, .maxDynamicSharedSizeBytes = 99 << 10,
        .ptxVersion = major * 10 + minor, .binaryVersion = major * 10 + minor,
    };
    return cudaSuccess;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
    return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *shape, CUfunction kernel, void **arguments, void **more) {
    return launches++, CUDA_SUCCESS;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int threads, size_t shared, unsigned flags
) {
    return *blocks = 1, cudaSuccess;
}
int cublasCreate_v2(void **handle) { return *handle = name(), 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { return *made = name(), 0; }
int cublasLtMatmulPreferenceCreate(void **made) { return *made = name(), 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long rows, unsigned long columns, long step) {
    return *made = name(), 0;
}
int cublasLtMatmulAlgoGetHeuristic(
    void *handle, void *product, void *a, void *b, void *c, void *d, void *preference, int wanted, void *found,
    int *count
) {
    return *count = 1, 0;
}

/* ---- Functions of the driver by name. ---- */

static CUresult not_there(void) { return CUDA_ERROR_NOT_SUPPORTED; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *symbol, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result
) {
    void *found = dlsym(RTLD_DEFAULT, symbol);
    *function = found ? found : (void *)not_there;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- What a tool asks: launches, waits of the host, allocations on the card and of pinned memory so far, and bytes
   of managed memory. ---- */

void card_counts(long *counts) {
    counts[0] = launches;
    counts[1] = waits;
    counts[2] = allocations;
    counts[3] = pinned;
    counts[4] = managed_bytes;
}
