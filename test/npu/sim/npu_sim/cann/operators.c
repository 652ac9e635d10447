// libopapi.so: single operators ("aclnn"), the newer of torch_npu's two ways to an operator.
//
// build.py appends one empty operator for every aclnn name that occurs in libtorch_npu.so, so all of them exist here,
// whatever a real CANN version has (chips.yaml knows more); their results are written afterwards by npu_sim/kernels.py. Computed here is only
// constant padding with zeros, which ProcessGroupHCCL's C++ calls past the dispatcher (all_gather of unequal sizes).
// No ACL header declares these in a form that C reads, so the signatures below are by hand.
#include <stdlib.h>
#include <string.h>

#include "sim.h"

enum { OK = 0, UNSUPPORTED_TYPE = 161002, MAX_DIMS = 8, FLOAT64 = 11 };

// ---- arguments of operators

typedef struct {
  int64_t dims, sizes[MAX_DIMS], strides[MAX_DIMS], offset;
  int type;
  char *data;
} Tensor;
typedef struct {
  uint64_t count;
  int64_t values[2 * MAX_DIMS];
} IntArray;

static int64_t bytes_of(const Tensor *tensor) {
  int64_t bytes = sim_element_size(tensor->type);
  for (int64_t d = 0; d < tensor->dims; d++) bytes *= tensor->sizes[d];
  return bytes;
}
static bool is_contiguous(const Tensor *tensor) {
  int64_t stride = 1;
  for (int64_t d = tensor->dims - 1; d >= 0; stride *= tensor->sizes[d--])
    if (tensor->sizes[d] > 1 && tensor->strides[d] != stride) return false;
  return true;
}

void *aclCreateTensor(const int64_t *sizes, uint64_t dims, int type, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage_sizes, uint64_t storage_dims, void *data) {
  Tensor *tensor = calloc(1, sizeof *tensor);
  if (type == FLOAT64) sim_count(SIM_FLOAT64);
  tensor->dims = dims < MAX_DIMS ? dims : MAX_DIMS;
  for (int64_t d = 0; d < tensor->dims; d++) tensor->sizes[d] = sizes[d], tensor->strides[d] = strides[d];
  tensor->offset = offset;
  tensor->type = type;
  tensor->data = data;
  sim_describe(type);
  if (!is_contiguous(tensor)) sim_copies(bytes_of(tensor));
  return tensor;
}
void *aclCreateIntArray(const int64_t *values, uint64_t count) {
  IntArray *array = calloc(1, sizeof *array);
  array->count = count < 2 * MAX_DIMS ? count : 2 * MAX_DIMS;
  memcpy(array->values, values, array->count * sizeof *values);
  return array;
}
// Nobody here reads these; torch_npu only wants a handle to destroy.
static void *handle(void) { return calloc(1, 16); }
void *aclCreateScalar(void *value, int type) { return handle(); }
void *aclCreateFloatArray(const float *values, uint64_t count) { return handle(); }
void *aclCreateBoolArray(const char *values, uint64_t count) { return handle(); }
void *aclCreateTensorList(void *const *tensors, uint64_t count) { return handle(); }
void *aclCreateScalarList(void *const *scalars, uint64_t count) { return handle(); }

static int destroy(void *argument) {
  free(argument);
  return OK;
}
int aclDestroyTensor(void *argument) { return destroy(argument); }
int aclDestroyScalar(void *argument) { return destroy(argument); }
int aclDestroyIntArray(void *argument) { return destroy(argument); }
int aclDestroyFloatArray(void *argument) { return destroy(argument); }
int aclDestroyBoolArray(void *argument) { return destroy(argument); }
int aclDestroyTensorList(void *argument) { return destroy(argument); }
int aclDestroyScalarList(void *argument) { return destroy(argument); }
int aclDestroyAclOpExecutor(void *executor) { return OK; }

// Asked after operators whose output shape depends on values (nonzero): the allocated, largest shape is the answer here,
// npu_sim/kernels.py replaces the tensor by one of the right size.
int aclGetViewShape(Tensor *tensor, int64_t **sizes, uint64_t *dims) {
  *dims = tensor->dims;
  *sizes = malloc(sizeof(int64_t) * (tensor->dims + 1));
  memcpy(*sizes, tensor->sizes, sizeof(int64_t) * tensor->dims);
  return OK;
}

// ---- gathers and scatters

// Along another axis than the last, CANN transposes the tensors before its kernel and the result after it; not on 950.
// Gathers on A2 and A3 do without where the axis is long and so is what follows it.
// Source: hicann/ops-nn, aclnn_gather.cpp (CalGather, IfUseGatherElementsV2, MemCheck) and aclnn_scatter.cpp
// (ExecScatterBase). Limit: scatters of SupportNoTranspose, which depend on the kernel's tiling, count as transposed.
enum { SHORT_AXIS = 16, SHORT_REST = 32, LARGEST_AXIS_BYTES = 120000 };

static bool gathers_in_place(const Tensor *self, int64_t dim, const Tensor *index) {
  const char *soc = getenv("NPU_SIM_SOC");
  int64_t rest = 1;
  for (int64_t d = dim + 1; d < self->dims; d++) rest *= self->sizes[d];
  for (int64_t d = 1; d < self->dims; d++)
    if (d != dim && d != dim + 1 && self->sizes[d] != index->sizes[d]) return false;
  return soc && strcmp(soc, "Ascend910A") && index->sizes[dim] >= SHORT_AXIS && self->sizes[dim] >= SHORT_AXIS &&
         rest > SHORT_REST && self->sizes[dim] * sim_element_size(self->type) < LARGEST_AXIS_BYTES;
}
static int along_axis(const Tensor *self, int64_t dim, const Tensor *index, bool gather) {
  const char *soc = getenv("NPU_SIM_SOC");
  if (dim < 0) dim += self->dims;
  if (dim < 0 || dim >= self->dims - 1 || (soc && !strncmp(soc, "Ascend950", 9))) return OK;
  if (gather && gathers_in_place(self, dim, index)) return OK;
  int64_t moved = bytes_of(index) / sim_element_size(index->type) * sim_element_size(self->type);
  sim_copies(bytes_of(index) + moved + bytes_of(self) * (gather ? 1 : 2));
  return OK;
}
#define ALONG_AXIS(name, gather)                                                                                     \
  int name##GetWorkspaceSize(Tensor *self, int64_t dim, Tensor *index) { return along_axis(self, dim, index, gather); } \
  int name(void *workspace, uint64_t bytes, void *executor, void *stream) {                                          \
    sim_launch("aclnn", #name);                                                                                      \
    return OK;                                                                                                       \
  }
ALONG_AXIS(aclnnGather, true)
ALONG_AXIS(aclnnScatter, false)
ALONG_AXIS(aclnnScatterAdd, false)
ALONG_AXIS(aclnnScatterValue, false)
ALONG_AXIS(aclnnInplaceScatter, false)
ALONG_AXIS(aclnnInplaceScatterValue, false)

// ---- constant padding

typedef struct {
  Tensor in, out;
  int64_t before[MAX_DIMS];
} Padding;

int aclnnConstantPadNdGetWorkspaceSize(Tensor *in, IntArray *pads, void *value, Tensor *out, uint64_t *workspace,
                                       void **executor) {
  Padding *padding = calloc(1, sizeof *padding);
  padding->in = *in;
  padding->out = *out;
  for (uint64_t k = 0; k < pads->count / 2; k++) padding->before[in->dims - 1 - k] = pads->values[2 * k];
  *workspace = 0;
  *executor = padding;
  return OK;
}
static void pad(void *executor) {
  Padding *padding = executor;
  Tensor *in = &padding->in, *out = &padding->out;
  int size = sim_element_size(out->type);
  int64_t elements = 1, index[MAX_DIMS] = {0};
  for (int d = 0; d < out->dims; d++) elements *= out->sizes[d];
  for (int64_t k = 0; k < elements; k++) {
    int64_t from = in->offset, to = out->offset;
    bool inside = true;
    for (int d = 0; d < out->dims; d++) {
      int64_t position = index[d] - padding->before[d];
      inside = inside && position >= 0 && position < in->sizes[d];
      from += position * in->strides[d];
      to += index[d] * out->strides[d];
    }
    if (inside) memcpy(out->data + to * size, in->data + from * size, size);
    else memset(out->data + to * size, 0, size);
    for (int d = out->dims - 1; d >= 0 && ++index[d] == out->sizes[d]; d--) index[d] = 0;
  }
  free(padding);
}
int aclnnConstantPadNd(void *workspace, uint64_t bytes, void *executor, void *stream) {
  sim_launch("aclnn", "aclnnConstantPadNd");
  if (!sim_element_size(((Padding *)executor)->out.type)) return UNSUPPORTED_TYPE;
  sim_call(stream, pad, executor);
  return OK;
}
