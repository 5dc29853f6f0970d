// A stand-in for libcuda.so.1: it accepts Triton's calls and records launches and tensor maps.
//
// Each record is a JSON line in the file that STUB_RECORDS names. No call fails: a driver reports an
// invalid launch or tensor map without a reason, and the test that reads the records names it.
#include "cuda.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_KERNELS = 1024, TYPES = 128, OPTIN_SHARED = 232448 };

static char types[MAX_KERNELS][TYPES];  // by CUfunction, one letter a parameter
static uintptr_t functions, maps;

static FILE* records(void) {
  static FILE* file;
  if (!file) {
    file = fopen(getenv("STUB_RECORDS"), "w");
    setvbuf(file, NULL, _IOLBF, 0);
  }
  return file;
}

// cuLaunchKernelEx gets addresses without sizes: a driver reads the types in the cubin, the test
// reads them in the PTX. p pointer, i and l integers of 32 and 64 bits, f float, t tensor map.
void stub_describe(uint64_t function, const char* letters) {
  snprintf(types[function], TYPES, "%s", letters);
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "error of the stand-in for libcuda";
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int index) {
  *device = index;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {  // those of an H100
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = OPTIN_SHARED; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1;
  }
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (functions + 1 == MAX_KERNELS) return CUDA_ERROR_OUT_OF_MEMORY;
  *function = (CUfunction)++functions;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr*)value = pointer;  // the address of host memory counts as the device's
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** values,
                                CUdeviceptr pointer) {
  for (unsigned i = 0; i < count; i++) *(CUdeviceptr*)values[i] = pointer;
  return CUDA_SUCCESS;
}

static void print_list(const char* name, const void* values, size_t size, unsigned count) {
  fprintf(records(), ", \"%s\": [", name);
  for (unsigned i = 0; i < count; i++) {
    uint64_t value = 0;
    memcpy(&value, (const char*)values + i * size, size);
    fprintf(records(), "%s%llu", i ? ", " : "", (unsigned long long)value);
  }
  fprintf(records(), "]");
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* dims, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  memset(map, 0, sizeof *map);
  map->opaque[0] = ++maps;  // so that a launch shows which map it gets
  fprintf(records(), "{\"map\": %llu, \"type\": %d, \"address\": %llu", (unsigned long long)maps,
          type, (unsigned long long)(uintptr_t)address);
  print_list("dims", dims, sizeof *dims, rank);
  print_list("strides", strides, sizeof *strides, rank - 1);
  print_list("box", box, sizeof *box, rank);
  print_list("steps", steps, sizeof *steps, rank);
  fprintf(records(), ", \"interleave\": %d, \"swizzle\": %d, \"fill\": %d}\n", interleave, swizzle,
          fill);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** params,
                          void** extra) {
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const char* letters = types[(uintptr_t)function];
  fprintf(records(), "{\"launch\": %llu, \"shared\": %u, \"attributes\": %u",
          (unsigned long long)(uintptr_t)function, config->sharedMemBytes, config->numAttrs);
  print_list("grid", grid, sizeof *grid, 3);
  print_list("block", block, sizeof *block, 3);
  fprintf(records(), ", \"parameters\": [");
  for (int i = 0; letters[i]; i++) {
    fprintf(records(), "%s[\"%c\", ", i ? ", " : "", letters[i]);
    switch (letters[i]) {
      case 'f': fprintf(records(), "%.17g]", *(float*)params[i]); break;
      case 'i': fprintf(records(), "%d]", *(int32_t*)params[i]); break;
      case 'l': fprintf(records(), "%lld]", (long long)*(int64_t*)params[i]); break;
      default: fprintf(records(), "%llu]", (unsigned long long)*(uint64_t*)params[i]);
    }
  }
  fprintf(records(), "]}\n");
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction function, const CUlaunchConfig* c) {
  *count = 1;
  return CUDA_SUCCESS;
}
