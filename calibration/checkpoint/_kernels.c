/* NVFP4 quantization loops in C, an optional part: `kernels.py` loads this with ctypes and falls back to torch.
 *
 * The module itself is empty; the functions below are plain C. Each exists once per instruction set, chosen by its
 * first argument: 0 portable, 1 AVX2, 2 AVX-512. Nothing is allocated, nothing is shared: every call is thread safe. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

enum { F32 = 0, BF16 = 1, F16 = 2 };

typedef float vf __attribute__((vector_size(64)));
typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(16)));
typedef uint16_t vs __attribute__((vector_size(32)));
typedef uint16_t vp __attribute__((vector_size(16)));
typedef uint8_t vh __attribute__((vector_size(8)));

static const float e2m1_values[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
/* Tiles side by side whose thresholds are held at once: 64 KiB of them. */
#define PANEL 32
static float e4m3_values[128];

#define HAVE_AVX2 0
#define HAVE_AVX512 0
#define LEVEL(name) name##_portable
#include "kernels_body.h"
#undef LEVEL

#if defined(__x86_64__) && defined(__GNUC__)
#define X86 1
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx2")
#undef HAVE_AVX2
#define HAVE_AVX2 1
#define LEVEL(name) name##_avx2
#include "kernels_body.h"
#undef LEVEL
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#undef HAVE_AVX2
#define HAVE_AVX2 0
#undef HAVE_AVX512
#define HAVE_AVX512 1
#define LEVEL(name) name##_avx512
#include "kernels_body.h"
#undef LEVEL
#pragma GCC pop_options
#define CALL(name, ...) (level == 2 ? name##_avx512(__VA_ARGS__) : level == 1 ? name##_avx2(__VA_ARGS__) : name##_portable(__VA_ARGS__))
#else
#define X86 0
#define CALL(name, ...) ((void)level, name##_portable(__VA_ARGS__))
#endif

#define EXPORT __attribute__((visibility("default")))

/* The best level of this processor. */
EXPORT int kernels_level(void) {
#if X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

EXPORT uint32_t float_amax(int level, int dtype, const void *data, int64_t count) {
    return CALL(float_amax, dtype, data, count);
}

EXPORT void float_extremes(int level, int dtype, const void *data, int64_t groups, void *low, void *high) {
    CALL(float_extremes, dtype, data, groups, low, high);
}

EXPORT void fp8_to_bf16(int level, const uint8_t *codes, int64_t rows, int64_t columns, const float *grid, int64_t tile_rows,
                        int64_t tile_columns, uint16_t *out) {
    CALL(fp8_to_bf16, codes, rows, columns, grid, tile_rows, tile_columns, out);
}

EXPORT void mxfp4_to_bf16(int level, const uint8_t *codes, const float *group_scale, int64_t groups, uint16_t *out) {
    CALL(mxfp4_to_bf16, codes, group_scale, groups, out);
}

EXPORT void float_quantize(int level, int dtype, const void *data, int64_t groups, float global_scale, uint8_t *packed, uint8_t *scales) {
    CALL(float_quantize, dtype, data, groups, global_scale, packed, scales);
}

EXPORT void pack_scaled(int level, int dtype, const void *data, int64_t groups, const float *effective, uint8_t *packed, double *sums) {
    CALL(pack_scaled, dtype, data, groups, effective, packed, sums);
}

EXPORT void mxfp4_maxima(int level, const uint8_t *codes, int64_t groups, uint8_t *maxima) {
    CALL(mxfp4_maxima, codes, groups, maxima);
}

EXPORT void mxfp4_quantize(int level, const uint8_t *codes, const float *group_scale, int64_t groups, float global_scale, uint8_t *packed, uint8_t *scales) {
    CALL(mxfp4_quantize, codes, group_scale, groups, global_scale, packed, scales);
}

EXPORT void fp8_maxima(int level, const uint8_t *codes, int64_t groups, uint8_t *maxima) {
    CALL(fp8_maxima, codes, groups, maxima);
}

EXPORT float fp8_amax(int level, const uint8_t *maxima, int64_t rows, int64_t groups, const float *grid, int64_t tile_rows, int64_t wide, uint8_t *row) {
    return CALL(fp8_amax, maxima, rows, groups, grid, tile_rows, wide, row);
}

EXPORT void fp8_quantize(int level, const uint8_t *codes, int64_t rows, int64_t columns, const uint8_t *maxima, const float *grid,
                         int64_t tile_rows, int64_t tile_columns, float global_scale, uint8_t *packed, uint8_t *scales) {
    CALL(fp8_quantize, codes, rows, columns, maxima, grid, tile_rows, tile_columns, global_scale, packed, scales);
}

static struct PyModuleDef module = {.m_base = PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_size = -1};

PyMODINIT_FUNC PyInit__kernels(void) {
    for (int code = 0; code < 128; code++) {
        const int exponent = code >> 3, mantissa = code & 7;
        float value = exponent ? 1.0f + mantissa / 8.0f : mantissa / 8.0f;
        for (int e = exponent ? exponent : 1; e < 7; e++) value *= 0.5f;
        for (int e = 7; e < exponent; e++) value *= 2.0f;
        e4m3_values[code] = value;
    }
    return PyModule_Create(&module);
}
