// In the place of AMD's libamdhip64.so on a machine without a GPU: as recording_libcuda.c, for hsacos of gfx942.
#include <hip/hip_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int param_count;
static int param_bytes[64];

void recorder_expect(int count, const int *bytes) {
  param_count = count;
  memcpy(param_bytes, bytes, count * sizeof(int));
}

static hipError_t load(hipModule_t *module, const void *image, unsigned int count, hipJitOption *options, void **values) {
  if (memcmp(image, "\177ELF", 4) != 0)
    return hipErrorInvalidImage;
  *module = (hipModule_t)image;
  return hipSuccess;
}

static hipError_t find(hipFunction_t *function, hipModule_t module, const char *name) {
  *function = (hipFunction_t)strdup(name);
  return hipSuccess;
}

static hipError_t launch(hipFunction_t function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                         unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared,
                         hipStream_t stream, void **params, void **extra) {
  printf("{\"function\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, "
         "\"attributes\": 0, \"params\": [",
         (const char *)function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared,
         (unsigned long long)stream);
  for (int i = 0; i < param_count; ++i) {
    printf(i ? ", \"" : "\"");
    for (int b = 0; b < param_bytes[i]; ++b)
      printf("%02x", ((unsigned char *)params[i])[b]);
    printf("\"");
  }
  printf("]}\n");
  fflush(stdout);
  return hipSuccess;
}

static hipError_t function_attribute(int *value, hipFunction_attribute attribute, hipFunction_t function) {
  *value = attribute == HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return hipSuccess;
}

static hipError_t device_properties(hipDeviceProp_t *properties, int device) {
  memset(properties, 0, sizeof(*properties));
  properties->sharedMemPerBlock = 64 * 1024;
  properties->warpSize = 64;
  strcpy(properties->gcnArchName, "gfx942:sramecc+:xnack-");
  return hipSuccess;
}

static const char *error_text(hipError_t code) {
  return code == hipErrorInvalidImage ? "device kernel image is invalid" : "not recorded";
}

static void not_called(void) { abort(); }

hipError_t hipDriverGetVersion(int *version) {
  *version = 60000000;
  return hipSuccess;
}

hipError_t hipGetProcAddress(const char *symbol, void **function, int version, uint64_t flags,
                             hipDriverProcAddressQueryResult *status) {
  const struct {
    const char *name;
    void *function;
  } table[] = {
      {"hipModuleLoadDataEx", load},
      {"hipModuleGetFunction", find},
      {"hipModuleLaunchKernel", launch},
      {"hipFuncGetAttribute", function_attribute},
      {"hipGetDeviceProperties", device_properties}, // also with R0600 behind it
      {"hipGetErrorString", error_text},
  };
  *function = not_called;
  for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); ++i)
    if (strncmp(symbol, table[i].name, strlen(table[i].name)) == 0)
      *function = table[i].function;
  return hipSuccess;
}
