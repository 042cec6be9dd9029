// The operators of the domain "gog_edge", for ONNX Runtime: `CachedAttention`, `PatchAttention` and `BlockProduct`.

#include <algorithm>
#include <atomic>
#include <climits>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>

#include "attention.h"
#include "ort_abi.h"
#include "product.h"

namespace {

const ort::Table* table;
constexpr const char* STARVED = "no memory for a step's scratch";

struct Shape {
  int64_t at[4];
  size_t count;

  int64_t last(size_t from_end) const { return count > from_end ? at[count - 1 - from_end] : 1; }
  bool is(std::initializer_list<int64_t> other) const { return std::equal(at, at + count, other.begin(), other.end()); }
};

// A step's inputs and outputs. The first failure is kept; after it everything is null.
class Call {
 public:
  explicit Call(ort::KernelContext* context) : context_(context) {}

  ort::Status* failed = nullptr;

  void refuse(const char* why) {
    if (!failed) failed = table->failure(why);
  }

  // Null where an optional one is not given.
  template <class Number>
  const Number* input(size_t index, Shape* shape = nullptr) {
    const ort::Value* value = nullptr;
    void* data = nullptr;
    if (!check(table->input(context_, index, &value)) || !value) return nullptr;
    if (shape) read(value, *shape);
    check(table->data_of(const_cast<ort::Value*>(value), &data));
    return failed ? nullptr : static_cast<const Number*>(data);
  }

  template <class Number>
  Number* output(size_t index, const Shape& shape) {
    ort::Value* value = nullptr;
    void* data = nullptr;
    if (!failed && check(table->output(context_, index, shape.at, shape.count, &value)))
      check(table->data_of(value, &data));
    return failed ? nullptr : static_cast<Number*>(data);
  }

  // No exception may pass through ONNX Runtime's threads: what has no memory is refused when all have ended.
  gog::Parallel parallel() {
    struct Guarded {
      const gog::Work& work;
      std::atomic<bool> starved{false};
    };
    return [this](size_t count, const gog::Work& work) {
      Guarded guarded{work};
      const auto one = [](void* data, size_t index) {
        auto& guarded = *static_cast<Guarded*>(data);
        try {
          guarded.work(index);
        } catch (const std::bad_alloc&) {
          guarded.starved = true;
        }
      };
      check(table->parallel(context_, one, count, &guarded));
      if (guarded.starved) refuse(STARVED);
    };
  }

 private:
  bool check(ort::Status* status) {
    if (!failed) failed = status;
    return !failed;
  }

  void read(const ort::Value* value, Shape& shape) {
    ort::Shape* known = nullptr;
    if (!check(table->shape_of(value, &known))) return;
    if (check(table->dimension_count(known, &shape.count)) && shape.count > 4) refuse("an input has many dimensions");
    if (!failed) check(table->dimensions(known, shape.at, shape.count));
    table->release(known);
  }

  ort::KernelContext* context_;
};

int whole(const ort::KernelInfo* info, const char* name, ort::Status** failed) {
  int64_t found = 0;
  if (!*failed) *failed = table->attribute(info, name, &found);
  if (!*failed && (found < INT_MIN || found > INT_MAX)) *failed = table->failure("an attribute is far too large");
  return static_cast<int>(found);
}

float real(const ort::KernelInfo* info, const char* name, ort::Status** failed) {
  float found = 0;
  if (!*failed) *failed = table->attribute(info, name, &found);
  return found;
}

// qkv [1, tokens, (heads + 2 kv_heads) * width], past_key, past_value [1, kv_heads, capacity, width], total [],
// cos, sin [capacity, width / 2], q_norm, k_norm [width] -> attended [1, tokens, heads * width], the cache in place
struct CachedAttention {
  static constexpr const char* NAME = "CachedAttention";
  static constexpr size_t INPUTS = 8, OUTPUTS = 3;
  static ort::Type input_type(size_t i) { return i == 1 || i == 2 ? ort::UINT16 : i == 3 ? ort::INT32 : ort::FLOAT; }
  static ort::Type output_type(size_t i) { return i ? ort::UINT16 : ort::FLOAT; }
  static ort::Presence presence(size_t i) { return i < 6 ? ort::REQUIRED : ort::OPTIONAL; }

  CachedAttention(const ort::KernelInfo* info, ort::Status** failed) {
    shape.heads = whole(info, "num_heads", failed);
    shape.kv_heads = whole(info, "kv_num_heads", failed);
    shape.scale = real(info, "scale", failed);
    shape.epsilon = real(info, "epsilon", failed);
    if (!*failed && (shape.kv_heads < 1 || shape.heads < 1 || shape.heads % shape.kv_heads))
      *failed = table->failure("CachedAttention: heads are no multiple of kv_heads");
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
    if (call.failed) return;
    const int64_t tokens = given.last(1), width = cache.last(0), capacity = cache.last(1);
    const int64_t heads = attention.heads, kv_heads = attention.kv_heads;
    if (width < 1 || width % gog::WIDTHS || width > gog::WIDEST)
      return call.refuse("CachedAttention: heads must be a multiple of 32 wide, 256 at the most");
    if (capacity % gog::KEYS) return call.refuse("CachedAttention: a cache's capacity must be a multiple of 64");
    if (!cache.is({1, kv_heads, capacity, width}) || !values.is({1, kv_heads, capacity, width}) ||
        !given.is({1, tokens, (heads + 2 * kv_heads) * width}))
      return call.refuse("CachedAttention: the cache has other heads than the projections");
    if (!rotary.is({rotary.last(1), width / 2}) || !sines.is({rotary.last(1), width / 2}))
      return call.refuse("CachedAttention: the rotary tables are not half as wide as a head");
    if ((attention.q_norm && !norms[0].is({width})) || (attention.k_norm && !norms[1].is({width})))
      return call.refuse("CachedAttention: a norm is not as wide as a head");
    if (*total < tokens || *total > capacity || *total > rotary.last(1))
      return call.refuse("CachedAttention: the tokens do not fit the cache");
    auto* out = call.output<float>(0, {{1, tokens, heads * width}, 3});
    auto* key = call.output<uint16_t>(1, cache);
    auto* value = call.output<uint16_t>(2, cache);
    if (call.failed) return;
    if (key != past_key || value != past_value)
      return call.refuse("CachedAttention: bind each cache as input and as output");
    attention.width = static_cast<int>(width);
    attention.run(qkv, static_cast<int>(tokens), static_cast<int>(*total - tokens), cos, sin, key, value, capacity, out,
                  call.parallel());
  }

  gog::Attention shape{};
};

// qkv [1, patches, 3 * heads * width], cos, sin [1, patches, width / 2], window_slots [windows, slots],
// window_mask [windows, 1, slots, slots] -> attended [1, patches, heads * width]
//
// A slot holds a patch where the first row of its window's mask lets it be seen; the other rows are alike. Without
// windows every patch sees every other.
struct PatchAttention {
  static constexpr const char* NAME = "PatchAttention";
  static constexpr size_t INPUTS = 5, OUTPUTS = 1;
  static ort::Type input_type(size_t i) { return i == 3 ? ort::INT64 : i == 4 ? ort::BOOL : ort::FLOAT; }
  static ort::Type output_type(size_t) { return ort::FLOAT; }
  static ort::Presence presence(size_t i) { return i < 3 ? ort::REQUIRED : ort::OPTIONAL; }

  PatchAttention(const ort::KernelInfo* info, ort::Status** failed) {
    shape.heads = whole(info, "num_heads", failed);
    shape.scale = real(info, "scale", failed);
    if (!*failed && shape.heads < 1) *failed = table->failure("PatchAttention: there must be a head");
  }

  void run(Call& call) const {
    gog::PatchAttention attention = shape;
    Shape given{}, rotary{}, sines{}, slotted{}, masked{};
    const auto* qkv = call.input<float>(0, &given);
    const auto* cos = call.input<float>(1, &rotary);
    const auto* sin = call.input<float>(2, &sines);
    const auto* slots = call.input<int64_t>(3, &slotted);
    const auto* mask = call.input<bool>(4, &masked);
    if (call.failed) return;
    const int64_t patches = given.last(1), heads = attention.heads, width = given.last(0) / 3 / heads;
    if (width < 1 || width % 2 || width > gog::WIDEST || !given.is({1, patches, 3 * heads * width}))
      return call.refuse("PatchAttention: heads must be of an even width, 256 at the most");
    if (!rotary.is({1, patches, width / 2}) || !sines.is({1, patches, width / 2}))
      return call.refuse("PatchAttention: each patch must have rotary angles half as wide as a head");
    const int64_t windows = slotted.last(1), each = slotted.last(0);
    const bool windowed = slotted.count || masked.count;  // what is given and has no numbers is null, too
    if (windowed && (!slotted.is({windows, each}) || !masked.is({windows, 1, each, each})))
      return call.refuse("PatchAttention: windows must have slots, and a mask of the same");
    std::vector<gog::Window> found(windowed ? windows : 1);
    std::vector<bool> seen(patches);
    for (int64_t i = 0; windowed && i < windows * each; ++i) {
      const int64_t window = i / each, patch = slots[i];
      if (!mask[window * each * each + i % each]) continue;
      if (patch < 0 || patch >= patches || seen[patch])
        return call.refuse("PatchAttention: a patch is in two windows, or is none");
      seen[patch] = true;
      found[window].push_back(patch);
    }
    for (int64_t patch = 0; !windowed && patch < patches; ++patch) found[0].push_back(patch);
    if (windowed && !std::all_of(seen.begin(), seen.end(), [](bool one) { return one; }))
      return call.refuse("PatchAttention: a patch is in no window");
    auto* out = call.output<float>(0, {{1, patches, heads * width}, 3});
    attention.width = static_cast<int>(width);
    if (!call.failed) attention.run(qkv, cos, sin, found, out, call.parallel());
  }

  gog::PatchAttention shape{};
};

// left [..., K], weights [bytes], scales [numbers / block_size], bias [panels * 64] -> [..., N]
struct BlockProduct {
  static constexpr const char* NAME = "BlockProduct";
  static constexpr size_t INPUTS = 4, OUTPUTS = 1;
  static ort::Type input_type(size_t i) { return i == 1 ? ort::UINT8 : ort::FLOAT; }
  static ort::Type output_type(size_t) { return ort::FLOAT; }
  static ort::Presence presence(size_t i) { return i < 3 ? ort::REQUIRED : ort::OPTIONAL; }

  BlockProduct(const ort::KernelInfo* info, ort::Status** failed) {
    shape.rows = whole(info, "K", failed);
    shape.columns = whole(info, "N", failed);
    shape.bits = whole(info, "bits", failed);
    shape.block = whole(info, "block_size", failed);
    shape.gated = whole(info, "gated", failed) != 0;
    if (!*failed && !gog::fits(shape)) *failed = table->failure("BlockProduct: these weights are not to be had");
  }

  void run(Call& call) const {
    gog::Product product = shape;
    Shape given{}, bytes{}, scales{}, bias{};
    const auto* left = call.input<float>(0, &given);
    product.weights = call.input<uint8_t>(1, &bytes);
    product.scales = call.input<float>(2, &scales);
    product.bias = call.input<float>(3, &bias);
    if (call.failed) return;
    const int64_t numbers = product.numbers();
    if (!given.count || given.last(0) != product.rows || !bytes.is({numbers * product.bits / 8}) ||
        !scales.is({numbers / product.block}) || (product.bias && !bias.is({product.panels() * gog::PANEL})))
      return call.refuse("BlockProduct: factors of other shapes");
    int64_t count = 1;
    for (size_t i = 0; i + 1 < given.count; ++i) count *= given.at[i];
    given.at[given.count - 1] = product.columns;
    auto* out = call.output<float>(0, given);
    if (!call.failed) product.run(left, static_cast<int>(count), out, call.parallel());
  }

  gog::Product shape{};
};

template <class Kernel>
struct Described : ort::Operator {
  Described() {
    name = [](const ort::Operator*) { return Kernel::NAME; };
    inputs = [](const ort::Operator*) { return Kernel::INPUTS; };
    outputs = [](const ort::Operator*) { return Kernel::OUTPUTS; };
    input_type = [](const ort::Operator*, size_t index) { return Kernel::input_type(index); };
    output_type = [](const ort::Operator*, size_t index) { return Kernel::output_type(index); };
    input_presence = [](const ort::Operator*, size_t index) { return Kernel::presence(index); };
    destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    try_create = [](const ort::Operator*, const ort::Table*, const ort::KernelInfo* info, void** out) {
      ort::Status* failed = nullptr;
      auto kernel = std::make_unique<Kernel>(info, &failed);
      if (!failed) *out = kernel.release();
      return failed;
    };
    try_compute = [](void* kernel, ort::KernelContext* context) {
      Call call(context);
      try {
        static_cast<const Kernel*>(kernel)->run(call);
      } catch (const std::bad_alloc&) {
        call.refuse(STARVED);
      }
      return call.failed;
    };
  }
};

}  // namespace

// Called by `SessionOptions.register_custom_ops_library`.
extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                                 const ort::Base* base) {
  static const Described<CachedAttention> attention;
  static const Described<PatchAttention> patches;
  static const Described<BlockProduct> product;
  static ort::Domain* domain = nullptr;  // outlives every session
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  table = base->table(ort::VERSION);
  if (!domain) {
    ort::Domain* made = nullptr;
    if (ort::Status* failed = table->new_domain("gog_edge", &made)) return failed;
    for (const ort::Operator* added : std::initializer_list<const ort::Operator*>{&attention, &patches, &product})
      if (ort::Status* failed = table->add_operator(made, added)) return failed;
    domain = made;
  }
  return table->add_domain(options, domain);
}
