// libascendcl.so, second part: memory. "Device" memory is host memory, so a CPU tensor can look at it.
//
// Fresh memory is filled with POISON: a float32 nobody computed then reads -26711958, not a plausible 0. torch_npu's
// caching allocator hands memory out again without coming here, so a second use shows older values instead.
// Limits: one shared pool, no out-of-memory error short of the host's; virtual memory (expandable segments) is refused,
// which torch_npu answers by plain allocation.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "sim.h"

enum { ACL_OK = 0, ACL_BAD_PARAMETER = 107000, ACL_NOT_SUPPORTED = 207000, ACL_NO_MEMORY = 207001 };
enum { POISON = 0xCB, ALIGNMENT = 512 };

static size_t allocated;

int sim_element_size(int data_type) {
  static const int sizes[] = {
      [ACL_FLOAT] = 4, [ACL_FLOAT16] = 2, [ACL_INT8] = 1, [ACL_INT32] = 4, [ACL_UINT8] = 1, [ACL_INT16] = 2,
      [ACL_UINT16] = 2, [ACL_UINT32] = 4, [ACL_INT64] = 8, [ACL_UINT64] = 8, [ACL_DOUBLE] = 8, [ACL_BOOL] = 1,
      [ACL_COMPLEX64] = 8, [ACL_BF16] = 2};
  int known = sizeof sizes / sizeof *sizes;
  return data_type >= 0 && data_type < known ? sizes[data_type] : 0;
}

aclError aclrtMalloc(void **memory, size_t bytes, aclrtMemMallocPolicy policy) {
  bytes = bytes ? (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT : ALIGNMENT;
  if (posix_memalign(memory, ALIGNMENT, bytes)) return ACL_NO_MEMORY;
  memset(*memory, POISON, bytes);
  allocated += bytes;
  return ACL_OK;
}
aclError aclrtMallocAlign32(void **memory, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(memory, bytes, policy);
}
aclError aclrtFree(void *memory) {
  sim_run_all();
  free(memory);
  return ACL_OK;
}

// Pinned memory is remembered: a copy from it is not staged. It is poisoned when it is given back.
enum { MOST_BLOCKS = 4096 };
static struct { char *start; size_t bytes; } pinned[MOST_BLOCKS];
static pthread_mutex_t pinned_lock = PTHREAD_MUTEX_INITIALIZER;

static int block_of(const void *address) {
  for (int k = 0; k < MOST_BLOCKS; k++)
    if (pinned[k].start && (const char *)address >= pinned[k].start && (const char *)address < pinned[k].start + pinned[k].bytes)
      return k;
  return -1;
}
bool sim_is_pinned(const void *address) {
  pthread_mutex_lock(&pinned_lock);
  bool found = block_of(address) >= 0;
  pthread_mutex_unlock(&pinned_lock);
  return found;
}
aclError aclrtMallocHost(void **memory, size_t bytes) {
  bytes = bytes ? bytes : ALIGNMENT;
  if (posix_memalign(memory, 64, bytes)) return ACL_NO_MEMORY;
  memset(*memory, POISON, bytes);
  pthread_mutex_lock(&pinned_lock);
  int k = 0;
  while (k < MOST_BLOCKS && pinned[k].start) k++;
  if (k < MOST_BLOCKS) pinned[k].start = *memory, pinned[k].bytes = bytes;
  pthread_mutex_unlock(&pinned_lock);
  return ACL_OK;
}
aclError aclrtFreeHost(void *memory) {
  pthread_mutex_lock(&pinned_lock);
  int k = block_of(memory);
  if (k >= 0) {
    memset(memory, POISON, pinned[k].bytes);
    pinned[k].start = NULL;
  }
  pthread_mutex_unlock(&pinned_lock);
  sim_run_all();
  free(memory);
  return ACL_OK;
}

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind) {
  if (bytes > room) return ACL_BAD_PARAMETER;
  if (kind == ACL_MEMCPY_DEVICE_TO_HOST) sim_count(SIM_COPIES_TO_HOST);
  sim_run_all();
  memmove(to, from, bytes);
  return ACL_OK;
}
aclError aclrtMemset(void *memory, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return ACL_BAD_PARAMETER;
  sim_run_all();
  memset(memory, value, bytes);
  return ACL_OK;
}
aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *left, size_t *total) {
  *total = (size_t)32 << 30;
  *left = allocated < *total ? *total - allocated : 0;  // never given back: aclrtFree is not told the size
  return ACL_OK;
}
aclError aclrtPointerGetAttributes(const void *pointer, aclrtPtrAttributes *attributes) {
  memset(attributes, 0, sizeof *attributes);
  return ACL_OK;
}

// ---- virtual and shared memory: not there

aclError aclrtReserveMemAddress(void **v, size_t n, size_t a, void *e, uint64_t f) { return ACL_NOT_SUPPORTED; }
aclError aclrtReleaseMemAddress(void *v) { return ACL_OK; }
aclError aclrtMallocPhysical(aclrtDrvMemHandle *h, size_t n, const aclrtPhysicalMemProp *p, uint64_t f) {
  return ACL_NOT_SUPPORTED;
}
aclError aclrtFreePhysical(aclrtDrvMemHandle h) { return ACL_OK; }
aclError aclrtMapMem(void *v, size_t n, size_t o, aclrtDrvMemHandle h, uint64_t f) { return ACL_NOT_SUPPORTED; }
aclError aclrtUnmapMem(void *v) { return ACL_OK; }
aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle h, aclrtMemHandleType t, uint64_t f, uint64_t *s) {
  return ACL_NOT_SUPPORTED;
}
aclError aclrtMemImportFromShareableHandle(uint64_t s, int32_t d, aclrtDrvMemHandle *h) { return ACL_NOT_SUPPORTED; }
aclError aclrtMemSetPidToShareableHandle(uint64_t s, int32_t *p, size_t n) { return ACL_NOT_SUPPORTED; }
