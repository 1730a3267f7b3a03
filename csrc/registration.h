// Exported entry points of a kernel library: the schemas it was built for, and the registration of its kernels. The
// loader (sparsemm/ops/library.py) compares the former before it calls the latter, so a stale library never registers.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef SPARSEMM_SCHEMA_HASH
#error "SPARSEMM_SCHEMA_HASH must be defined by the build (see csrc/build.py)"
#endif

#define SPARSEMM_STRINGIZE_(x) #x
#define SPARSEMM_STRINGIZE(x) SPARSEMM_STRINGIZE_(x)

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);

struct KernelEntry {
  const char* name;
  BoxedKernel kernel;
};

// Registers the kernels for one dispatch key; 0 on success. The library object lives as long as the process.
template <int N>
int register_kernels(const char* dispatch_key, const KernelEntry (&entries)[N]) {
  static TorchLibraryHandle library = nullptr;
  if (library != nullptr) return 0;
  if (aoti_torch_library_init_impl("sparsemm", dispatch_key, __FILE__, __LINE__, &library) != 0) return 1;
  for (const KernelEntry& entry : entries) {
    if (torch_library_impl(library, entry.name, entry.kernel, TORCH_ABI_VERSION) != 0) return 2;
  }
  return 0;
}

#define SPARSEMM_EXPORT extern "C" __attribute__((visibility("default")))
#define SPARSEMM_DEFINE_ENTRY_POINTS(dispatch_key, entries)                                             \
  SPARSEMM_EXPORT const char* sparsemm_schema_hash() { return SPARSEMM_STRINGIZE(SPARSEMM_SCHEMA_HASH); } \
  SPARSEMM_EXPORT int sparsemm_register() { return register_kernels(dispatch_key, entries); }
