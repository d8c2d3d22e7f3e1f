// What lies between a compiled graph and vLLM's attention on the CPU, without Python: attention.py says when it may be passed by.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/narrow.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

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
  std::string name;
  at::Tensor keys, values;  // halves of its cache
  double scale, softcap;
  int64_t window;
  std::string isa;
};

using Group = std::vector<std::shared_ptr<const Layer>>;

std::unordered_map<int64_t, Group> groups;
int64_t last_group = 0;

// Layers of the forward pass under way that have not attended yet.
struct Entry {
  std::shared_ptr<const Layer> layer;
  std::shared_ptr<const Pass> pass;
};

std::unordered_map<std::string, Entry> entries;
int64_t passed_by = 0;

c10::OperatorHandle find(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

// What a layer attends by, which is used up with that.
Entry take(const IValue& layer_name) {
  if (!layer_name.isString()) return {};
  const auto found = entries.find(layer_name.toStringRef());
  return found == entries.end() ? Entry{} : std::exchange(found->second, {});
}

at::Tensor first(const at::Tensor& rows, int64_t count) { return rows.size(0) <= count ? rows : rows.narrow(0, 0, count); }

// vLLM's `unified_attention_with_output` (query, key, value, output, layer_name, output_scale, output_block_scale, kv_cache_dummy_dep).
void attend(const c10::OperatorHandle&, Stack* stack) {
  constexpr size_t kArguments = 8;
  TORCH_CHECK(stack->size() >= kArguments, "unified_attention_with_output has other arguments than lrserve knows");
  const IValue* arguments = stack->data() + stack->size() - kArguments;
  const int64_t rows = arguments[0].toTensor().size(0);
  Entry entry = take(arguments[4]);
  if (!entry.pass) {
    static const c10::OperatorHandle enter = find("lrserve::attention_enter");
    Stack entering{arguments[4], rows};
    enter.callBoxed(entering);
    entry = take(arguments[4]);
  }
  const auto& [layer, pass] = entry;
  if (!pass || arguments[1].isNone() || arguments[2].isNone() || !arguments[5].isNone() || !arguments[6].isNone() || rows != pass->rows) {
    static const c10::OperatorHandle python = find("lrserve::attention_in_python");
    python.callBoxed(stack);
    return;
  }
  const int64_t stored = pass->slots.size(0);

  static const c10::OperatorHandle store = find("_C::cpu_attn_reshape_and_cache");
  Stack storing{first(arguments[1].toTensor(), stored), first(arguments[2].toTensor(), stored), layer->keys, layer->values,
                pass->slots, layer->isa, 1.0, 1.0, "auto"};
  store.callBoxed(storing);

  static const c10::OperatorHandle attention = find("_C::cpu_attention_with_kv_cache");
  Stack attending{first(arguments[0].toTensor(), pass->tokens), layer->keys, layer->values,
                  first(arguments[3].toTensor(), pass->tokens), pass->starts, pass->lengths, layer->scale, pass->causal, IValue(),
                  layer->window, pass->blocks, layer->softcap, pass->schedule, IValue(), IValue(), 1.0, 1.0, "auto"};
  attention.callBoxed(attending);

  ++passed_by;
  torch::jit::drop(*stack, kArguments);
}

int64_t group(c10::List<std::string> names, at::TensorList keys, at::TensorList values, at::ArrayRef<double> scales,
              at::ArrayRef<double> softcaps, at::IntArrayRef windows, c10::List<std::string> isas) {
  for (const size_t number : {keys.size(), values.size(), scales.size(), softcaps.size(), windows.size(), isas.size()})
    TORCH_CHECK(number == names.size(), "attention_group: one of each for each layer");
  Group& layers = groups[++last_group];
  for (size_t i = 0; i < names.size(); ++i) {
    Layer layer{names.get(i), keys[i], values[i], scales[i], softcaps[i], windows[i], isas.get(i)};
    layers.push_back(std::make_shared<const Layer>(std::move(layer)));
  }
  return last_group;
}

void drop(int64_t number) { groups.erase(number); }

void forget() {
  for (auto& [name, entry] : entries) entry = {};
}

void pass(int64_t number, at::Tensor starts, at::Tensor lengths, at::Tensor blocks, at::Tensor slots, at::Tensor schedule,
          int64_t tokens, int64_t rows, bool causal) {
  const auto pass = std::make_shared<const Pass>(Pass{std::move(starts), std::move(lengths), std::move(blocks), std::move(slots),
                                                      std::move(schedule), tokens, rows, causal});
  for (const auto& layer : groups.at(number)) entries[layer->name] = {layer, pass};
}

int64_t count() { return passed_by; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrserve, library) {
  library.def(
      "attention_group(str[] names, Tensor[] keys, Tensor[] values, float[] scales, float[] softcaps, int[] windows, str[] isas) -> int",
      group);
  library.def("attention_drop(int group) -> ()", drop);
  library.def("attention_forget() -> ()", forget);
  library.def(
      "attention_pass(int group, Tensor starts, Tensor lengths, Tensor blocks, Tensor slots, Tensor schedule, int tokens, int rows, "
      "bool causal) -> ()",
      pass);
  library.def("attention_count() -> int", count);
}

TORCH_LIBRARY_IMPL(vllm, CPU, library) {
  library.impl("unified_attention_with_output", torch::CppFunction::makeFromBoxedFunction<&attend>());
}
