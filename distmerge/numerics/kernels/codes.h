/* 4-bit codes that become values of dtype OUT, at one LEVEL. */
#define AT_OUT(name) JOIN_2(name, JOIN_2(OUT, LEVEL))
#define out_type JOIN_2(OUT, type)

/* n values of one block, whose codes stand for `values`: those of the high nibbles come first, and of the first byte
   `skipped` codes, 0 or 1, are left out. */
INLINE void AT_OUT(look_up)(const uint8_t *codes, int64_t skipped, int64_t n, const out_type values[16], out_type *out) {
    int64_t i = 0;
    if (skipped)
        out[i++] = values[*codes++ & 15];
#if defined(LOOK_UP)
    if (sizeof *out == 2) {
        words table[16 / LANES];
        for (int v = 0; v < 16 / LANES; v++)
            table[v] = AT_LEVEL(load_halves)((const uint16_t *)values + v * LANES);
        for (; i + 2 * LANES <= n; i += 2 * LANES, codes += LANES) {
            words both = FROM_BYTES(codes), pairs = LOOK_UP(table, both >> 4);
            pairs |= LOOK_UP(table, both & 15) << 16; /* the machine is little-endian, as the files are */
            memcpy(out + i, &pairs, sizeof pairs);
        }
    }
#endif
    for (; i + 2 <= n; i += 2, codes++) {
        out[i] = values[*codes >> 4];
        out[i + 1] = values[*codes & 15];
    }
    if (i < n)
        out[i] = values[*codes >> 4];
}

/* n values from `codes`, of whose first byte `skipped` are left out: `left` of them belong to the first scale, `blocksize`
   to each further one. A code stands for the second value of its byte in `pairs`, times the scale, rounded once. */
void AT_OUT(unpack)(const uint8_t *codes, int64_t skipped, int64_t n, const float *pairs, const float *scales,
                    int64_t left, int64_t blocksize, out_type *out) {
    float plain[16];
    out_type values[16];
    for (int code = 0; code < 16; code++)
        plain[code] = pairs[2 * code + 1];
    for (; n > 0; left = blocksize, scales++) {
        int64_t part = n < left ? n : left;
        for (int v = 0; v < 16; v += LANES)
            STORE(OUT)(values + v, AT_LEVEL(load_f32)(plain + v) * *scales);
        AT_OUT(look_up)(codes, skipped, part, values, out);
        codes += (skipped + part) / 2;
        skipped = (skipped + part) % 2;
        out += part;
        n -= part;
    }
}

#undef AT_OUT
#undef out_type
#undef OUT
