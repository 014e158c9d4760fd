/* The loops, compiled once per instruction set: `_kernels.c` includes this file with LEVEL(name) defined.
 *
 * Every float operation is single precision and rounds once (no contraction, no reciprocal), in the order of
 * compressed-tensors: scale = e4m3(gs * (amax / 6)), effective = scale / gs, v = x / effective. */

/* Round to nearest even, x >= 0 and at most 464; E4M3 code 0..0x7e. */
static inline unsigned LEVEL(to_e4m3)(float x) {
    if (x < 0x1p-6f) {
        union { float f; uint32_t u; } grid = {x + 0x1p14f}; /* the ulp of 2^14 is E4M3's smallest step, 2^-9 */
        return grid.u - 0x46800000u;
    }
    union { float f; uint32_t u; } bits = {x};
    uint32_t code = ((bits.u + 0x7ffffu + ((bits.u >> 20) & 1)) >> 20) - (120u << 3);
    return code > 0x7e ? 0x7e : code;
}

/* The scale code of a group from its largest magnitude; a scale of zero becomes 0.125 as in compressed-tensors. */
static inline unsigned LEVEL(scale_code)(float amax, float global_scale) {
    unsigned code = LEVEL(to_e4m3)(global_scale * (amax / 6.0f));
    return code ? code : 0x20;
}

/* Sixteen floats: packed into eight bytes; loaded; their largest magnitude. AVX2 is spelled out in halves: GCC takes vectors
 * wider than the processor's apart and moves them through memory (6 times slower). */
#if HAVE_AVX2
typedef struct { __m256 half[2]; } LEVEL(sixteen);

static inline __m256i LEVEL(codes8)(const __m256 x, const __m256 effective) {
    static const float middle[7] = {.25f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.f};
    const __m256 v = _mm256_div_ps(x, effective), a = _mm256_andnot_ps(_mm256_set1_ps(-0.f), v);
    __m256i code = _mm256_setzero_si256();
    for (int k = 0; k < 7; k++) { /* a tie goes to the even code */
        const __m256 limit = _mm256_set1_ps(middle[k]);
        const __m256 above = k % 2 ? _mm256_cmp_ps(a, limit, _CMP_GE_OQ) : _mm256_cmp_ps(a, limit, _CMP_GT_OQ);
        code = _mm256_sub_epi32(code, _mm256_castps_si256(above));
    }
    const __m256i negative = _mm256_castps_si256(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
    return _mm256_or_si256(code, _mm256_and_si256(negative, _mm256_set1_epi32(8)));
}

static inline void LEVEL(pack16)(const LEVEL(sixteen) x, float effective, uint8_t *packed) {
    const __m256 divisor = _mm256_set1_ps(effective);
    const __m256i mixed = _mm256_packs_epi32(LEVEL(codes8)(x.half[0], divisor), LEVEL(codes8)(x.half[1], divisor));
    const __m256i pairs = _mm256_madd_epi16(_mm256_permute4x64_epi64(mixed, 0xd8), _mm256_set1_epi32(0x00100001));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storel_epi64((__m128i *)packed, _mm_packus_epi16(halves, halves));
}

static inline LEVEL(sixteen) LEVEL(load16)(int dtype, const void *data, int64_t at) {
    LEVEL(sixteen) x;
    for (int half = 0; half < 2; half++) {
        if (dtype == F32) {
            x.half[half] = _mm256_loadu_ps((const float *)data + at + 8 * half);
            continue;
        }
        const __m128i *from = (const __m128i *)((const uint16_t *)data + at + 8 * half);
        const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
        if (dtype == BF16) {
            x.half[half] = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
            continue;
        }
        const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x7fff)), 13);
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(u, _mm256_set1_epi32(0x8000)), 16);
        const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p112f));
        x.half[half] = _mm256_or_ps(value, _mm256_castsi256_ps(sign));
    }
    return x;
}

static inline float LEVEL(amax16)(const LEVEL(sixteen) x) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    const __m256 a = _mm256_max_ps(_mm256_andnot_ps(sign, x.half[0]), _mm256_andnot_ps(sign, x.half[1]));
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}
#else
typedef vf LEVEL(sixteen);

static inline void LEVEL(pack16)(const LEVEL(sixteen) x, float effective, uint8_t *packed) {
    const vf v = x / effective;
    const vf a = (vf)((vi)v & 0x7fffffff);
    vi code = -((a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) + (a >= 3.5f) + (a > 5.0f));
    code |= (v < 0.0f) & 8;
    const vp pairs = (vp)__builtin_convertvector(code, vb);
    const vh bytes = __builtin_convertvector(pairs | (pairs >> 4), vh);
    memcpy(packed, &bytes, 8);
}

static inline LEVEL(sixteen) LEVEL(load16)(int dtype, const void *data, int64_t at) {
    vf x;
    if (dtype == F32) {
        memcpy(&x, (const float *)data + at, 64);
        return x;
    }
    vs h;
    vu u;
    memcpy(&h, (const uint16_t *)data + at, 32);
    u = __builtin_convertvector(h, vu);
    if (dtype == BF16) return (vf)(u << 16);
    /* F16: the exponent is rebiased by a multiplication, exact for subnormals too; Inf and NaN never get here. */
    x = (vf)((u & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vu)x | ((u & 0x8000) << 16));
}

static inline float LEVEL(amax16)(const LEVEL(sixteen) x) {
    vi a = (vi)x & 0x7fffffff;
    int32_t lanes[16], most = 0;
    memcpy(lanes, &a, 64);
    for (int i = 0; i < 16; i++) most = lanes[i] > most ? lanes[i] : most;
    union { int32_t i; float f; } bits = {most};
    return bits.f;
}
#endif

/* Largest magnitude as bits of the dtype; NaN and Inf sort above every finite value. */
static uint32_t LEVEL(float_amax)(int dtype, const void *data, int64_t count) {
    if (dtype == F32) {
        const uint32_t *p = data;
        uint32_t most = 0;
        for (int64_t i = 0; i < count; i++) {
            uint32_t a = p[i] & 0x7fffffffu;
            most = a > most ? a : most;
        }
        return most;
    }
    const uint16_t *p = data;
    uint16_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        uint16_t a = p[i] & 0x7fff;
        most = a > most ? a : most;
    }
    return most;
}

/* Smallest and largest value of every group of 16, in the dtype of the data. Floats order like sign-magnitude integers; NaN
 * lies beyond Inf on its own side. */
static void LEVEL(float_extremes)(int dtype, const void *data, int64_t groups, void *low, void *high) {
    for (int64_t g = 0; g < groups; g++) {
        if (dtype == F32) {
            const int32_t *p = (const int32_t *)data + g * 16;
            int32_t least = INT32_MAX, most = INT32_MIN;
            for (int i = 0; i < 16; i++) {
                const int32_t key = p[i] ^ (p[i] >> 31 & INT32_MAX);
                least = key < least ? key : least;
                most = key > most ? key : most;
            }
            ((int32_t *)low)[g] = least ^ (least >> 31 & INT32_MAX);
            ((int32_t *)high)[g] = most ^ (most >> 31 & INT32_MAX);
        } else {
            const int16_t *p = (const int16_t *)data + g * 16;
            int16_t least = INT16_MAX, most = INT16_MIN;
            for (int i = 0; i < 16; i++) {
                const int16_t key = (int16_t)(p[i] ^ (p[i] >> 15 & INT16_MAX));
                least = key < least ? key : least;
                most = key > most ? key : most;
            }
            ((int16_t *)low)[g] = (int16_t)(least ^ (least >> 15 & INT16_MAX));
            ((int16_t *)high)[g] = (int16_t)(most ^ (most >> 15 & INT16_MAX));
        }
    }
}

static inline uint16_t LEVEL(to_bf16)(float x) {
    union { float f; uint32_t u; } bits = {x};
    return x == x ? (uint16_t)((bits.u + 0x7fffu + ((bits.u >> 16) & 1)) >> 16) : 0x7fc0;
}

/* A row of E4M3 codes with one float32 scale per `tile_columns` of them -> BF16, rounded once. */
static void LEVEL(fp8_to_bf16)(const uint8_t *codes, int64_t rows, int64_t columns, const float *grid, int64_t tile_rows,
                               int64_t tile_columns, uint16_t *out) {
    const int64_t across = (columns + tile_columns - 1) / tile_columns;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t t = 0; t < across; t++) {
            const float scale = grid[r / tile_rows * across + t];
            const int64_t end = (t + 1) * tile_columns < columns ? (t + 1) * tile_columns : columns;
            for (int64_t i = r * columns + t * tile_columns; i < r * columns + end; i++) {
                /* An E4M3 code is the top of the float with the same bits, scaled by 2^120; 0x7f is NaN. */
                const uint32_t code = codes[i];
                union { uint32_t u; float f; } value = {(code & 0x7f) << 20 | code >> 7 << 31};
                value.f *= 0x1p120f;
                value.u |= (code & 0x7f) == 0x7f ? 0x7fc00000u : 0;
                out[i] = LEVEL(to_bf16)(value.f * scale);
            }
        }
}

/* `groups` of 32 MXFP4 codes with their scale as float32 -> BF16, rounded once. */
static void LEVEL(mxfp4_to_bf16)(const uint8_t *codes, const float *group_scale, int64_t groups, uint16_t *out) {
    for (int64_t g = 0; g < groups; g++) {
        uint16_t values[16];
        for (int i = 0; i < 16; i++) values[i] = LEVEL(to_bf16)(e2m1_values[i] * group_scale[g]);
        for (int i = 0; i < 16; i++) {
            out[g * 32 + 2 * i] = values[codes[g * 16 + i] & 15];
            out[g * 32 + 2 * i + 1] = values[codes[g * 16 + i] >> 4];
        }
    }
}

static void LEVEL(float_quantize)(int dtype, const void *data, int64_t groups, float global_scale, uint8_t *packed,
                                  uint8_t *scales) {
    for (int64_t g = 0; g < groups; g++) {
        const LEVEL(sixteen) x = LEVEL(load16)(dtype, data, g * 16);
        const unsigned code = LEVEL(scale_code)(LEVEL(amax16)(x), global_scale);
        scales[g] = (uint8_t)code;
        LEVEL(pack16)(x, e4m3_values[code] / global_scale, packed + g * 8);
    }
}

static void LEVEL(pack_scaled)(int dtype, const void *data, int64_t groups, const float *effective, uint8_t *packed,
                               double *sums) {
    double error = 0, norm = 0;
    for (int64_t g = 0; g < groups; g++) {
        const LEVEL(sixteen) x = LEVEL(load16)(dtype, data, g * 16);
        LEVEL(pack16)(x, effective[g], packed + g * 8);
        float back[16], given[16];
        memcpy(given, &x, 64);
        for (int i = 0; i < 8; i++) {
            back[2 * i] = e2m1_values[packed[g * 8 + i] & 15] * effective[g];
            back[2 * i + 1] = e2m1_values[packed[g * 8 + i] >> 4] * effective[g];
        }
        float e = 0, n = 0;
        for (int i = 0; i < 16; i++) {
            const float d = back[i] - given[i];
            e += d * d;
            n += given[i] * given[i];
        }
        error += e;
        norm += n;
    }
    sums[0] += error;
    sums[1] += norm;
}

/* Largest magnitude of every MXFP4 group of 32 as an E2M1 code 0..7; 16 bytes a group. */
static void LEVEL(mxfp4_maxima)(const uint8_t *codes, int64_t groups, uint8_t *maxima) {
    for (int64_t g = 0; g < groups; g++) {
        uint8_t most = 0;
        for (int i = 0; i < 16; i++) {
            uint8_t low = codes[g * 16 + i] & 7, high = (codes[g * 16 + i] >> 4) & 7;
            low = low > high ? low : high;
            most = low > most ? low : most;
        }
        maxima[g] = most;
    }
}

/* `groups` of 32 with their scale as float32 -> two NVFP4 groups each. */
static void LEVEL(mxfp4_quantize)(const uint8_t *codes, const float *group_scale, int64_t groups, float global_scale,
                                  uint8_t *packed, uint8_t *scales) {
    float values[32];
    for (int64_t g = 0; g < groups; g++) {
        for (int i = 0; i < 16; i++) {
            values[2 * i] = e2m1_values[codes[g * 16 + i] & 15] * group_scale[g];
            values[2 * i + 1] = e2m1_values[codes[g * 16 + i] >> 4] * group_scale[g];
        }
        LEVEL(float_quantize)(F32, values, 2, global_scale, packed + g * 16, scales + g * 2);
    }
}

/* Largest magnitude byte of every group of 16 E4M3 codes; 0x7f is NaN. */
static void LEVEL(fp8_maxima)(const uint8_t *codes, int64_t groups, uint8_t *maxima) {
    int64_t g = 0;
#if HAVE_AVX512
    const __m512i magnitude = _mm512_set1_epi8(0x7f);
    const __m128i transpose = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (; g + 16 <= groups; g += 16) {
        const uint8_t *p = codes + g * 16;
        __m512i a = _mm512_and_si512(_mm512_loadu_si512(p), magnitude);
        __m512i b = _mm512_and_si512(_mm512_loadu_si512(p + 64), magnitude);
        __m512i c = _mm512_and_si512(_mm512_loadu_si512(p + 128), magnitude);
        __m512i d = _mm512_and_si512(_mm512_loadu_si512(p + 192), magnitude);
        a = _mm512_max_epu8(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
        c = _mm512_max_epu8(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
        const __m512 af = _mm512_castsi512_ps(a), cf = _mm512_castsi512_ps(c);
        a = _mm512_max_epu8(_mm512_castps_si512(_mm512_shuffle_ps(af, cf, 0x88)),
                            _mm512_castps_si512(_mm512_shuffle_ps(af, cf, 0xdd)));
        a = _mm512_max_epu8(a, _mm512_srli_epi32(a, 16));
        a = _mm512_max_epu8(a, _mm512_srli_epi32(a, 8));
        _mm_storeu_si128((__m128i *)(maxima + g), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(a), transpose));
    }
#elif HAVE_AVX2
    const __m256i magnitude = _mm256_set1_epi8(0x7f);
    for (; g + 2 <= groups; g += 2) {
        __m256i a = _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(codes + g * 16)), magnitude);
        a = _mm256_max_epu8(a, _mm256_bsrli_epi128(a, 8));
        a = _mm256_max_epu8(a, _mm256_bsrli_epi128(a, 4));
        a = _mm256_max_epu8(a, _mm256_bsrli_epi128(a, 2));
        a = _mm256_max_epu8(a, _mm256_bsrli_epi128(a, 1));
        maxima[g] = (uint8_t)_mm256_extract_epi8(a, 0);
        maxima[g + 1] = (uint8_t)_mm256_extract_epi8(a, 16);
    }
#endif
    for (; g < groups; g++) {
        uint8_t most = 0;
        for (int i = 0; i < 16; i++) {
            const uint8_t a = codes[g * 16 + i] & 0x7f;
            most = a > most ? a : most;
        }
        maxima[g] = most;
    }
}

/* For one tile scale and group maximum: byte k (1..7) is the least magnitude byte whose code is at least k, byte 0 the
 * least that is not zero after the division, byte 8 the scale code; 0x7f and above are reached by no byte.
 *
 * A magnitude byte's value grows with the byte, and so does every rounding of it: seven thresholds say all. Each is
 * guessed from a reciprocal (wrong by far less than one E4M3 step) and settled by the exact operations. */
static inline void LEVEL(thresholds)(float tile_scale, unsigned maximum, float global_scale, uint8_t *record) {
    const unsigned code = LEVEL(scale_code)(e4m3_values[maximum] * tile_scale, global_scale);
    const float effective = e4m3_values[code] / global_scale;
    const float ratio = effective / tile_scale;
    const v8f middle = {0.f, .25f, .75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.f};
    const v8i even = {0, 0, -1, 0, -1, 0, -1, 0}; /* a tie goes to the even code */
    const v8f guess = middle * ratio;
    const v8i below = guess < 448.0f; /* false for NaN and Inf too */
    v8i at;
    for (int k = 0; k < 8; k++) at[k] = (int)LEVEL(to_e4m3)(below[k] ? guess[k] : 448.0f) - 1;
    at &= at >= 0;
    at[0] = 1;
    v8i missed = at - at;
    for (int i = 0; i < 3; i++) {
        /* An E4M3 code is the top of the float with the same bits, scaled by 2^120. */
        const v8f v = (v8f)((at + i) << 20) * 0x1p120f * tile_scale / effective;
        missed += ~((v > middle) | ((v == middle) & even)) & 1;
    }
    for (int k = 0; k < 8; k++) {
        int found = at[k] + missed[k];
        if (missed[k] == 3)
            for (; found < 0x7f; found++) {
                const float v = e4m3_values[found] * tile_scale / effective;
                if (v > middle[k] || (v == middle[k] && even[k])) break;
            }
        record[k] = (uint8_t)(found < 0x7f ? found : 0x80);
    }
    record[8] = (uint8_t)code;
}

/* A row's part inside one tile: `groups` groups of 16 codes. */
static inline void LEVEL(fp8_row)(const uint8_t *row, const uint8_t *most, int64_t groups, uint8_t (*records)[16],
                                  uint8_t *out, uint8_t *scale) {
    int64_t g = 0;
#if HAVE_AVX512
    for (; g + 4 <= groups; g += 4) {
        const __m512i bytes = _mm512_loadu_si512(row + g * 16);
        const __m512i a = _mm512_and_si512(bytes, _mm512_set1_epi8(0x7f));
        __m512i record = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)records[most[g]]));
        record = _mm512_inserti32x4(record, _mm_load_si128((const __m128i *)records[most[g + 1]]), 1);
        record = _mm512_inserti32x4(record, _mm_load_si128((const __m128i *)records[most[g + 2]]), 2);
        record = _mm512_inserti32x4(record, _mm_load_si128((const __m128i *)records[most[g + 3]]), 3);
        __m512i code = _mm512_setzero_si512();
        for (int k = 1; k < 8; k++) {
            const __m512i least = _mm512_shuffle_epi8(record, _mm512_set1_epi8((char)k));
            code = _mm512_mask_add_epi8(code, _mm512_cmpge_epu8_mask(a, least), code, _mm512_set1_epi8(1));
        }
        const __m512i least = _mm512_shuffle_epi8(record, _mm512_setzero_si512());
        const __mmask64 negative = _mm512_movepi8_mask(bytes) & _mm512_cmpge_epu8_mask(a, least);
        code = _mm512_mask_add_epi8(code, negative, code, _mm512_set1_epi8(8));
        const __m512i pairs = _mm512_maddubs_epi16(code, _mm512_set1_epi16(0x1001));
        _mm256_storeu_si256((__m256i *)(out + g * 8), _mm512_cvtepi16_epi8(pairs));
        for (int i = 0; i < 4; i++) scale[g + i] = records[most[g + i]][8];
    }
#elif HAVE_AVX2
    for (; g + 2 <= groups; g += 2) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i *)(row + g * 16));
        const __m256i a = _mm256_and_si256(bytes, _mm256_set1_epi8(0x7f));
        const __m256i record = _mm256_set_m128i(_mm_load_si128((const __m128i *)records[most[g + 1]]),
                                                _mm_load_si128((const __m128i *)records[most[g]]));
        __m256i code = _mm256_setzero_si256();
        for (int k = 1; k < 8; k++) {
            const __m256i least = _mm256_shuffle_epi8(record, _mm256_set1_epi8((char)k));
            code = _mm256_sub_epi8(code, _mm256_cmpeq_epi8(_mm256_max_epu8(a, least), a));
        }
        const __m256i least = _mm256_shuffle_epi8(record, _mm256_setzero_si256());
        const __m256i nonzero = _mm256_cmpeq_epi8(_mm256_max_epu8(a, least), a);
        const __m256i negative = _mm256_cmpgt_epi8(_mm256_setzero_si256(), bytes);
        code = _mm256_or_si256(code, _mm256_and_si256(_mm256_and_si256(negative, nonzero), _mm256_set1_epi8(8)));
        const __m256i pairs = _mm256_maddubs_epi16(code, _mm256_set1_epi16(0x1001));
        const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
        _mm_storeu_si128((__m128i *)(out + g * 8), _mm256_castsi256_si128(halves));
        scale[g] = records[most[g]][8];
        scale[g + 1] = records[most[g + 1]][8];
    }
#endif
    for (; g < groups; g++) {
        const uint8_t *record = records[most[g]];
        uint8_t code[16];
        for (int i = 0; i < 16; i++) {
            const uint8_t byte = row[g * 16 + i], a = byte & 0x7f;
            uint8_t c = 0;
            for (int k = 1; k < 8; k++) c += a >= record[k];
            code[i] = c | (uint8_t)((byte >> 7 & (a >= record[0])) << 3);
        }
        for (int i = 0; i < 8; i++) out[g * 8 + i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
        scale[g] = record[8];
    }
}

/* Tiles are walked row by row in panels: a tile's own rows lie a power of two apart and would fall into one cache set. */
static void LEVEL(fp8_quantize)(const uint8_t *codes, int64_t rows, int64_t columns, const uint8_t *maxima,
                                const float *grid, int64_t tile_rows, int64_t tile_columns, float global_scale,
                                uint8_t *packed, uint8_t *scales) {
    const int64_t across = (columns + tile_columns - 1) / tile_columns, groups = columns / 16, wide = tile_columns / 16;
    uint8_t records[PANEL][128][16] __attribute__((aligned(64)));
    uint8_t present[PANEL][256];
    for (int64_t top = 0; top < rows; top += tile_rows) {
        const int64_t bottom = top + tile_rows < rows ? top + tile_rows : rows;
        for (int64_t left = 0; left < across; left += PANEL) {
            const int64_t right = left + PANEL < across ? left + PANEL : across;
            memset(present, 0, sizeof present);
            for (int64_t r = top; r < bottom; r++)
                for (int64_t t = left; t < right; t++) {
                    const int64_t end = (t + 1) * wide < groups ? (t + 1) * wide : groups;
                    for (int64_t g = t * wide; g < end; g++) present[t - left][maxima[r * groups + g]] = 1;
                }
            for (int64_t t = left; t < right; t++)
                for (unsigned m = 0; m < 128; m++)
                    if (present[t - left][m])
                        LEVEL(thresholds)(grid[top / tile_rows * across + t], m, global_scale, records[t - left][m]);
            for (int64_t r = top; r < bottom; r++)
                for (int64_t t = left; t < right; t++) {
                    const int64_t first = t * wide, end = first + wide < groups ? first + wide : groups;
                    const int64_t g = r * groups + first;
                    LEVEL(fp8_row)(codes + g * 16, maxima + g, end - first, records[t - left], packed + g * 8, scales + g);
                }
        }
    }
}

/* Largest value of all tiles from the group maxima; `row` is scratch of `groups` bytes. NaN where a code is NaN. */
static float LEVEL(fp8_amax)(const uint8_t *maxima, int64_t rows, int64_t groups, const float *grid, int64_t tile_rows,
                             int64_t wide, uint8_t *row) {
    float most = 0;
    const int64_t across = (groups + wide - 1) / wide;
    for (int64_t top = 0; top < rows; top += tile_rows) {
        const int64_t bottom = top + tile_rows < rows ? top + tile_rows : rows;
        memset(row, 0, (size_t)groups);
        for (int64_t r = top; r < bottom; r++)
            for (int64_t g = 0; g < groups; g++) row[g] = row[g] > maxima[r * groups + g] ? row[g] : maxima[r * groups + g];
        for (int64_t t = 0; t < across; t++) {
            uint8_t tile = 0;
            for (int64_t g = t * wide; g < groups && g < (t + 1) * wide; g++) tile = row[g] > tile ? row[g] : tile;
            if (tile == 0x7f) return __builtin_nanf("");
            const float value = e4m3_values[tile] * grid[top / tile_rows * across + t];
            most = value > most ? value : most;
        }
    }
    return most;
}
