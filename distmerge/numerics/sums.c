/* Sums over a block of three tensors in one pass, where torch needs a dozen: see survival.py, which works without this
   file as well. Float sums may be taken in any order (-fassociative-math), values are never changed. */
#include <stdint.h>
#include <string.h>

#define TILE 4096 /* float32 sums of at most this many elements go into float64 ones */

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12 /* older ones know no levels here */
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FOR_EACH_CPU
#endif

static inline float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline int32_t magnitude(float value) { /* ordered as the absolute values are, and NaN above all */
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits & 0x7fffffff;
}

static inline float from_f32(float value) { return value; }
static inline float from_bf16(uint16_t bits) { return as_float((uint32_t)bits << 16); }
static inline float from_f16(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13;
    float finite = as_float(rest) * 0x1p112f; /* the exponent's bias; subnormals too */
    uint32_t special = rest | 0x7f800000, plain;
    memcpy(&plain, &finite, 4);
    return as_float(sign | ((bits & 0x7c00) == 0x7c00 ? special : plain));
}

/* found: sums of W^2, D^2, A^2 and D A, the count of A = 0, the largest |D|; W the base, D = work - W, A = out - W */
#define MEASURE(name, base_type, from_base, out_type, from_out)                                                        \
    FOR_EACH_CPU void name(const base_type *base, const float *work, const out_type *out, int64_t n, double *found) {  \
        for (int64_t begin = 0; begin < n; begin += TILE) {                                                            \
            int64_t end = n - begin < TILE ? n : begin + TILE;                                                         \
            float ww = 0, dd = 0, aa = 0, da = 0;                                                                      \
            int32_t unchanged = 0, largest = 0;                                                                        \
            for (int64_t i = begin; i < end; i++) {                                                                    \
                float w = from_base(base[i]), d = work[i] - w, a = from_out(out[i]) - w;                               \
                int32_t size = magnitude(d);                                                                           \
                ww += w * w;                                                                                           \
                dd += d * d;                                                                                           \
                aa += a * a;                                                                                           \
                da += d * a;                                                                                           \
                unchanged += a == 0;                                                                                   \
                largest = size > largest ? size : largest;                                                             \
            }                                                                                                          \
            found[0] += ww;                                                                                            \
            found[1] += dd;                                                                                            \
            found[2] += aa;                                                                                            \
            found[3] += da;                                                                                            \
            found[4] += unchanged;                                                                                     \
            found[5] = as_float(largest) > found[5] ? as_float(largest) : found[5];                                    \
        }                                                                                                              \
    }

MEASURE(measure_bf16_bf16, uint16_t, from_bf16, uint16_t, from_bf16)
MEASURE(measure_bf16_f16, uint16_t, from_bf16, uint16_t, from_f16)
MEASURE(measure_bf16_f32, uint16_t, from_bf16, float, from_f32)
MEASURE(measure_f16_bf16, uint16_t, from_f16, uint16_t, from_bf16)
MEASURE(measure_f16_f16, uint16_t, from_f16, uint16_t, from_f16)
MEASURE(measure_f16_f32, uint16_t, from_f16, float, from_f32)
MEASURE(measure_f32_bf16, float, from_f32, uint16_t, from_bf16)
MEASURE(measure_f32_f16, float, from_f32, uint16_t, from_f16)
MEASURE(measure_f32_f32, float, from_f32, float, from_f32)
