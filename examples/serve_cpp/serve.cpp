// A program that serves a condensed file with ONNX Runtime alone: no Python, no PyTorch, no srigl_fx.
//
//   serve MODEL LIBRARY THREADS NAME:TYPE:SHAPE:FILE...
//
// MODEL is a file of export_onnx or condense_onnx; LIBRARY is the operator library, or "-" to run the fallback that is in
// the file. Each input is its name, its type (float32, int64, int32, uint8, int8), its shape (such as 1x128) and a file of
// its numbers as they lie in memory. The program runs the model, writes outputs to output_0.bin, output_1.bin, ... in the
// current folder, and prints their names and shapes and the median time of 21 calls.
//
// docs/onnx.md says how it is built. It needs ONNX Runtime's header, or the part of it that lies beside this file.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace {

const OrtApi* ort = nullptr;

// ONNX Runtime reports errors as objects; each becomes an exception with its words.
void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

struct Type {
  const char* name;
  ONNXTensorElementDataType element;
  size_t bytes;
};

constexpr Type types[] = {
    {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}, {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},
    {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},   {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
    {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},
};

struct Input {
  std::string name;
  const Type* type = nullptr;
  std::vector<int64_t> shape;
  std::vector<char> data;  // what the tensor points to: it must live as long
};

size_t elements(const std::vector<int64_t>& shape) {
  size_t product = 1;
  for (const int64_t size : shape) product *= static_cast<size_t>(size);
  return product;
}

// Reads NAME:TYPE:SHAPE:FILE.
Input parse(const std::string& text) {
  std::vector<std::string> parts(3);  // from the right, as names may hold colons
  std::string rest = text;
  for (size_t i = 0; i < 3; ++i) {
    const size_t at = rest.rfind(':');
    if (at == std::string::npos) throw std::runtime_error("'" + text + "' is not NAME:TYPE:SHAPE:FILE");
    parts[2 - i] = rest.substr(at + 1);
    rest.resize(at);
  }
  const std::string& path = parts[2];
  Input input;
  input.name = rest;
  for (const Type& type : types)
    if (parts[0] == type.name) input.type = &type;
  if (input.type == nullptr) throw std::runtime_error("'" + parts[0] + "' is no type that this program knows");
  const char* at = parts[1].c_str();
  while (!parts[1].empty()) {  // a tensor without axes has an empty shape
    char* end = nullptr;
    const long long size = std::strtoll(at, &end, 10);
    if (end == at || size < 0 || (*end != '\0' && *end != 'x'))
      throw std::runtime_error("'" + parts[1] + "' is no shape such as 1x128");
    input.shape.push_back(size);
    if (*end == '\0') break;
    at = end + 1;
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  input.data.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  const size_t bytes = elements(input.shape) * input.type->bytes;
  if (input.data.size() != bytes)
    throw std::runtime_error(path + " holds " + std::to_string(input.data.size()) + " bytes, and " + parts[1] + " of " +
                             parts[0] + " take " + std::to_string(bytes));
  return input;
}

// Writes an output as it lies in memory, and prints its name and shape. The file is named by the program: a name in a model
// may be any text, a path among them.
void write(size_t index, const char* name, OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  check(ort->GetDimensionsCount(info, &rank));
  std::vector<int64_t> shape(rank);
  check(ort->GetDimensions(info, shape.data(), rank));
  ONNXTensorElementDataType element;
  check(ort->GetTensorElementType(info, &element));
  ort->ReleaseTensorTypeAndShapeInfo(info);

  const Type* type = nullptr;
  for (const Type& known : types)
    if (known.element == element) type = &known;
  if (type == nullptr) throw std::runtime_error(std::string("the type of output ") + name + " is not known here");
  void* data = nullptr;
  check(ort->GetTensorMutableData(value, &data));
  const std::string path = "output_" + std::to_string(index) + ".bin";
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(elements(shape) * type->bytes));
  if (!file) throw std::runtime_error("cannot write " + path);

  std::printf("%s: %s %s ", path.c_str(), name, type->name);
  for (size_t axis = 0; axis < rank; ++axis)
    std::printf(axis == 0 ? "%lld" : "x%lld", static_cast<long long>(shape[axis]));
  std::printf("\n");
}

void serve(int count, char** arguments) {
  std::vector<Input> inputs;
  for (int i = 4; i < count; ++i) inputs.push_back(parse(arguments[i]));

  const int threads = std::atoi(arguments[3]);
  if (threads < 1) throw std::runtime_error(std::string("'") + arguments[3] + "' is no number of threads");

  OrtEnv* environment = nullptr;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "serve", &environment));
  OrtSessionOptions* options = nullptr;
  check(ort->CreateSessionOptions(&options));
  check(ort->SetIntraOpNumThreads(options, threads));
  // The library stays loaded until the process ends, as its operators are used by every session of these options.
  void* library = nullptr;
  if (std::string(arguments[2]) != "-") check(ort->RegisterCustomOpsLibrary(options, arguments[2], &library));
  OrtSession* session = nullptr;
  check(ort->CreateSession(environment, arguments[1], options, &session));

  OrtMemoryInfo* memory = nullptr;
  check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  std::vector<const char*> input_names;
  std::vector<OrtValue*> values;
  for (Input& input : inputs) {
    OrtValue* value = nullptr;
    check(ort->CreateTensorWithDataAsOrtValue(memory, input.data.data(), input.data.size(), input.shape.data(),
                                              input.shape.size(), input.type->element, &value));
    input_names.push_back(input.name.c_str());
    values.push_back(value);
  }

  OrtAllocator* allocator = nullptr;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  size_t n_outputs = 0;
  check(ort->SessionGetOutputCount(session, &n_outputs));
  std::vector<const char*> output_names;
  for (size_t i = 0; i < n_outputs; ++i) {
    char* name = nullptr;
    check(ort->SessionGetOutputName(session, i, allocator, &name));
    output_names.push_back(name);
  }

  std::vector<double> microseconds;
  std::vector<OrtValue*> outputs;
  for (int call = 0; call < 21; ++call) {
    for (OrtValue* output : outputs) ort->ReleaseValue(output);
    outputs.assign(n_outputs, nullptr);
    const auto begin = std::chrono::steady_clock::now();
    check(ort->Run(session, nullptr, input_names.data(), values.data(), values.size(), output_names.data(), n_outputs,
                   outputs.data()));
    microseconds.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  for (size_t i = 0; i < n_outputs; ++i) write(i, output_names[i], outputs[i]);
  std::nth_element(microseconds.begin(), microseconds.begin() + 10, microseconds.end());
  std::printf("median of a call: %.0f us\n", microseconds[10]);

  for (OrtValue* output : outputs) ort->ReleaseValue(output);
  for (OrtValue* value : values) ort->ReleaseValue(value);
  ort->ReleaseMemoryInfo(memory);
  ort->ReleaseSession(session);
  ort->ReleaseSessionOptions(options);
  ort->ReleaseEnv(environment);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "serve MODEL LIBRARY THREADS NAME:TYPE:SHAPE:FILE...\n");
    return 2;
  }
  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == nullptr) {
    std::fprintf(stderr, "ONNX Runtime %s is too old\n", OrtGetApiBase()->GetVersionString());
    return 1;
  }
  try {
    serve(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
