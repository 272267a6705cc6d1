// In the place of NVIDIA's libcuda.so.1 on a machine without a GPU: it takes binaries and launches from Triton's own
// launcher, writes down what it was given and computes nothing. One line of JSON goes to stdout for each launch.
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// The real one has the sizes of a kernel's parameters from the cubin; here the test tells them.
static int param_count;
static int param_bytes[64];
static _Thread_local CUcontext current;

void recorder_expect(int count, const int *bytes) {
  param_count = count;
  memcpy(param_bytes, bytes, count * sizeof(int));
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4) != 0)
    return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
  printf("{\"function\": \"%s\", \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared\": %u, \"stream\": %llu, "
         "\"attributes\": %u, \"params\": [",
         (const char *)function, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
         config->blockDimY, config->blockDimZ, config->sharedMemBytes, (unsigned long long)config->hStream,
         config->numAttrs);
  for (int i = 0; i < param_count; ++i) {
    printf(i ? ", \"" : "\"");
    for (int b = 0; b < param_bytes[i]; ++b)
      printf("%02x", ((unsigned char *)params[i])[b]);
    printf("\"");
  }
  printf("]}\n");
  fflush(stdout);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 227 * 1024; // every limit of memory
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = code == CUDA_ERROR_INVALID_IMAGE ? "device kernel image is invalid" : "not recorded";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)(size_t)(256 + device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

// Triton's module links to these and does not call them here.
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) { abort(); }
CUresult cuModuleUnload(CUmodule module) { abort(); }
CUresult cuCtxGetDevice(CUdevice *device) { abort(); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { abort(); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { abort(); }
CUresult cuDriverGetVersion(int *version) { abort(); }
CUresult cuInit(unsigned int flags) { abort(); }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { abort(); }
