// ONNX Runtime operators of the domain "gog_edge": `CachedAttention`, `PatchAttention` and `BlockProduct`.
//
// Exported graphs refer to these names and to the names of their attributes, so neither may change.

#include <algorithm>
#include <atomic>
#include <climits>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>

#include "attention.h"
#include "matmul.h"
#include "ort_abi.h"

namespace {

const ort::Table* table;
constexpr const char* OUT_OF_MEMORY = "out of memory for the scratch buffers of a step";

struct Shape {
  int64_t at[4];
  size_t count;

  int64_t last(size_t from_end) const { return count > from_end ? at[count - 1 - from_end] : 1; }
  bool is(std::initializer_list<int64_t> other) const { return std::equal(at, at + count, other.begin(), other.end()); }
};

// The inputs and outputs of one kernel invocation. It keeps the first error, after which all pointers are null.
class Call {
 public:
  explicit Call(ort::KernelContext* context) : context_(context) {}

  ort::Status* error = nullptr;

  void fail(const char* message) {
    if (!error) error = table->failure(message);
  }

  // Returns null for an optional input that is not given.
  template <class Number>
  const Number* input(size_t index, Shape* shape = nullptr) {
    const ort::Value* value = nullptr;
    void* data = nullptr;
    if (!check(table->input(context_, index, &value)) || !value) return nullptr;
    if (shape) read(value, *shape);
    check(table->data_of(const_cast<ort::Value*>(value), &data));
    return error ? nullptr : static_cast<const Number*>(data);
  }

  template <class Number>
  Number* output(size_t index, const Shape& shape) {
    ort::Value* value = nullptr;
    void* data = nullptr;
    if (!error && check(table->output(context_, index, shape.at, shape.count, &value)))
      check(table->data_of(value, &data));
    return error ? nullptr : static_cast<Number*>(data);
  }

  // Returns a parallel loop on ONNX Runtime's threads. No exception may propagate through these: running out of memory
  // is reported after all of them have finished.
  gog::ParallelFor parallel_for() {
    struct Guarded {
      const gog::Work& work;
      std::atomic<bool> out_of_memory{false};
    };
    return [this](size_t count, const gog::Work& work) {
      Guarded guarded{work};
      const auto one = [](void* data, size_t index) {
        auto& guarded = *static_cast<Guarded*>(data);
        try {
          guarded.work(index);
        } catch (const std::bad_alloc&) {
          guarded.out_of_memory = true;
        }
      };
      check(table->parallel_for(context_, one, count, &guarded));
      if (guarded.out_of_memory) fail(OUT_OF_MEMORY);
    };
  }

 private:
  bool check(ort::Status* status) {
    if (!error) error = status;
    return !error;
  }

  void read(const ort::Value* value, Shape& shape) {
    ort::Shape* known = nullptr;
    if (!check(table->shape_of(value, &known))) return;
    if (check(table->dimension_count(known, &shape.count)) && shape.count > 4)
      fail("an input has more than 4 dimensions");
    if (!error) check(table->dimensions(known, shape.at, shape.count));
    table->release(known);
  }

  ort::KernelContext* context_;
};

// Attributes of a node. Once `error` is set, these do nothing.
int int_attribute(const ort::KernelInfo* info, const char* name, ort::Status** error) {
  int64_t found = 0;
  if (!*error) *error = table->attribute(info, name, &found);
  if (!*error && (found < INT_MIN || found > INT_MAX)) *error = table->failure("an attribute exceeds 32 bits");
  return static_cast<int>(found);
}

float float_attribute(const ort::KernelInfo* info, const char* name, ort::Status** error) {
  float found = 0;
  if (!*error) *error = table->attribute(info, name, &found);
  return found;
}

// qkv [1, tokens, (heads + 2 kv_heads) * width], past_key, past_value [1, kv_heads, capacity, width], total [],
// cos, sin [capacity, width / 2], q_norm, k_norm [width] -> out [1, tokens, heads * width], and the cache, updated in
// place
struct CachedAttention {
  static constexpr const char* NAME = "CachedAttention";
  static constexpr size_t INPUTS = 8, OUTPUTS = 3;
  static ort::Type input_type(size_t i) { return i == 1 || i == 2 ? ort::UINT16 : i == 3 ? ort::INT32 : ort::FLOAT; }
  static ort::Type output_type(size_t i) { return i ? ort::UINT16 : ort::FLOAT; }
  static ort::Presence presence(size_t i) { return i < 6 ? ort::REQUIRED : ort::OPTIONAL; }

  CachedAttention(const ort::KernelInfo* info, ort::Status** error) {
    shape.heads = int_attribute(info, "num_heads", error);
    shape.kv_heads = int_attribute(info, "kv_num_heads", error);
    shape.scale = float_attribute(info, "scale", error);
    shape.epsilon = float_attribute(info, "epsilon", error);
    if (!*error && (shape.kv_heads < 1 || shape.heads < 1 || shape.heads % shape.kv_heads))
      *error = table->failure("CachedAttention: num_heads must be a multiple of kv_num_heads");
  }

  void run(Call& call) const {
    gog::Attention attention = shape;
    Shape given{}, cache{}, values{}, rotary{}, sines{}, norms[2]{};
    const auto* qkv = call.input<float>(0, &given);
    const auto* past_key = call.input<uint16_t>(1, &cache);
    const auto* past_value = call.input<uint16_t>(2, &values);
    const auto* total = call.input<int32_t>(3);
    const auto* cos = call.input<float>(4, &rotary);
    const auto* sin = call.input<float>(5, &sines);
    attention.q_norm = call.input<float>(6, &norms[0]);
    attention.k_norm = call.input<float>(7, &norms[1]);
    if (call.error) return;
    const int64_t tokens = given.last(1), width = cache.last(0), capacity = cache.last(1);
    const int64_t heads = attention.heads, kv_heads = attention.kv_heads;
    if (width < 1 || width % gog::HEAD_WIDTH_MULTIPLE || width > gog::MAX_HEAD_WIDTH)
      return call.fail("CachedAttention: the width of a head must be a multiple of 32 up to 256");
    if (capacity % gog::KEYS) return call.fail("CachedAttention: the capacity of a cache must be a multiple of 64");
    if (!cache.is({1, kv_heads, capacity, width}) || !values.is({1, kv_heads, capacity, width}) ||
        !given.is({1, tokens, (heads + 2 * kv_heads) * width}))
      return call.fail("CachedAttention: cache and projections have different heads");
    if (!rotary.is({rotary.last(1), width / 2}) || !sines.is({rotary.last(1), width / 2}))
      return call.fail("CachedAttention: the rotary tables must be half as wide as a head");
    if ((attention.q_norm && !norms[0].is({width})) || (attention.k_norm && !norms[1].is({width})))
      return call.fail("CachedAttention: a norm must be as wide as a head");
    if (*total < tokens || *total > capacity || *total > rotary.last(1))
      return call.fail("CachedAttention: the tokens do not fit the cache");
    auto* out = call.output<float>(0, {{1, tokens, heads * width}, 3});
    auto* key = call.output<uint16_t>(1, cache);
    auto* value = call.output<uint16_t>(2, cache);
    if (call.error) return;
    if (key != past_key || value != past_value)
      return call.fail("CachedAttention: each cache must be bound both as input and as output");
    attention.width = static_cast<int>(width);
    attention.run(qkv, static_cast<int>(tokens), static_cast<int>(*total - tokens), cos, sin, key, value, capacity, out,
                  call.parallel_for());
  }

  gog::Attention shape{};
};

// qkv [1, patches, 3 * heads * width], cos, sin [1, patches, width / 2], window_slots [windows, slots],
// window_mask [windows, 1, slots, slots] -> out [1, patches, heads * width]
//
// A slot holds a patch if the first row of its window's mask is true there; the other rows are equal. Without windows
// all patches attend to each other.
struct PatchAttention {
  static constexpr const char* NAME = "PatchAttention";
  static constexpr size_t INPUTS = 5, OUTPUTS = 1;
  static ort::Type input_type(size_t i) { return i == 3 ? ort::INT64 : i == 4 ? ort::BOOL : ort::FLOAT; }
  static ort::Type output_type(size_t) { return ort::FLOAT; }
  static ort::Presence presence(size_t i) { return i < 3 ? ort::REQUIRED : ort::OPTIONAL; }

  PatchAttention(const ort::KernelInfo* info, ort::Status** error) {
    shape.heads = int_attribute(info, "num_heads", error);
    shape.scale = float_attribute(info, "scale", error);
    if (!*error && shape.heads < 1) *error = table->failure("PatchAttention: num_heads must be at least 1");
  }

  void run(Call& call) const {
    gog::PatchAttention attention = shape;
    Shape given{}, rotary{}, sines{}, slotted{}, masked{};
    const auto* qkv = call.input<float>(0, &given);
    const auto* cos = call.input<float>(1, &rotary);
    const auto* sin = call.input<float>(2, &sines);
    const auto* slots = call.input<int64_t>(3, &slotted);
    const auto* mask = call.input<bool>(4, &masked);
    if (call.error) return;
    const int64_t patches = given.last(1), heads = attention.heads, width = given.last(0) / 3 / heads;
    if (width < 1 || width % 2 || width > gog::MAX_HEAD_WIDTH || !given.is({1, patches, 3 * heads * width}))
      return call.fail("PatchAttention: the width of a head must be even and at most 256");
    if (!rotary.is({1, patches, width / 2}) || !sines.is({1, patches, width / 2}))
      return call.fail("PatchAttention: the rotary tables must have a row for each patch, half as wide as a head");
    const int64_t windows = slotted.last(1), each = slotted.last(0);
    const bool windowed = slotted.count || masked.count;  // the pointers are also null for empty tensors
    if (windowed && (!slotted.is({windows, each}) || !masked.is({windows, 1, each, each})))
      return call.fail("PatchAttention: window_mask must have shape [windows, 1, slots, slots]");
    std::vector<gog::Window> found(windowed ? windows : 1);
    std::vector<bool> seen(patches);
    for (int64_t i = 0; windowed && i < windows * each; ++i) {
      const int64_t window = i / each, patch = slots[i];
      if (!mask[window * each * each + i % each]) continue;
      if (patch < 0 || patch >= patches || seen[patch])
        return call.fail("PatchAttention: a slot holds an index out of range, or a patch is in two windows");
      seen[patch] = true;
      found[window].push_back(patch);
    }
    for (int64_t patch = 0; !windowed && patch < patches; ++patch) found[0].push_back(patch);
    if (windowed && !std::all_of(seen.begin(), seen.end(), [](bool one) { return one; }))
      return call.fail("PatchAttention: a patch is in none of the windows");
    auto* out = call.output<float>(0, {{1, patches, heads * width}, 3});
    attention.width = static_cast<int>(width);
    if (!call.error) attention.run(qkv, cos, sin, found, out, call.parallel_for());
  }

  gog::PatchAttention shape{};
};

// left [..., K], weights [bytes], scales [elements / block_size], bias [panels * 64] -> out [..., N]; see matmul.h for
// the layout of the weights
struct BlockProduct {
  static constexpr const char* NAME = "BlockProduct";
  static constexpr size_t INPUTS = 4, OUTPUTS = 1;
  static ort::Type input_type(size_t i) { return i == 1 ? ort::UINT8 : ort::FLOAT; }
  static ort::Type output_type(size_t) { return ort::FLOAT; }
  static ort::Presence presence(size_t i) { return i < 3 ? ort::REQUIRED : ort::OPTIONAL; }

  BlockProduct(const ort::KernelInfo* info, ort::Status** error) {
    shape.rows = int_attribute(info, "K", error);
    shape.columns = int_attribute(info, "N", error);
    shape.bits = int_attribute(info, "bits", error);
    shape.block = int_attribute(info, "block_size", error);
    shape.gated = int_attribute(info, "gated", error) != 0;
    if (!*error && !gog::supported(shape))
      *error = table->failure(
          "BlockProduct: bits must be 4 or 8, block_size a multiple of 32 up to 256, and K and N positive");
  }

  void run(Call& call) const {
    gog::QuantizedMatmul matmul = shape;
    Shape given{}, bytes{}, scales{}, bias{};
    const auto* left = call.input<float>(0, &given);
    matmul.weights = call.input<uint8_t>(1, &bytes);
    matmul.scales = call.input<float>(2, &scales);
    matmul.bias = call.input<float>(3, &bias);
    if (call.error) return;
    const int64_t elements = matmul.elements();
    if (!given.count || given.last(0) != matmul.rows || !bytes.is({elements * matmul.bits / 8}) ||
        !scales.is({elements / matmul.block}) || (matmul.bias && !bias.is({matmul.panels() * gog::PANEL})))
      return call.fail("BlockProduct: an input does not have the shape that the attributes require");
    int64_t count = 1;
    for (size_t i = 0; i + 1 < given.count; ++i) count *= given.at[i];
    given.at[given.count - 1] = matmul.columns;
    auto* out = call.output<float>(0, given);
    if (!call.error) matmul.run(left, static_cast<int>(count), out, call.parallel_for());
  }

  gog::QuantizedMatmul shape{};
};

template <class Kernel>
struct OperatorOf : ort::Operator {
  OperatorOf() {
    name = [](const ort::Operator*) { return Kernel::NAME; };
    inputs = [](const ort::Operator*) { return Kernel::INPUTS; };
    outputs = [](const ort::Operator*) { return Kernel::OUTPUTS; };
    input_type = [](const ort::Operator*, size_t index) { return Kernel::input_type(index); };
    output_type = [](const ort::Operator*, size_t index) { return Kernel::output_type(index); };
    input_presence = [](const ort::Operator*, size_t index) { return Kernel::presence(index); };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    try_create = [](const ort::Operator*, const ort::Table*, const ort::KernelInfo* info, void** out) {
      ort::Status* error = nullptr;
      auto kernel = std::make_unique<Kernel>(info, &error);
      if (!error) *out = kernel.release();
      return error;
    };
    try_compute = [](void* kernel, ort::KernelContext* context) {
      Call call(context);
      try {
        static_cast<const Kernel*>(kernel)->run(call);
      } catch (const std::bad_alloc&) {
        call.fail(OUT_OF_MEMORY);
      }
      return call.error;
    };
  }
};

}  // namespace

// Called by `SessionOptions.register_custom_ops_library`.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::Base* base) {
  static const OperatorOf<CachedAttention> attention;
  static const OperatorOf<PatchAttention> patches;
  static const OperatorOf<BlockProduct> matmul;
  static ort::Domain* domain = nullptr;  // must outlive all sessions
  static std::mutex mutex;
  const std::lock_guard<std::mutex> guard(mutex);
  table = base->table(ort::VERSION);
  if (!domain) {
    ort::Domain* created = nullptr;
    if (ort::Status* error = table->new_domain("gog_edge", &created)) return error;
    for (const ort::Operator* added : std::initializer_list<const ort::Operator*>{&attention, &patches, &matmul})
      if (ort::Status* error = table->add_operator(created, added)) return error;
    domain = created;
  }
  return table->add_domain(options, domain);
}
