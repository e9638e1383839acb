/* Vectors of LANES floats in the instructions of LEVEL, and the kernels for all pairs of dtypes. */
#define AT_LEVEL(name) JOIN_2(name, LEVEL)
#define LOAD(dtype) AT_LEVEL(JOIN_2(load, dtype))
#define STORE(dtype) AT_LEVEL(JOIN_2(store, dtype))

#define floats AT_LEVEL(floats)
#define ints AT_LEVEL(ints)
#define words AT_LEVEL(words)
#define halves AT_LEVEL(halves)
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE words AT_LEVEL(load_halves)(const uint16_t *at) {
    halves bits;
    memcpy(&bits, at, sizeof bits);
    return __builtin_convertvector(bits, words);
}

INLINE void AT_LEVEL(store_halves)(uint16_t *at, words bits) {
    halves narrow = __builtin_convertvector(bits, halves);
    memcpy(at, &narrow, sizeof narrow);
}

INLINE floats AT_LEVEL(load_f32)(const float *at) {
    floats value;
    memcpy(&value, at, sizeof value);
    return value;
}

INLINE floats AT_LEVEL(load_bf16)(const uint16_t *at) { return (floats)(AT_LEVEL(load_halves)(at) << 16); }

INLINE floats AT_LEVEL(load_f16)(const uint16_t *at) {
    halves bits;
    memcpy(&bits, at, sizeof bits);
    return FROM_F16(bits);
}

/* Stores return what is stored: the nearest value, of two the even one. NaN need not stay NaN. */
INLINE floats AT_LEVEL(store_f32)(float *at, floats value) {
    memcpy(at, &value, sizeof value);
    return value;
}

INLINE floats AT_LEVEL(store_bf16)(uint16_t *at, floats value) {
    words bits = (words)value;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    AT_LEVEL(store_halves)(at, bits);
    return (floats)(bits << 16);
}

INLINE floats AT_LEVEL(store_f16)(uint16_t *at, floats value) {
    halves bits = TO_F16(value);
    memcpy(at, &bits, sizeof bits);
    return FROM_F16(bits);
}

/* Sums by lane of W^2, D^2, A^2 and D A, the count of A = 0 and the largest |D|: W is the base's value, D what was added
   to it, A what of that is left after rounding. */
#define Sums AT_LEVEL(Sums)
typedef struct {
    floats ww, dd, aa, da;
    ints unchanged, largest;
} Sums;

INLINE void AT_LEVEL(count)(Sums *sums, floats w, floats sum, floats stored) {
    floats d = sum - w, a = stored - w;
    ints size = (ints)d & 0x7fffffff; /* in the order of the absolute values, and NaN above all */
    sums->ww += w * w;
    sums->dd += d * d;
    sums->aa += a * a;
    sums->da += d * a;
    sums->unchanged -= a == 0;
    ints larger = size > sums->largest;
    sums->largest = (size & larger) | (sums->largest & ~larger);
}

static void AT_LEVEL(collect)(Sums *sums, double *found) {
    for (int lane = 0; lane < LANES; lane++) {
        float largest;
        int32_t bits = sums->largest[lane];
        memcpy(&largest, &bits, sizeof largest);
        found[0] += sums->ww[lane];
        found[1] += sums->dd[lane];
        found[2] += sums->aa[lane];
        found[3] += sums->da[lane];
        found[4] += sums->unchanged[lane];
        found[5] = largest > found[5] ? largest : found[5]; /* NaN is in the sums */
    }
    memset(sums, 0, sizeof *sums);
}

/* The products of `rows` rows of b, r apart, with VECTORS vectors of a panel. */
INLINE void AT_LEVEL(multiply)(floats product[ROWS][VECTORS], const float *b, const float *panel, int64_t r,
                               const int rows) {
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < VECTORS; v++)
            product[i][v] = (floats){0};
    for (int64_t k = 0; k < r; k++) {
        floats a[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            a[v] = AT_LEVEL(load_f32)(panel + k * PANEL + v * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++)
                product[i][v] += a[v] * b[i * r + k];
    }
}

#define f32_type float
#define bf16_type uint16_t
#define f16_type uint16_t

#define OUT bf16
#include "codes.h"
#define OUT f16
#include "codes.h"
#define OUT f32
#include "codes.h"

#define BASE bf16
#define OUT bf16
#include "block.h"
#define BASE bf16
#define OUT f16
#include "block.h"
#define BASE bf16
#define OUT f32
#include "block.h"
#define BASE f16
#define OUT bf16
#include "block.h"
#define BASE f16
#define OUT f16
#include "block.h"
#define BASE f16
#define OUT f32
#include "block.h"
#define BASE f32
#define OUT bf16
#include "block.h"
#define BASE f32
#define OUT f16
#include "block.h"
#define BASE f32
#define OUT f32
#include "block.h"

#undef floats
#undef ints
#undef words
#undef halves
#undef Sums
#undef AT_LEVEL
#undef LOAD
#undef STORE
#undef LEVEL
#undef LANES
#undef VECTORS
#undef ROWS
#undef FROM_F16
#undef TO_F16
#undef FROM_BYTES
#undef LOOK_UP
