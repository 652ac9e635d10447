// What the stand-ins for the CANN libraries share. Everything here is defined in runtime.c or memory.c, which go into
// libascendcl.so.
#ifndef NPU_SIM_H
#define NPU_SIM_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Counters of the calling thread: torch_npu runs an operator on the thread that calls it (task queue off), so the
// difference of two readings is what that operator did, whatever HCCL's and autograd's threads do meanwhile.
enum sim_counter { SIM_COPIES_TO_HOST, SIM_WAITS, SIM_FLOAT64, SIM_COUNTERS };
void sim_count(enum sim_counter counter);
long sim_counted(int counter);

// Prints "[npu_sim] kind name" to stderr when NPU_SIM_LOG=1.
void sim_log(const char *kind, const char *name);

// Counts an operator or collective that was given to the device, and logs it. sim_describe names the aclDataTypes of
// the calling thread's next launch, from its last tensor to its first; sim_copies adds bytes that
// CANN copies to make tensors contiguous for it. Rows of the table, "name type,type", are those of the whole process: autograd's backward
// pass runs on a thread of its own. They are read with a number from 0 on; a name is NULL past the last.
void sim_describe(int data_type);
void sim_copies(long bytes);
void sim_launch(const char *kind, const char *name);
const char *sim_launch_name(int index);
long sim_launch_count(int index);
long sim_launch_copied(int index);

// Whether arithmetic saturates instead of producing inf and NaN, and the flag a saturating device keeps: some operator
// has overflowed since the flag was last cleared. A device is given by its index in this process.
bool sim_saturates(void);
void sim_set_overflow(int device, bool overflow);
bool sim_overflow(int device);

// The calling thread's current device: its index in this process, and the number it has on the host (they differ under
// ASCEND_RT_VISIBLE_DEVICES). -1 before the first aclrtSetDevice.
int sim_current_device(void);
int sim_physical_device(void);

// The lazy mode (lazy.c). sim_call calls a function at once, or puts the call into the stream's queue. sim_run_all empties
// all queues.
bool sim_is_lazy(void);
void sim_call(void *stream, void (*function)(void *), void *argument);
void sim_run_all(void);
// Whether an address lies in host memory from aclrtMallocHost (memory.c).
bool sim_is_pinned(const void *address);

// Bytes of one element of an aclDataType, 0 for types nobody here computes with.
int sim_element_size(int data_type);
#endif
