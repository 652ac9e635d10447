// libascendcl.so, fourth part: streams and events, and the lazy mode.
//
// As it stands a stream has nothing pending: what it is given is done when the call returns. In lazy mode it is put into
// the stream's queue, and done when the host waits for it (or, one at a time, when it asks whether an event is over).
// Which stream goes on is drawn by lot each time, so that only events order streams, as on a device; a copy reads host
// memory when it is done, not when it is asked for, if that memory is pinned. The values of operators come from Python
// (npu_sim/queues.py) as entries of the same queues.
// Limits: one device; collectives and the few operators that C computes empty the queues first.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "acl/acl.h"
#include "sim.h"

enum { ACL_OK = 0 };

typedef struct { double recorded_ms; long recorded, done; } Event;
typedef struct Entry {
  enum { COPY, FILL, RECORD, AWAIT, CALL, PYTHON } kind;
  void *to;
  const void *from;
  void *owned;  // freed afterwards: the staged bytes of a copy from pageable memory
  size_t bytes;
  int value;
  long number;  // an event's record, or Python's number
  void (*function)(void *);
  struct Entry *next;
} Entry;
typedef struct Stream {
  Entry *first, *last;
  struct Stream *next;
} Stream;

static bool lazy;
static unsigned lot;
static void (*python)(long);
static Stream default_stream, *streams = &default_stream;
static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static Entry *append(aclrtStream handle, Entry entry) {
  Stream *stream = handle ? handle : &default_stream;
  Entry *added = malloc(sizeof *added);
  *added = entry;
  added->next = NULL;
  pthread_mutex_lock(&lock);
  if (stream->first) stream->last->next = added;
  else stream->first = added;
  stream->last = added;
  pthread_mutex_unlock(&lock);
  return added;
}

static bool can_go_on(const Stream *stream) {
  const Entry *head = stream->first;
  return head && (head->kind != AWAIT || ((Event *)head->to)->done >= head->number);
}

// Does the first entry of a stream drawn by lot; false when none can go on.
static bool run_one(void) {
  int ready = 0;
  for (Stream *s = streams; s; s = s->next) ready += can_go_on(s);
  if (!ready) return false;
  int drawn = rand_r(&lot) % ready;
  Stream *stream = streams;
  for (;; stream = stream->next)
    if (can_go_on(stream) && !drawn--) break;
  Entry *entry = stream->first;
  stream->first = entry->next;
  switch (entry->kind) {
    case COPY: memmove(entry->to, entry->from, entry->bytes); break;
    case FILL: memset(entry->to, entry->value, entry->bytes); break;
    case RECORD: ((Event *)entry->to)->done = entry->number; break;
    case AWAIT: break;
    case CALL: entry->function(entry->to); break;
    case PYTHON: python(entry->number); break;
  }
  free(entry->owned);
  free(entry);
  return true;
}

static void run_stream(Stream *stream) {
  pthread_mutex_lock(&lock);
  while (stream->first && run_one()) continue;
  pthread_mutex_unlock(&lock);
}
void sim_run_all(void) {
  pthread_mutex_lock(&lock);
  while (run_one()) continue;
  pthread_mutex_unlock(&lock);
}
void sim_run_stream(aclrtStream stream) { run_stream(stream ? stream : &default_stream); }

// ---- what fills the queues

bool sim_is_lazy(void) { return lazy; }
void sim_set_lazy(bool on, unsigned seed, void (*run_python)(long)) {
  sim_run_all();
  lazy = on;
  lot = seed * 2654435761u + 1;  // the first lots of neighbouring seeds are alike
  python = run_python;
}
void sim_queue_python(aclrtStream stream, long number) { append(stream, (Entry){.kind = PYTHON, .number = number}); }
void sim_call(aclrtStream stream, void (*function)(void *), void *argument) {
  if (lazy) append(stream, (Entry){.kind = CALL, .function = function, .to = argument});
  else function(argument);
}

aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind kind, aclrtStream s) {
  if (!lazy || bytes > room) return aclrtMemcpy(to, room, from, bytes, kind);
  if (kind == ACL_MEMCPY_DEVICE_TO_HOST) sim_count(SIM_COPIES_TO_HOST);
  Entry copy = {.kind = COPY, .to = to, .from = from, .bytes = bytes};
  if (kind == ACL_MEMCPY_HOST_TO_DEVICE && !sim_is_pinned(from)) {
    copy.from = copy.owned = malloc(bytes ? bytes : 1);
    memcpy(copy.owned, from, bytes);
  }
  append(s, copy);
  return ACL_OK;
}
aclError aclrtMemsetAsync(void *memory, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  if (!lazy || bytes > room) return aclrtMemset(memory, room, value, bytes);
  append(stream, (Entry){.kind = FILL, .to = memory, .value = value, .bytes = bytes});
  return ACL_OK;
}

// ---- streams

aclError aclrtCreateStream(aclrtStream *stream) {
  Stream *made = calloc(1, sizeof *made);
  if (!made) return ACL_ERROR_BAD_ALLOC;
  pthread_mutex_lock(&lock);
  made->next = streams->next;
  streams->next = made;
  pthread_mutex_unlock(&lock);
  *stream = made;
  return ACL_OK;
}
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flags) {
  return aclrtCreateStream(stream);
}
aclError aclrtDestroyStream(aclrtStream stream) {
  pthread_mutex_lock(&lock);
  run_stream(stream);
  for (Stream *s = streams; s; s = s->next)
    if (s->next == stream) s->next = s->next->next;
  pthread_mutex_unlock(&lock);
  free(stream);
  return ACL_OK;
}
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
  Stream *asked = stream ? stream : &default_stream;
  pthread_mutex_lock(&lock);
  if (asked->first) run_one();
  *status = asked->first ? ACL_STREAM_STATUS_NOT_READY : ACL_STREAM_STATUS_COMPLETE;
  pthread_mutex_unlock(&lock);
  return ACL_OK;
}
aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
  *id = (int32_t)((uintptr_t)stream >> 4 & 0x7fffffff);
  return ACL_OK;
}
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return ACL_OK; }

static aclError host_waits(void) {
  sim_count(SIM_WAITS);
  return ACL_OK;
}
aclError aclrtSynchronizeDevice(void) {
  sim_run_all();
  return host_waits();
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { return aclrtSynchronizeDevice(); }
aclError aclrtSynchronizeStream(aclrtStream stream) {
  sim_run_stream(stream);
  return host_waits();
}
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) { return aclrtSynchronizeStream(stream); }

// ---- events

aclError aclrtCreateEvent(aclrtEvent *event) { return (*event = calloc(1, sizeof(Event))) ? ACL_OK : ACL_ERROR_BAD_ALLOC; }
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEvent(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) { return aclrtCreateEvent(event); }
aclError aclrtDestroyEvent(aclrtEvent event) {
  if (!lazy) free(event);  // entries of a queue may name it
  return ACL_OK;
}
aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  Event *event = handle;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  event->recorded_ms = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
  event->recorded++;
  if (lazy) append(stream, (Entry){.kind = RECORD, .to = event, .number = event->recorded});
  else event->done = event->recorded;
  return ACL_OK;
}
aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) { return ACL_OK; }
aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {  // the device waits, not the host
  if (lazy) append(stream, (Entry){.kind = AWAIT, .to = event, .number = ((Event *)event)->recorded});
  return ACL_OK;
}
static bool is_over(Event *event) {
  pthread_mutex_lock(&lock);
  if (event->done < event->recorded) run_one();
  bool over = event->done >= event->recorded;
  pthread_mutex_unlock(&lock);
  return over;
}
aclError aclrtSynchronizeEvent(aclrtEvent event) {
  while (!is_over(event)) continue;
  return host_waits();
}
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
  *status = is_over(event) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_OK;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
  *status = is_over(event) ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_OK;
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
  *ms = (float)(((Event *)end)->recorded_ms - ((Event *)start)->recorded_ms);
  return ACL_OK;
}
