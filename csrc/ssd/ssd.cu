// Host code of the scan: the kernels built ahead, their shared memory, and one launch for all.
//
// What recipes name is instantiated here (kBuilt). Other shapes and architectures come as cubins that kernels/ssd/code.py
// compiles from the same sources and hands to ssd_load.

#include "ssd/ssd.h"

#include <cstring>
#include <optional>

#include "hopper/map.h"
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
      NAM56R_SSD(turns, element, T, model, rank, d_state),                                     \
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
  if (kernel == "turns") return 0;
  if (kernel == "Turns") return sizeof(Turns<Sh>);
  if (kernel == "walk") return sizeof(WalkShared<Sh>);
  if (kernel == "gradient") return sizeof(GradientShared<Sh>);
  STD_TORCH_CHECK(false, "ssd: there is no kernel ", kernel);
}

// A tensor as [batch, rank, token, group, column], in boxes of a chunk's rows and 64 columns.
TensorMap map_of(
    void* address, int64_t batch, int64_t rank, int64_t tokens, int64_t groups, int64_t columns, int64_t of_batch, int64_t of_rank,
    int64_t of_token, int64_t of_group, int64_t chunk) {
  return tensor_map<5>(
      "ssd", address, {columns, groups, tokens, rank, batch}, {of_group, of_token, of_rank, of_batch}, {64, 1, chunk, rank, 1});
}

Maps maps_of(const Arguments& a, int64_t rank, int64_t d_state) {
  const int64_t batch = a.cu ? 1 : a.sequences, chunk = ROWS / rank;
  Maps maps{};
  maps.B = map_of(a.B, batch, rank, a.S, a.G, d_state, a.B_b, a.B_r, a.B_s, a.B_g, chunk);
  maps.C = map_of(a.C, batch, rank, a.S, a.G, d_state, a.C_b, a.C_r, a.C_s, a.C_g, chunk);
  maps.x = map_of(a.x, batch, 1, a.S, a.H, a.P, a.x_b, 0, a.x_s, a.x_h, chunk);
  if (a.z) maps.z = map_of(a.z, batch, 1, a.S, a.H, a.P, a.z_b, 0, a.z_s, a.z_h, chunk);
  return maps;
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
    Tensor on, int64_t kernel, bool early, bool mapped, int64_t rank, int64_t d_state, int64_t grid_x, int64_t grid_y, int64_t grid_z,
    int64_t threads, int64_t shared, std::vector<int64_t> arguments) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  ssd::Arguments packed;
  STD_TORCH_CHECK(
      arguments.size() * sizeof(int64_t) == sizeof(packed), "ssd_launch: arguments has ", arguments.size(),
      " entries, but must have ", sizeof(packed) / sizeof(int64_t));
  if (grid_x == 0 || grid_y == 0 || grid_z == 0) return;
  STD_TORCH_CHECK(grid_y < 65536, "ssd_launch: ", grid_y, " sequences or spans are too many: at most 65535");
  std::memcpy(&packed, arguments.data(), sizeof(packed));
  ssd::Maps maps = mapped ? ssd::maps_of(packed, rank, d_state) : ssd::Maps{};
  const void* function = reinterpret_cast<const void*>(kernel);
  STD_CUDA_CHECK(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  void* pointers[] = {&packed, &maps};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(grid_x), unsigned(grid_y), unsigned(grid_z)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared, config.stream = stream_of(on);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization, overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap, config.numAttrs = early;
  STD_CUDA_CHECK(cudaLaunchKernelExC(&config, function, pointers));
}

}  // namespace nam56r
