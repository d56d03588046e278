// The one bindings file: what `import nam56r.kernels._C` runs, and the schemas of every compiled operator.
// A family declares its functions in csrc/<family>/<family>.h; here they get their schema and their CUDA kernel.

#include <Python.h>

#include <torch/csrc/stable/library.h>

#include "conv1d/conv1d.h"
#include "dsa/dsa.h"
#include "m2rnn/m2rnn.h"
#include "mla/mla.h"
#include "ssd/ssd.h"

STABLE_TORCH_LIBRARY(nam56r, m) {
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "bool silu) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "dsa_index(Tensor q, Tensor k, Tensor weights, int top_k, Tensor? cu_seqlens, Tensor(a!) status) -> Tensor");
  m.def(
      "dsa_index_fp8(Tensor q, Tensor k, Tensor weights, int top_k, Tensor? cu_seqlens, Tensor(a!) status) -> Tensor");
  m.def("m2rnn_built() -> int[]");
  m.def(
      "m2rnn_load(Tensor cubin, str[] names, int element, int columns, int row_blocks, int chunk, int capability) -> ()");
  m.def(
      "m2rnn_forward(Tensor q, Tensor k, Tensor v, Tensor weight, Tensor forget, Tensor? initial_state, "
      "Tensor? cu_seqlens, int chunk, bool save_states) -> (Tensor y, Tensor final_state, Tensor states)");
  m.def(
      "m2rnn_backward(Tensor? dy, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor weight, Tensor forget, "
      "Tensor states, Tensor? cu_seqlens, int chunk) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dweight, Tensor dforget, Tensor dinitial_state)");
  m.def(
      "mla_forward(Tensor q, Tensor k, Tensor? k_rope, Tensor? v, Tensor? cu_seqlens, float scale, bool causal, "
      "int query_offset, bool save) -> (Tensor out, Tensor lse, Tensor rest)");
  m.def(
      "mla_backward(Tensor? dout, Tensor? dlse, Tensor q, Tensor k, Tensor? k_rope, Tensor? v, Tensor out, Tensor lse, "
      "Tensor rest, Tensor? cu_seqlens, float scale, bool causal, int query_offset) "
      "-> (Tensor dq, Tensor dk, Tensor dk_rope, Tensor dv)");
  m.def("ssd_built() -> str[]");
  m.def("ssd_kernel(str name) -> int");
  m.def("ssd_load(Tensor cubin, str[] names) -> int[]");
  m.def("ssd_shared(str kernel, int model, int rank, int d_state) -> int");
  m.def(
      "ssd_launch(Tensor on, int kernel, bool early, bool mapped, int rank, int d_state, int grid_x, int grid_y, "
      "int grid_z, int threads, int shared, int[] arguments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(nam56r, CompositeExplicitAutograd, m) {
  m.impl("m2rnn_built", TORCH_BOX(&nam56r::m2rnn_built));
  m.impl("m2rnn_load", TORCH_BOX(&nam56r::m2rnn_load));
  m.impl("ssd_built", TORCH_BOX(&nam56r::ssd_built));
  m.impl("ssd_kernel", TORCH_BOX(&nam56r::ssd_kernel));
  m.impl("ssd_load", TORCH_BOX(&nam56r::ssd_load));
  m.impl("ssd_shared", TORCH_BOX(&nam56r::ssd_shared));
  m.impl("ssd_launch", TORCH_BOX(&nam56r::ssd_launch));
}

STABLE_TORCH_LIBRARY_IMPL(nam56r, CUDA, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&nam56r::causal_conv1d_forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&nam56r::causal_conv1d_backward));
  m.impl("dsa_index", TORCH_BOX(&nam56r::dsa_index));
  m.impl("dsa_index_fp8", TORCH_BOX(&nam56r::dsa_index_fp8));
  m.impl("m2rnn_forward", TORCH_BOX(&nam56r::m2rnn_forward));
  m.impl("m2rnn_backward", TORCH_BOX(&nam56r::m2rnn_backward));
  m.impl("mla_forward", TORCH_BOX(&nam56r::mla_forward));
  m.impl("mla_backward", TORCH_BOX(&nam56r::mla_backward));
}

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "ARCHS", NAM56R_ARCHS) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
