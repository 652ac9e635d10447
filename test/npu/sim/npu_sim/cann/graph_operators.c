// libascendcl.so, third part: graph-compiled operators ("aclop"), the older of torch_npu's two ways to an operator and
// the only one for some operators and for most on 910A.
//
// An operator arrives as a name, descriptors and buffers. Almost all compute nothing: npu_sim/kernels.py writes their
// results afterwards. Computed here is what torch_npu's C++ calls and reads past the dispatcher, where no Python sees
// it: the overflow flag, and zero padding (ProcessGroupHCCL's all_gather).
// Limit: attributes are accepted and forgotten.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "sim.h"

enum { ACL_OK = 0, MAX_DIMS = 16, STATUS_SIZE = 8 };

// ---- descriptors, buffers, attributes

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  int dims;
  int64_t sizes[MAX_DIMS];
};
struct aclDataBuffer { void *data; };
struct aclopAttr { char nothing; };

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int dims, const int64_t *sizes, aclFormat format) {
  aclTensorDesc *desc = calloc(1, sizeof *desc);
  if (type == ACL_DOUBLE) sim_count(SIM_FLOAT64);
  desc->type = type;
  desc->format = format;
  desc->dims = dims;
  for (int d = 0; d < dims && d < MAX_DIMS; d++) desc->sizes[d] = sizes[d];
  return desc;
}
void aclDestroyTensorDesc(const aclTensorDesc *desc) { free((void *)desc); }
aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t dim, int64_t *size) {
  *size = desc->sizes[dim];
  return ACL_OK;
}
aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc *desc) { return desc->dims; }
aclDataType aclGetTensorDescType(const aclTensorDesc *desc) { return desc->type; }
void aclSetTensorDescName(aclTensorDesc *desc, const char *name) {}
aclError aclSetTensorFormat(aclTensorDesc *desc, aclFormat format) { return ACL_OK; }
aclError aclSetTensorPlaceMent(aclTensorDesc *desc, aclMemType place) { return ACL_OK; }
aclError aclSetTensorShape(aclTensorDesc *desc, int dims, const int64_t *sizes) { return ACL_OK; }

aclDataBuffer *aclCreateDataBuffer(void *data, size_t bytes) {
  aclDataBuffer *buffer = malloc(sizeof *buffer);
  buffer->data = data;
  return buffer;
}
aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
  free((void *)buffer);
  return ACL_OK;
}

aclopAttr *aclopCreateAttr(void) { return calloc(1, sizeof(aclopAttr)); }
void aclopDestroyAttr(const aclopAttr *attr) { free((void *)attr); }
aclError aclopSetAttrBool(aclopAttr *a, const char *name, uint8_t v) { return ACL_OK; }
aclError aclopSetAttrDataType(aclopAttr *a, const char *name, aclDataType v) { return ACL_OK; }
aclError aclopSetAttrFloat(aclopAttr *a, const char *name, float v) { return ACL_OK; }
aclError aclopSetAttrInt(aclopAttr *a, const char *name, int64_t v) { return ACL_OK; }
aclError aclopSetAttrString(aclopAttr *a, const char *name, const char *v) { return ACL_OK; }
aclError aclopSetAttrListBool(aclopAttr *a, const char *name, int n, const uint8_t *v) { return ACL_OK; }
aclError aclopSetAttrListFloat(aclopAttr *a, const char *name, int n, const float *v) { return ACL_OK; }
aclError aclopSetAttrListInt(aclopAttr *a, const char *name, int n, const int64_t *v) { return ACL_OK; }
aclError aclopSetAttrListListInt(aclopAttr *a, const char *name, int n, const int *lengths, const int64_t *const v[]) {
  return ACL_OK;
}
aclError aclSetCompileopt(aclCompileOpt option, const char *value) { return ACL_OK; }
size_t aclGetCompileoptSize(aclCompileOpt option) { return 16; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t room) {
  if (room) value[0] = 0;
  return ACL_OK;
}

// ---- the operators that compute

typedef const aclTensorDesc *const Descs[];
typedef const aclDataBuffer *const Buffers[];

// PadV3(input, pads) -> output: zeros around a contiguous tensor; pads holds (before, after) for each dimension.
static void pad_with_zeros(Descs in, Buffers in_data, Descs out, Buffers out_data) {
  int size = sim_element_size(in[0]->type), dims = out[0]->dims;
  int64_t elements = 1, index[MAX_DIMS] = {0};
  for (int d = 0; d < dims; d++) elements *= out[0]->sizes[d];
  for (int64_t k = 0; k < elements; k++) {
    int64_t source = 0;
    bool inside = true;
    for (int d = 0; d < dims; d++) {
      int64_t before = in[1]->type == ACL_INT64 ? ((int64_t *)in_data[1]->data)[2 * d]
                                                : ((int32_t *)in_data[1]->data)[2 * d];
      int64_t position = index[d] - before;
      inside = inside && position >= 0 && position < in[0]->sizes[d];
      source = source * in[0]->sizes[d] + position;
    }
    char *to = (char *)out_data[0]->data + k * size;
    if (inside) memcpy(to, (char *)in_data[0]->data + source * size, size);
    else memset(to, 0, size);
    for (int d = dims - 1; d >= 0 && ++index[d] == out[0]->sizes[d]; d--) index[d] = 0;
  }
}

static aclError run(const char *name, int inputs, Descs in, Buffers in_data, int outputs, Descs out, Buffers out_data) {
  int device = sim_current_device();
  for (int k = outputs - 1; k >= 0; k--) sim_describe(out[k]->type);
  for (int k = inputs - 1; k >= 0; k--) sim_describe(in[k]->type);
  sim_launch("aclop", name);
  if (strstr(name, "FloatStatus")) sim_run_all();
  if (!strcmp(name, "PadV3") && inputs >= 2 && !sim_is_lazy()) {
    pad_with_zeros(in, in_data, out, out_data);
  } else if (!strcmp(name, "NPUGetFloatStatus") && inputs) {
    // Writes the flag into its input: torch_npu returns that tensor and drops the output.
    for (int k = 0; k < STATUS_SIZE; k++) ((float *)in_data[0]->data)[k] = sim_overflow(device);
  } else if (!strcmp(name, "NPUGetFloatStatusV2") && outputs) {
    for (int k = 0; k < STATUS_SIZE; k++) ((int32_t *)out_data[0]->data)[k] = sim_overflow(device);
  } else if (!strcmp(name, "NPUClearFloatStatus") || !strcmp(name, "NPUClearFloatStatusV2")) {
    sim_set_overflow(device, false);
    if (outputs) memset(out_data[0]->data, 0, STATUS_SIZE * sizeof(float));
  }
  return ACL_OK;
}

aclError aclopCompileAndExecute(const char *name, int inputs, Descs in, Buffers in_data, int outputs, Descs out,
                                aclDataBuffer *const out_data[], const aclopAttr *attr, aclopEngineType engine,
                                aclopCompileType compile, const char *path, aclrtStream stream) {
  return run(name, inputs, in, in_data, outputs, out, (const aclDataBuffer *const *)out_data);
}
// The variant torch_npu uses where it must know the result's shape before it goes on (NonZero, MaskedSelect, Unique): the
// host waits inside. (The shape is not computed here; npu_sim/kernels.py replaces the result.)
aclError aclopCompileAndExecuteV2(const char *name, int inputs, aclTensorDesc *in[], aclDataBuffer *in_data[],
                                  int outputs, aclTensorDesc *out[], aclDataBuffer *out_data[], aclopAttr *attr,
                                  aclopEngineType engine, aclopCompileType compile, const char *path,
                                  aclrtStream stream) {
  sim_count(SIM_WAITS);
  return run(name, inputs, (const aclTensorDesc *const *)in, (const aclDataBuffer *const *)in_data, outputs,
             (const aclTensorDesc *const *)out, (const aclDataBuffer *const *)out_data);
}
