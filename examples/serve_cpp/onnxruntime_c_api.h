// The part of ONNX Runtime's C interface that serve.cpp uses, for machines that have the library and no headers, as the
// Python wheel leaves them. Names and layout are those of ONNX Runtime's own header of the same name, which can take this
// one's place: the table of functions only ever grows at its end, and what is not used here is left as a gap.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 17  // ONNX Runtime 1.17 or newer

#ifdef __cplusplus
extern "C" {
#endif

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;

typedef enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 } OrtLoggingLevel;
typedef enum OrtAllocatorType { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT16,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64,
} ONNXTensorElementDataType;

#define ORT_SUBSET_GAP(first, next) void* gap_##first[(next) - (first)]

typedef struct OrtApi {
  ORT_SUBSET_GAP(0, 2);
  const char* (*GetErrorMessage)(const OrtStatus* status);                                                      // 2
  OrtStatus* (*CreateEnv)(OrtLoggingLevel level, const char* name, OrtEnv** env);                               // 3
  ORT_SUBSET_GAP(4, 7);
  OrtStatus* (*CreateSession)(const OrtEnv* env, const char* path, const OrtSessionOptions* options,
                              OrtSession** session);                                                            // 7
  ORT_SUBSET_GAP(8, 9);
  OrtStatus* (*Run)(OrtSession* session, const OrtRunOptions* options, const char* const* input_names,
                    const OrtValue* const* inputs, size_t n_inputs, const char* const* output_names,
                    size_t n_outputs, OrtValue** outputs);                                                      // 9
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions** options);                                              // 10
  ORT_SUBSET_GAP(11, 24);
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions* options, int threads);                                  // 24
  ORT_SUBSET_GAP(25, 29);
  OrtStatus* (*RegisterCustomOpsLibrary)(OrtSessionOptions* options, const char* path, void** handle);          // 29
  ORT_SUBSET_GAP(30, 31);
  OrtStatus* (*SessionGetOutputCount)(const OrtSession* session, size_t* count);                                // 31
  ORT_SUBSET_GAP(32, 37);
  OrtStatus* (*SessionGetOutputName)(const OrtSession* session, size_t index, OrtAllocator* allocator,
                                     char** name);                                                              // 37
  ORT_SUBSET_GAP(38, 49);
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo* memory, void* data, size_t bytes,
                                               const int64_t* shape, size_t rank, ONNXTensorElementDataType type,
                                               OrtValue** value);                                               // 49
  ORT_SUBSET_GAP(50, 51);
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);                                             // 51
  ORT_SUBSET_GAP(52, 60);
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo* info, ONNXTensorElementDataType* type);   // 60
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* rank);                        // 61
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* shape, size_t rank);              // 62
  ORT_SUBSET_GAP(63, 65);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);                 // 65
  ORT_SUBSET_GAP(66, 69);
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType type, OrtMemType memory, OrtMemoryInfo** info);            // 69
  ORT_SUBSET_GAP(70, 78);
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator** allocator);                                       // 78
  ORT_SUBSET_GAP(79, 92);
  void (*ReleaseEnv)(OrtEnv* env);                                                                              // 92
  void (*ReleaseStatus)(OrtStatus* status);                                                                     // 93
  void (*ReleaseMemoryInfo)(OrtMemoryInfo* info);                                                               // 94
  void (*ReleaseSession)(OrtSession* session);                                                                  // 95
  void (*ReleaseValue)(OrtValue* value);                                                                        // 96
  ORT_SUBSET_GAP(97, 99);
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);                                       // 99
  void (*ReleaseSessionOptions)(OrtSessionOptions* options);                                                    // 100
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase* OrtGetApiBase(void);

#ifdef __cplusplus
}
#endif
