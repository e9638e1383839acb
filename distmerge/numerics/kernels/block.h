/* Blocks of dtype BASE that become blocks of dtype OUT, at one LEVEL. */
#define AT_BOTH(name) JOIN_4(name, BASE, OUT, LEVEL)
#define base_type JOIN_2(BASE, type)
#define out_type JOIN_2(OUT, type)
#define WIDTH (LANES * VECTORS)

/* `rows` rows of WIDTH columns; `work` may be null. */
INLINE void AT_BOTH(tile)(const base_type *base, out_type *out, float *work, int64_t stride, const float *b,
                          const float *panel, int64_t r, float scaling, Sums *sums, const int rows) {
    floats product[ROWS][VECTORS];
    AT_LEVEL(multiply)(product, b, panel, r, rows);
    Sums mine = *sums; /* in registers, which no store to `out` can change */
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            int64_t at = i * stride + v * LANES;
            floats w = LOAD(BASE)(base + at), sum = w + product[i][v] * scaling;
            if (work)
                AT_LEVEL(store_f32)(work + at, sum);
            floats stored = STORE(OUT)(out + at, sum);
            AT_LEVEL(count)(&mine, w, sum, stored);
        }
    *sums = mine;
}

/* `rows` rows of the last `cols` < WIDTH columns. */
static void AT_BOTH(edge)(const base_type *base, out_type *out, float *work, int64_t stride, const float *b,
                          const float *panel, int64_t r, float scaling, Sums *sums, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++) {
        base_type from[WIDTH] = {0};
        out_type to[WIDTH];
        float between[WIDTH];
        memcpy(from, base + i * stride, cols * sizeof *from);
        AT_BOTH(tile)(from, to, between, WIDTH, b + i * r, panel, r, scaling, sums, 1);
        memcpy(out + i * stride, to, cols * sizeof *to);
        if (work)
            memcpy(work + i * stride, between, cols * sizeof *between);
        sums->unchanged[0] -= WIDTH - cols; /* all is 0 beyond the last column */
    }
}

/* out = base + scaling b a, rounded, for base and out (rows, cols) in rows `stride` elements apart, b (rows, r), and a in
   panels (cols / PANEL, r, PANEL) with zeros beyond its last column. `work`, unless it is null, gets the
   values before they are rounded; the sums are added to `found`. */
void AT_BOTH(merge)(const base_type *base, out_type *out, float *work, int64_t rows, int64_t cols, int64_t stride,
                    const float *b, const float *panels, int64_t r, float scaling, double *found) {
    Sums sums;
    memset(&sums, 0, sizeof sums);
    int64_t chunk = L2_NUMEL / r / PANEL * PANEL, tiles = 0;
    chunk = chunk ? chunk : PANEL;
    for (int64_t left = 0; left < cols; left += chunk) {
        int64_t right = cols - left < chunk ? cols : left + chunk;
        for (int64_t top = 0; top < rows; top += ROWS) {
            int64_t height = rows - top < ROWS ? rows - top : ROWS;
            for (int64_t col = left; col < right; col += WIDTH) {
                const base_type *from = base + top * stride + col;
                out_type *to = out + top * stride + col;
                float *between = work ? work + top * stride + col : 0;
                const float *panel = panels + col / PANEL * PANEL * r + col % PANEL;
                if (right - col < WIDTH)
                    AT_BOTH(edge)(from, to, between, stride, b + top * r, panel, r, scaling, &sums, height, right - col);
                else if (height == ROWS)
                    AT_BOTH(tile)(from, to, between, stride, b + top * r, panel, r, scaling, &sums, ROWS);
                else
                    for (int64_t i = 0; i < height; i++)
                        AT_BOTH(tile)(from + i * stride, to + i * stride, between ? between + i * stride : 0, stride,
                                      b + (top + i) * r, panel, r, scaling, &sums, 1);
                if (++tiles % TILES == 0)
                    AT_LEVEL(collect)(&sums, found);
            }
        }
    }
    AT_LEVEL(collect)(&sums, found);
}

/* The sums alone, of n elements in a row whose values before they were rounded are `work`. */
void AT_BOTH(measure)(const base_type *base, const float *work, const out_type *out, int64_t n, double *found) {
    Sums sums;
    memset(&sums, 0, sizeof sums);
    for (int64_t i = 0; i < n; i += LANES) {
        if (i % (LANES * TILES * ROWS * VECTORS) == 0)
            AT_LEVEL(collect)(&sums, found);
        if (n - i >= LANES) {
            floats w = LOAD(BASE)(base + i), stored = LOAD(OUT)(out + i);
            AT_LEVEL(count)(&sums, w, AT_LEVEL(load_f32)(work + i), stored);
            continue;
        }
        base_type from[LANES] = {0};
        out_type to[LANES] = {0};
        float between[LANES] = {0};
        memcpy(from, base + i, (n - i) * sizeof *from);
        memcpy(to, out + i, (n - i) * sizeof *to);
        memcpy(between, work + i, (n - i) * sizeof *between);
        floats w = LOAD(BASE)(from), stored = LOAD(OUT)(to);
        AT_LEVEL(count)(&sums, w, AT_LEVEL(load_f32)(between), stored);
        sums.unchanged[0] -= LANES - (n - i);
    }
    AT_LEVEL(collect)(&sums, found);
}

#undef AT_BOTH
#undef base_type
#undef out_type
#undef WIDTH
#undef BASE
#undef OUT
