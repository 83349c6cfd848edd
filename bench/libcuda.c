// A stand-in for libcuda.so.1, for machines without a GPU: Triton loads its kernels into it and launches them. Nothing
// runs; every launch is written down, and what the driver of the named GPU would refuse is refused. A function that is
// missing here is one that Triton's launcher has not needed.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct CUctx_st {  // a GPU; devices are its numbers
  int major, minor, multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes, the first where a kernel asks for more than 48 KiB
};
struct CUmod_st {
  const unsigned char* image;
};
struct CUfunc_st {
  char name[64];
  int registers, static_shared;
  int dynamic_shared;  // bytes, as it has asked for them
  int any_cluster;
};
typedef struct {
  char name[64];
  unsigned blocks[3], threads, shared, cluster;
} Launch;

enum { kGpus = 16, kKept = 1 << 12, kRegisters = 1 << 16, kWithoutAsking = 48 << 10 };
enum { kReserved = 1 << 10 };  // bytes of each block for CUDA itself, which compilers count as the kernel's from 9.0 on
static struct CUctx_st gpus[kGpus];
static int n_gpus = 0;
static CUcontext current = NULL;
static Launch launches[kKept];  // the last ones
static uint64_t n_launches = 0;

// ---- for whoever reads what was launched

int stand_in_add(struct CUctx_st gpu) {
  if (n_gpus == kGpus) return -1;
  gpus[n_gpus] = gpu;
  return n_gpus++;
}
void stand_in_use(int device) { current = &gpus[device]; }
uint64_t stand_in_count(void) { return n_launches; }
const Launch* stand_in_launch(uint64_t i) {
  return i < n_launches && n_launches - i <= kKept ? &launches[i % kKept] : NULL;
}

// ---- devices and contexts

// The CUDA runtime, which torch asks how many GPUs there are, then finds no driver.
CUresult cuDriverGetVersion(int* version) {
  *version = 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (error) {
    case CUDA_ERROR_INVALID_VALUE:
      *text = "invalid argument";
      break;
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
      *text = "no kernel image is available for execution on the device";
      break;
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
      *text = "too many resources requested for launch";
      break;
    case CUDA_ERROR_INVALID_CLUSTER_SIZE:
      *text = "misconfiguration of cluster";
      break;
    default:
      *text = "an error of the stand-in for the driver, see bench/libcuda.c";
  }
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal < n_gpus ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = (int)(current - gpus);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = &gpus[device];
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute name, CUdevice device) {
  switch ((int)name) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = gpus[device].major;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = gpus[device].minor;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = gpus[device].multiprocessors;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = gpus[device].shared_per_block;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = gpus[device].shared_per_multiprocessor;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = kRegisters;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:  // these three are asked for and not used
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 1;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute name, CUdeviceptr pointer) {
  if (name != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr*)data = pointer;  // memory of the host passes for the device's: nobody reads it
  return CUDA_SUCCESS;
}
// Named by the launcher, but not called.
CUresult cuCtxGetLimit(size_t* bytes, CUlimit limit) {
  (void)bytes, (void)limit;
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t bytes) {
  (void)limit, (void)bytes;
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  (void)stream;
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

// ---- kernels: what a cubin, which is an ELF file, says of them

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (memcmp(image, ELFMAG, SELFMAG) != 0) return CUDA_ERROR_INVALID_IMAGE;
  *module = malloc(sizeof **module);
  (*module)->image = image;  // of the caller, who goes on to ask for a function of it
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) {
  free(module);
  return CUDA_SUCCESS;
}

// Registers per thread, the most of its functions: of the records (format, name, size, content) of the section
// .nv.info.
static int registers_of(const unsigned char* record, size_t bytes) {
  enum { kSized = 4, kRegisterCount = 0x2f };
  int most = 0;
  for (const unsigned char* end = record + bytes; record + 4 <= end;) {
    const unsigned size = record[0] == kSized ? record[2] | record[3] << 8 : 0;
    if (record[0] == kSized && record[1] == kRegisterCount && record[8] > most) most = record[8];
    record += 4 + size;
  }
  return most;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const unsigned char* image = module->image;
  const Elf64_Ehdr* file = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + file->e_shoff);
  // Since CUDA 13 the second byte of the flags holds the architecture, before it the first.
  const int architecture = file->e_ident[EI_ABIVERSION] >= 8 ? file->e_flags >> 8 & 0xff : file->e_flags & 0xff;
  if (architecture / 10 != current->major || architecture % 10 > current->minor) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  int found = 0;
  CUfunction made = calloc(1, sizeof *made);
  strncpy(made->name, name, sizeof made->name - 1);
  for (int i = 0; i < file->e_shnum; ++i) {
    const char* section = (const char*)image + sections[file->e_shstrndx].sh_offset + sections[i].sh_name;
    if (strncmp(section, ".text.", 6) == 0 && strcmp(section + 6, name) == 0) found = 1;
    if (strcmp(section, ".nv.info") == 0)
      made->registers = registers_of(image + sections[i].sh_offset, sections[i].sh_size);
    if (strncmp(section, ".nv.shared.", 11) == 0 && strcmp(section + 11, name) == 0)
      made->static_shared = (int)sections[i].sh_size;
  }
  if (architecture >= 90 && made->static_shared >= kReserved) made->static_shared -= kReserved;
  if (!found) {
    free(made);
    return CUDA_ERROR_NOT_FOUND;
  }
  made->dynamic_shared = kWithoutAsking - made->static_shared;
  *function = made;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute name, CUfunction function) {
  switch ((int)name) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = function->registers;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = function->static_shared;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = 1024;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = 0;  // the ahead-of-time checks count what is spilled
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute name, int value) {
  if (name == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED) {
    function->any_cluster = value;
    return CUDA_SUCCESS;
  }
  if (name != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
  if (value < 0 || value + function->static_shared > current->shared_per_block) return CUDA_ERROR_INVALID_VALUE;
  function->dynamic_shared = value;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function, (void)config;
  return CUDA_SUCCESS;
}

// ---- launches

static CUresult refusal(const CUlaunchConfig* config, CUfunction function, unsigned threads, unsigned cluster) {
  if (config->gridDimX == 0 || config->gridDimX > INT32_MAX || config->gridDimY - 1u > 65534u ||
      config->gridDimZ - 1u > 65534u || threads - 1u > 1023u)
    return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > (unsigned)function->dynamic_shared) return CUDA_ERROR_INVALID_VALUE;
  const unsigned per_warp = (32u * function->registers + 255u) / 256u * 256u;
  if (per_warp * ((threads + 31u) / 32u) > kRegisters) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  if (cluster > 1 &&
      (current->major < 9 || cluster > (function->any_cluster ? 16u : 8u) || config->gridDimX % cluster != 0))
    return CUDA_ERROR_INVALID_CLUSTER_SIZE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  (void)arguments, (void)extra;
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      const unsigned y = config->attrs[i].value.clusterDim.y, z = config->attrs[i].value.clusterDim.z;
      cluster = config->attrs[i].value.clusterDim.x * y * z;
    }
  const unsigned threads = config->blockDimX * config->blockDimY * config->blockDimZ;
  const CUresult refused = refusal(config, function, threads, cluster);
  if (refused != CUDA_SUCCESS) return refused;
  Launch* launch = &launches[n_launches++ % kKept];
  *launch = (Launch){.blocks = {config->gridDimX, config->gridDimY, config->gridDimZ},
                     .threads = threads,
                     .shared = config->sharedMemBytes,
                     .cluster = cluster};
  memcpy(launch->name, function->name, sizeof launch->name);
  return CUDA_SUCCESS;
}
