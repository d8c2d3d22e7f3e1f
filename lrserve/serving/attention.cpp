// What lies between a compiled graph and vLLM's attention on the CPU, without Python: attention.py says when it may be passed by.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/narrow.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

namespace {

using c10::IValue;
using torch::jit::Stack;

// What layers of one forward pass attend by, from vLLM's metadata.
struct Pass {
  at::Tensor starts, lengths, blocks, slots, schedule;
  int64_t tokens;  // that are no padding
  int64_t rows;    // of the queries, padding included
  bool causal;
};

struct Layer {
  double scale, softcap;
  int64_t window;
  std::string isa;
  // Of the forward pass under way, until the layer has attended.
  std::shared_ptr<const Pass> pass;
  at::Tensor keys, values;
};

std::unordered_map<std::string, Layer> layers;
int64_t passed_by = 0;

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

at::Tensor first(const at::Tensor& rows, int64_t count) { return rows.size(0) <= count ? rows : rows.narrow(0, 0, count); }

// vLLM's `unified_attention_with_output` (query, key, value, output, layer_name, output_scale, output_block_scale, kv_cache_dummy_dep).
void attend(const c10::OperatorHandle&, Stack* stack) {
  constexpr size_t kArguments = 8;
  TORCH_CHECK(stack->size() >= kArguments, "unified_attention_with_output has other arguments than lrserve knows");
  const IValue* arguments = stack->data() + stack->size() - kArguments;
  const auto found = arguments[4].isString() ? layers.find(arguments[4].toStringRef()) : layers.end();
  std::shared_ptr<const Pass> pass;
  if (found != layers.end()) pass = std::exchange(found->second.pass, nullptr);
  if (!pass || arguments[1].isNone() || arguments[2].isNone() || !arguments[5].isNone() || !arguments[6].isNone() ||
      arguments[0].toTensor().size(0) != pass->rows) {
    static const c10::OperatorHandle python = find("lrserve::attention_in_python");
    python.callBoxed(stack);
    return;
  }
  Layer& layer = found->second;
  const at::Tensor keys = std::exchange(layer.keys, at::Tensor()), values = std::exchange(layer.values, at::Tensor());
  const int64_t stored = pass->slots.size(0);

  static const c10::OperatorHandle store = find("_C::cpu_attn_reshape_and_cache");
  Stack storing{first(arguments[1].toTensor(), stored), first(arguments[2].toTensor(), stored), keys, values, pass->slots, layer.isa,
                1.0, 1.0, "auto"};
  store.callBoxed(storing);

  static const c10::OperatorHandle attention = find("_C::cpu_attention_with_kv_cache");
  Stack attending{first(arguments[0].toTensor(), pass->tokens), keys, values, first(arguments[3].toTensor(), pass->tokens),
                  pass->starts, pass->lengths, layer.scale, pass->causal, IValue(), layer.window, pass->blocks, layer.softcap,
                  pass->schedule, IValue(), IValue(), 1.0, 1.0, "auto"};
  attention.callBoxed(attending);

  ++passed_by;
  torch::jit::drop(*stack, kArguments);
}

void layer(std::string name, double scale, double softcap, int64_t window, std::string isa) {
  layers[std::move(name)] = Layer{scale, softcap, window, std::move(isa), nullptr, {}, {}};
}

void forget() {
  for (auto& [name, layer] : layers) layer.pass = nullptr, layer.keys = at::Tensor(), layer.values = at::Tensor();
}

void pass(c10::List<std::string> names, at::TensorList keys, at::TensorList values, at::Tensor starts, at::Tensor lengths,
          at::Tensor blocks, at::Tensor slots, at::Tensor schedule, int64_t tokens, int64_t rows, bool causal) {
  TORCH_CHECK(names.size() == keys.size() && names.size() == values.size(), "a cache for each layer");
  const auto pass = std::make_shared<const Pass>(Pass{std::move(starts), std::move(lengths), std::move(blocks), std::move(slots),
                                                      std::move(schedule), tokens, rows, causal});
  for (size_t i = 0; i < keys.size(); ++i) {
    Layer& layer = layers.at(names.get(i));
    layer.pass = pass, layer.keys = keys[i], layer.values = values[i];
  }
}

int64_t count() { return passed_by; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrserve, library) {
  library.def("attention_layer(str name, float scale, float softcap, int window, str isa) -> ()", layer);
  library.def("attention_forget() -> ()", forget);
  library.def(
      "attention_pass(str[] names, Tensor[] keys, Tensor[] values, Tensor starts, Tensor lengths, Tensor blocks, Tensor slots, "
      "Tensor schedule, int tokens, int rows, bool causal) -> ()",
      pass);
  library.def("attention_count() -> int", count);
}

TORCH_LIBRARY_IMPL(vllm, CPU, library) {
  library.impl("unified_attention_with_output", torch::CppFunction::makeFromBoxedFunction<&attend>());
}
