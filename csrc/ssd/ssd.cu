// Host code of the scan: the kernels built ahead, their shared memory, and one launch for all.
//
// What recipes name is instantiated here (kBuilt). Other shapes and architectures come as cubins that kernels/ssd/code.py
// compiles from the same sources and hands to ssd_load.

#include "ssd/ssd.h"

#include <cstring>
#include <optional>

#include "common.h"
#include "ssd/kernels.cuh"

namespace nam56r {
namespace ssd {
namespace {

struct Built {
  const char* name;
  const void* kernel;
};
#define NAM56R_SSD(kernel, element, T, model, rank, d_state)                                   \
  {#kernel "<" element "," #model "," #rank "," #d_state ">",                              \
   reinterpret_cast<const void*>(&kernel<T, model, rank, d_state>)}
#define NAM56R_SSD_ALL(element, T, model, rank, d_state)                                       \
  NAM56R_SSD(forward, element, T, model, rank, d_state),                                       \
      NAM56R_SSD(walk, element, T, model, rank, d_state),                                      \
      NAM56R_SSD(gradient, element, T, model, rank, d_state)
const Built kBuilt[] = {
    NAM56R_SSD_ALL("bf16", BFloat16, 2, 4, 128),
    NAM56R_SSD_ALL("bf16", BFloat16, 1, 1, 128),
    NAM56R_SSD_ALL("bf16", BFloat16, 0, 1, 128),
};
#undef NAM56R_SSD_ALL
#undef NAM56R_SSD

// Calls f with an integral constant of the value.
template <int... kValues, typename F>
int64_t with_constant(const char* what, int64_t value, F f) {
  std::optional<int64_t> result;
  ((value == kValues ? void(result = f(std::integral_constant<int, kValues>{})) : void()), ...);
  STD_TORCH_CHECK(result, "ssd: ", what, " is ", value);
  return *result;
}

template <class Sh>
int64_t shared_bytes(const std::string& kernel) {
  if (kernel == "forward") return sizeof(ForwardShared<Sh>);
  if (kernel == "walk") return sizeof(WalkShared<Sh>);
  if (kernel == "gradient") return sizeof(GradientShared<Sh>);
  STD_TORCH_CHECK(false, "ssd: there is no kernel ", kernel);
}

}  // namespace
}  // namespace ssd

std::vector<std::string> ssd_built() {
  std::vector<std::string> names;
  for (const auto& one : ssd::kBuilt) names.push_back(one.name);
  return names;
}

int64_t ssd_kernel(std::string name) {
  for (const auto& one : ssd::kBuilt)
    if (name == one.name) return reinterpret_cast<int64_t>(one.kernel);
  STD_TORCH_CHECK(false, "ssd: ", name, " is not built ahead");
}

std::vector<int64_t> ssd_load(Tensor cubin, std::vector<std::string> names) {
  cudaLibrary_t library;  // stays loaded for the process
  STD_CUDA_CHECK(cudaLibraryLoadData(&library, cubin.const_data_ptr(), nullptr, nullptr, 0, nullptr, nullptr, 0));
  std::vector<int64_t> handles;
  for (const std::string& name : names) {
    cudaKernel_t kernel;
    STD_CUDA_CHECK(cudaLibraryGetKernel(&kernel, library, name.c_str()));
    handles.push_back(reinterpret_cast<int64_t>(kernel));
  }
  return handles;
}

int64_t ssd_shared(std::string kernel, int64_t model, int64_t rank, int64_t d_state) {
  using namespace ssd;
  return with_constant<0, 1, 2>("the model", model, [&](auto m) {
    return with_constant<1, 2, 4, 8>("R", rank, [&](auto r) {
      return with_constant<32, 64, 128, 256>("N", d_state, [&](auto n) {
        return shared_bytes<Shape<BFloat16, decltype(m)::value, decltype(r)::value, decltype(n)::value>>(kernel);
      });
    });
  });
}

void ssd_launch(
    Tensor on, int64_t kernel, int64_t grid_x, int64_t grid_y, int64_t grid_z, int64_t threads, int64_t shared,
    std::vector<int64_t> arguments) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  ssd::Arguments packed;
  STD_TORCH_CHECK(
      arguments.size() * sizeof(int64_t) == sizeof(packed), "ssd_launch: arguments has ", arguments.size(),
      " entries, but must have ", sizeof(packed) / sizeof(int64_t));
  if (grid_x == 0 || grid_y == 0 || grid_z == 0) return;
  STD_TORCH_CHECK(grid_y < 65536, "ssd_launch: ", grid_y, " sequences or spans are too many: at most 65535");
  std::memcpy(&packed, arguments.data(), sizeof(packed));
  const void* function = reinterpret_cast<const void*>(kernel);
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  void* pointers[] = {&packed};
  STD_CUDA_CHECK(cudaLaunchKernel(
      function, dim3(unsigned(grid_x), unsigned(grid_y), unsigned(grid_z)), dim3(unsigned(threads)), pointers, shared,
      stream_of(on)));
}

}  // namespace nam56r
