#include <stddef.h>
#include <stdlib.h>
#include <stdint.h>
extern void fake_cann_log(const char *, const char *);
extern void fake_cann_count(int, long);
#include <string.h>
typedef struct { int64_t nd, dims[8], st[8], off; int dt; char *data; } FT;
typedef struct { int n; int64_t v[16]; } FI;
static int esz(int dt) { static const int s[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1}; return dt >= 0 && dt < 13 ? s[dt] : dt == 27 ? 2 : dt == 16 ? 8 : 0; }
void *aclCreateTensor(const int64_t *vd, uint64_t n, int dt, const int64_t *st, int64_t off, int fmt, const int64_t *sd, uint64_t sn, void *data) { FT *t = calloc(1, sizeof *t); t->nd = n; if (dt == 11) fake_cann_count(3, 1); for (uint64_t i = 0; i < n && i < 8; i++) t->dims[i] = vd[i], t->st[i] = st[i]; t->off = off; t->dt = dt; t->data = data; return t; }
void *aclCreateScalar(void *v, int dt) { char *p = calloc(1, 24); memcpy(p, v, esz(dt)); p[20] = (char)dt; return p; }
void *aclCreateIntArray(const int64_t *v, uint64_t n) { FI *f = calloc(1, sizeof *f); f->n = n; for (uint64_t i = 0; i < n && i < 16; i++) f->v[i] = v[i]; return f; }
void *aclCreateFloatArray(const float *v, uint64_t n) { return calloc(1, 16); }
void *aclCreateBoolArray(const char *v, uint64_t n) { return calloc(1, 16); }
void *aclCreateTensorList(void *const *v, uint64_t n) { return calloc(1, 16); }
void *aclCreateScalarList(void *const *v, uint64_t n) { return calloc(1, 16); }
int aclDestroyTensor(void *p) { free(p); return 0; }
int aclDestroyScalar(void *p) { free(p); return 0; }
int aclDestroyIntArray(void *p) { free(p); return 0; }
int aclDestroyFloatArray(void *p) { free(p); return 0; }
int aclDestroyBoolArray(void *p) { free(p); return 0; }
int aclDestroyTensorList(void *p) { free(p); return 0; }
int aclDestroyScalarList(void *p) { free(p); return 0; }
int aclDestroyAclOpExecutor(void *p) { return 0; }
int aclGetViewShape(FT *t, int64_t **dims, uint64_t *n) { *n = t->nd; *dims = malloc(8 * (t->nd + 1)); for (int i = 0; i < t->nd; i++) (*dims)[i] = t->dims[i]; return 0; }

// The operators torch_npu's own C++ calls directly (not through the dispatcher), so that nothing above can compute them.
typedef struct { FT in, out; int64_t lo[8]; } Pad;
int aclnnConstantPadNdGetWorkspaceSize(FT *in, FI *pad, char *value, FT *out, uint64_t *ws, void **ex) {
  Pad *p = calloc(1, sizeof *p); p->in = *in; p->out = *out; for (int i = 0; i < pad->n / 2; i++) p->lo[in->nd - 1 - i] = pad->v[2 * i]; *ws = 0; *ex = p; return 0; }
int aclnnConstantPadNd(void *w, uint64_t s, void *e, void *t) {
  fake_cann_log("aclnn", "aclnnConstantPadNd"); Pad *p = e; int z = esz(p->out.dt); int64_t n = 1, ix[8] = {0}; if (!z) return 161002; for (int d = 0; d < p->out.nd; d++) n *= p->out.dims[d];
  for (int64_t k = 0; k < n; k++) { int64_t a = p->in.off, b = p->out.off; int inside = 1;
    for (int d = 0; d < p->out.nd; d++) { int64_t q = ix[d] - p->lo[d]; if (q < 0 || q >= p->in.dims[d]) inside = 0; a += q * p->in.st[d]; b += ix[d] * p->out.st[d]; }
    if (inside) memcpy(p->out.data + b * z, p->in.data + a * z, z); else memset(p->out.data + b * z, 0, z);      // zero padding only
    for (int d = p->out.nd - 1; d >= 0 && ++ix[d] == p->out.dims[d]; d--) ix[d] = 0; }
  free(p); return 0; }
