/* A CUDA runtime that records one launch instead of performing it. It is linked to an ahead-of-time object of the
 * kernel language, whose host code then runs on a machine without a driver and shows what it would launch. */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

typedef struct { unsigned x, y, z; } dim3_t;
typedef struct { int id; char pad[4]; unsigned char value[64]; } attribute_t;
typedef struct { dim3_t grid, block; size_t shared; void *stream; attribute_t *attributes; unsigned count; } config_t;

enum { MAX_PARAMS = 64, MAX_PARAM_BYTES = 16384, MAX_ATTRIBUTES = 16 };

int stub_param_count;
int stub_param_sizes[MAX_PARAMS];
int stub_launches;
unsigned stub_grid[3], stub_block[3];
uint64_t stub_shared;
unsigned stub_attribute_count;
int stub_attribute_ids[MAX_ATTRIBUTES];
unsigned char stub_attribute_values[MAX_ATTRIBUTES][64];
unsigned char stub_params[MAX_PARAM_BYTES];

enum { SUCCESS = 0, INVALID_VALUE = 1, MULTIPROCESSORS = 16, SHARED_PER_BLOCK_OPTIN = 97, SMS_OF_B200 = 148 };

int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  *library = (void *)0x1;
  return SUCCESS;
}
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) { *kernel = (void *)0x2; return SUCCESS; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == MULTIPROCESSORS ? SMS_OF_B200 : attribute == SHARED_PER_BLOCK_OPTIN ? 232448 : 0;
  return SUCCESS;
}
int _cudaGetDevice(int *device) { *device = 0; return SUCCESS; }
int _cudaFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
int _cudaKernelSetAttributeForDevice(void *kernel, int attribute, int value, int device) { return SUCCESS; }
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { *value = 0; return SUCCESS; }

int _cudaLaunchKernelEx(const config_t *config, void *kernel, void **args) {
  size_t at = 0;
  stub_launches++;
  memcpy(stub_grid, &config->grid, sizeof stub_grid);
  memcpy(stub_block, &config->block, sizeof stub_block);
  stub_shared = config->shared;
  if (config->count > MAX_ATTRIBUTES || stub_param_count > MAX_PARAMS) return INVALID_VALUE;
  stub_attribute_count = config->count;
  for (unsigned i = 0; i < config->count; i++) {
    stub_attribute_ids[i] = config->attributes[i].id;
    memcpy(stub_attribute_values[i], config->attributes[i].value, 64);
  }
  for (int i = 0; i < stub_param_count; i++) {
    if (at + stub_param_sizes[i] > MAX_PARAM_BYTES) return INVALID_VALUE;
    memcpy(stub_params + at, args[i], stub_param_sizes[i]);
    at += stub_param_sizes[i];
  }
  return SUCCESS;
}
