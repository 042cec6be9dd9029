// The part of ONNX Runtime's C API that custom operators need.
//
// ONNX Runtime guarantees that the functions of `OrtApi` keep their positions and that `OrtCustomOp` is only extended
// (https://onnxruntime.ai/docs/reference/operators/add-custom-op.html). Therefore both can be declared here without
// onnxruntime_c_api.h, which the Python package does not contain. The indices are the positions in `OrtApi`.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t VERSION = 17;  // of the API: the first with KernelContext_ParallelFor

struct Status;
struct Value;
struct Shape;
struct Domain;
struct SessionOptions;
struct KernelInfo;
struct KernelContext;
struct Operator;

struct Table {
  void* functions[278];

  template <int INDEX, class... Arguments>
  Status* call(Arguments... arguments) const {
    return reinterpret_cast<Status* (*)(Arguments...)>(functions[INDEX])(arguments...);
  }

  Status* failure(const char* message) const { return call<0, int, const char*>(2, message); }  // ORT_INVALID_ARGUMENT
  Status* new_domain(const char* name, Domain** out) const { return call<26>(name, out); }
  Status* add_operator(Domain* domain, const Operator* added) const { return call<27>(domain, added); }
  Status* add_domain(SessionOptions* options, Domain* domain) const { return call<28>(options, domain); }
  Status* data_of(Value* value, void** out) const { return call<51>(value, out); }
  Status* dimension_count(const Shape* shape, size_t* out) const { return call<61>(shape, out); }
  Status* dimensions(const Shape* shape, int64_t* out, size_t count) const { return call<62>(shape, out, count); }
  Status* shape_of(const Value* value, Shape** out) const { return call<65>(value, out); }
  Status* attribute(const KernelInfo* info, const char* name, float* out) const { return call<85>(info, name, out); }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* out) const { return call<86>(info, name, out); }
  Status* input(const KernelContext* context, size_t index, const Value** out) const {
    return call<90>(context, index, out);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* shape, size_t count, Value** out) const {
    return call<91>(context, index, shape, count, out);
  }
  void release(Shape* shape) const { reinterpret_cast<void (*)(Shape*)>(functions[99])(shape); }
  Status* parallel_for(const KernelContext* context, void (*work)(void*, size_t), size_t count, void* data) const {
    return call<274>(context, work, count, size_t{0}, data);
  }
};

struct Base {
  const Table* (*table)(uint32_t version) noexcept;
  const char* (*release)() noexcept;
};

enum Type { FLOAT = 1, UINT8 = 2, UINT16 = 4, INT32 = 6, INT64 = 7, BOOL = 9 };
enum Presence { REQUIRED, OPTIONAL };

// `OrtCustomOp`
struct Operator {
  uint32_t version = VERSION;
  void* (*create)(const Operator*, const Table*, const KernelInfo*) = nullptr;
  const char* (*name)(const Operator*) = nullptr;
  const char* (*provider)(const Operator*) = [](const Operator*) -> const char* { return nullptr; };
  Type (*input_type)(const Operator*, size_t) = nullptr;
  size_t (*inputs)(const Operator*) = nullptr;
  Type (*output_type)(const Operator*, size_t) = nullptr;
  size_t (*outputs)(const Operator*) = nullptr;
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  Presence (*input_presence)(const Operator*, size_t) = nullptr;
  Presence (*output_presence)(const Operator*, size_t) = [](const Operator*, size_t) { return REQUIRED; };
  int (*input_memory)(const Operator*, size_t) = [](const Operator*, size_t) { return 0; };
  int (*variadic[4])(const Operator*) = {one, one, one, one};
  Status* (*try_create)(const Operator*, const Table*, const KernelInfo*, void**) = nullptr;
  Status* (*try_compute)(void*, KernelContext*) = nullptr;
  void* infer_shape = nullptr;
  int (*first_version)(const Operator*) = one;
  int (*last_version)(const Operator*) = one;
  void* in_place[4] = {};

  static int one(const Operator*) { return 1; }
};

}  // namespace ort
