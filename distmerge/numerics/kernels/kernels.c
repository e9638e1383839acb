/* Products of factors, added to blocks, rounded and measured while they are in registers, and 4-bit codes to values:
   compiled.py is the door, and without it torch does the same in more passes.

   An element is fma(scaling, s, w): w the base's value, s the sum of b[k] a[k] as a chain of fused multiply-adds in the
   order of k. No bit depends on the block's shape or the vectors' width. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PANEL 32       /* columns of a that lie together, for all k */
#define L2_NUMEL 65536 /* elements of a that are gone through for all rows before the next ones are */
#define TILES 16       /* float32 sums of so many tiles go into float64 ones */

/* The SHA-256 of the source files, in the order of their names: bits and functions are those of no other source. */
const char *source(void) { return SOURCE; }

#define JOIN_2_(a, b) a##_##b
#define JOIN_2(a, b) JOIN_2_(a, b)
#define JOIN_4_(a, b, c, d) a##_##b##_##c##_##d
#define JOIN_4(a, b, c, d) JOIN_4_(a, b, c, d)
#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define HAS_LEVELS_OF_X86

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define LEVEL avx512
#define LANES 16
#define VECTORS 2
#define ROWS 8
#define FROM_F16(bits) (floats) _mm512_cvtph_ps((__m256i)(bits))
#define TO_F16(value) (halves) _mm512_cvtps_ph((__m512)(value), _MM_FROUND_TO_NEAREST_INT)
#define FROM_BYTES(at) (words) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(at)))
#define LOOK_UP(table, index) (words) _mm512_permutexvar_epi32((__m512i)(index), (__m512i)(table)[0])
#include "level.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define LEVEL avx2
#define LANES 8
#define VECTORS 2
#define ROWS 4
#define FROM_F16(bits) (floats) _mm256_cvtph_ps((__m128i)(bits))
#define TO_F16(value) (halves) _mm256_cvtps_ph((__m256)(value), _MM_FROUND_TO_NEAREST_INT)
#define FROM_BYTES(at) (words) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(at)))
#define LOOK_UP(table, index) \
    (words) _mm256_blendv_ps(EIGHT((table)[0], index), EIGHT((table)[1], index), (__m256)((index) << 28))
#define EIGHT(values, index) _mm256_permutevar8x32_ps((__m256)(values), (__m256i)(index))
#include "level.h"
#pragma GCC pop_options

#elif defined(__aarch64__)
#define LEVEL neon
#define LANES 4
#define VECTORS 4
#define ROWS 4
#define FROM_F16(bits) (floats) vcvt_f32_f16((float16x4_t)(bits))
#define TO_F16(value) (halves) vcvt_f16_f32((float32x4_t)(value))
#include "level.h"
#endif

/* The levels of instructions that are compiled and that this machine has, best first. */
const char *levels(void) {
#if defined(HAS_LEVELS_OF_X86)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) /* with which f16c has always come */
        return "";
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? "avx512 avx2" : "avx2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "";
#endif
}
