// libascendcl.so, first part: devices, counters, and what CANN says about itself.
//
// Stands for an Ascend runtime whose "device" is this process. Waiting is free here, but it is counted. The number of devices and the chip's name come
// from NPU_SIM_DEVICES and NPU_SIM_SOC.
// Compiled against the ACL headers inside the torch_npu wheel, so that the compiler checks the signatures.
// Limits: no errors of the device; all devices share the host's memory.
#define _GNU_SOURCE
#include <ctype.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "acl/acl.h"
#include "sim.h"

enum { ACL_OK = 0, ACL_BAD_DEVICE = 107001, ACL_NO_CONTEXT = 107002, MAX_DEVICES = 64 };

// ---- counters and log

static __thread long counters[SIM_COUNTERS];

void sim_count(enum sim_counter counter) { counters[counter]++; }
long sim_counted(int counter) { return counters[counter]; }

void sim_log(const char *kind, const char *name) {
  const char *wanted = getenv("NPU_SIM_LOG");
  if (wanted && atoi(wanted)) fprintf(stderr, "[npu_sim] %s %s\n", kind, name);
}

// ---- launches

// A launch is a row of this table: the operator with the dtypes of its tensors. Operators of one thread are prepared and
// started one after another, so the tensors that torch_npu described since the last launch are this launch's.
enum { MOST_ROWS = 4096, SIGNATURE = 192, LONGEST_LIST = 6 };
static pthread_mutex_t launches_lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char *name; long count, copied; } launches[MOST_ROWS];
static __thread char signature[SIGNATURE];
static __thread long copied;

// torch_npu describes an operator's tensors from the last to the first. A list of many is named by its first few.
void sim_describe(int data_type) {
  char rest[SIGNATURE], type[16];
  int length = snprintf(type, sizeof type, "%d", data_type), same = 0;
  for (const char *at = signature; !strncmp(at, type, length) && at[length] == ','; at += length + 1) same++;
  if (same >= LONGEST_LIST || strlen(signature) + sizeof type > SIGNATURE) return;
  strcpy(rest, signature);
  snprintf(signature, sizeof signature, "%s,%s", type, rest);
}
void sim_copies(long bytes) { copied += bytes; }

void sim_launch(const char *kind, const char *name) {
  char row[SIGNATURE + 64];
  sim_log(kind, name);
  snprintf(row, sizeof row, "%s %s", name, signature);
  pthread_mutex_lock(&launches_lock);
  int k = 0;
  while (k < MOST_ROWS - 1 && launches[k].name && strcmp(launches[k].name, row)) k++;
  if (!launches[k].name) launches[k].name = strdup(row);
  launches[k].count++;
  launches[k].copied += copied;
  pthread_mutex_unlock(&launches_lock);
  signature[0] = 0;
  copied = 0;
}
const char *sim_launch_name(int index) { return index < MOST_ROWS ? launches[index].name : NULL; }
long sim_launch_count(int index) { return launches[index].count; }
long sim_launch_copied(int index) { return launches[index].copied; }

// ---- devices

static __thread int current_device = -1;
static int visible[MAX_DEVICES];  // index in this process -> number on the host
static int visible_count = -1;

// Reads ASCEND_RT_VISIBLE_DEVICES as CANN documents it: numbers separated by commas, in ascending order; reading stops
// at any other character and at a number this host has not. A list that is not ascending shows no device at all.
// Read once: like the real one, this runtime does not notice a later change.
static int device_count(void) {
  if (visible_count >= 0) return visible_count;
  const char *wanted = getenv("NPU_SIM_DEVICES");
  int on_host = wanted && *wanted ? atoi(wanted) : 1, count = 0;
  if (on_host > MAX_DEVICES) on_host = MAX_DEVICES;
  const char *list = getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (!list) {
    for (; count < on_host; count++) visible[count] = count;
    return visible_count = count;
  }
  while (isdigit((unsigned char)*list) && count < MAX_DEVICES) {
    char *end;
    long number = strtol(list, &end, 10);
    if (number >= on_host) break;
    if (count && number <= visible[count - 1]) return visible_count = 0;
    visible[count++] = (int)number;
    if (*end != ',') break;
    list = end + 1;
  }
  return visible_count = count;
}

int sim_current_device(void) { return current_device; }
int sim_physical_device(void) { return current_device < 0 || current_device >= device_count() ? -1 : visible[current_device]; }

aclError aclInit(const char *configuration) { return ACL_OK; }
aclError aclFinalize(void) { return ACL_OK; }
aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = device_count();
  return ACL_OK;
}
aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count()) return ACL_BAD_DEVICE;
  current_device = device;
  return ACL_OK;
}
aclError aclrtGetDevice(int32_t *device) {
  if (current_device < 0) return ACL_NO_CONTEXT;
  *device = current_device;
  return ACL_OK;
}
aclError aclrtResetDevice(int32_t device) { return ACL_OK; }
aclError aclrtGetCurrentContext(aclrtContext *context) {
  static int contexts[MAX_DEVICES];
  *context = &contexts[current_device < 0 ? 0 : current_device];
  return ACL_OK;
}
aclError aclrtSetCurrentContext(aclrtContext context) { return ACL_OK; }
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
  *active = 1;
  return ACL_OK;
}
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
  *can = 1;
  return ACL_OK;
}
aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { return ACL_OK; }
aclError aclrtDeviceGetBareTgid(int32_t *process) {
  *process = 1;
  return ACL_OK;
}

// ---- what the device is

const char *aclrtGetSocName(void) {
  const char *name = getenv("NPU_SIM_SOC");
  return name && *name ? name : "Ascend910B1";
}
// The version chooses between torch_npu's code paths; 8.2.RC1 is recent enough for all aclnn operators of 2.13.0.
static const char CANN_VERSION[] = "8.2.RC1";
aclError aclsysGetVersionStr(char *package, char *version) {
  strcpy(version, CANN_VERSION);
  return ACL_OK;
}
aclError aclsysGetCANNVersion(aclCANNPackageName package, aclCANNPackageVersion *version) {
  memset(version, 0, sizeof *version);
  strcpy(version->version, CANN_VERSION);
  return ACL_OK;
}
aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t *value) {
  *value = 24;  // asked for the number of cores
  return ACL_OK;
}
const char *aclGetRecentErrMsg(void) { return ""; }
aclError aclrtGetLastError(aclrtLastErrLevel level) { return ACL_OK; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { return ACL_OK; }

// ---- overflow

// torch_npu chooses the mode when it starts: saturation for 910A, which knows nothing else, inf/nan for later chips.
// Source: CANN's documentation of aclrtFloatOverflowMode.
static aclrtFloatOverflowMode overflow_mode = ACL_RT_OVERFLOW_MODE_UNDEF;
static bool overflow[MAX_DEVICES];

bool sim_saturates(void) { return overflow_mode == ACL_RT_OVERFLOW_MODE_SATURATION; }
void sim_set_overflow(int device, bool value) {
  if (device >= 0 && device < MAX_DEVICES) overflow[device] = value;
}
bool sim_overflow(int device) { return device >= 0 && device < MAX_DEVICES && overflow[device]; }

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) {
  sim_log("aclrtSetDeviceSatMode", mode == ACL_RT_OVERFLOW_MODE_SATURATION ? "saturation" : "inf/nan");
  overflow_mode = mode;
  return ACL_OK;
}
aclError aclrtSetStreamOverflowSwitch(aclrtStream stream, uint32_t flag) { return ACL_OK; }

// ---- settings that are accepted and change nothing here

aclError aclrtProcessReport(int32_t timeout) {  // a thread of torch_npu polls it: leave the core to others
  struct timespec pause = {0, 1000000};
  nanosleep(&pause, NULL);
  return ACL_OK;
}
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { return ACL_OK; }
aclError aclrtSetOpWaitTimeout(uint32_t timeout) { return ACL_OK; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) { return ACL_OK; }
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) { return ACL_OK; }
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t *value) {
  *value = 0;
  return ACL_OK;
}
