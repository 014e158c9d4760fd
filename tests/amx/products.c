/* Tiles of random shapes, strides and values, multiplied by AMX instructions (the processor's, or the emulator's) and by
 * the loops that Intel's manual gives for them. Prints how many tiles were equal to the last bit; returns 1 if one was not.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { STRIDE = 80, ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };

struct config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static uint8_t a[16][STRIDE], b[16][STRIDE], sums[16][STRIDE], got[16][STRIDE], wanted[16][STRIDE];

static float bf16(const uint8_t *at) {
    uint16_t half;
    memcpy(&half, at, 2);
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float flushed(float value) { return fabsf(value) < 0x1p-126f ? copysignf(0, value) : value; }

static void multiply_bf16(int rows, int pairs, int columns) {
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            float even = 0, odd = 0, sum;
            for (int pair = 0; pair < pairs; pair++) {
                const uint8_t *x = a[row] + 4 * pair, *y = b[pair] + 4 * column;
                even = flushed(fmaf(flushed(bf16(x)), flushed(bf16(y)), even));
                odd = flushed(fmaf(flushed(bf16(x + 2)), flushed(bf16(y + 2)), odd));
            }
            memcpy(&sum, sums[row] + 4 * column, 4);
            sum = flushed(flushed(sum) + flushed(even + odd));
            memcpy(wanted[row] + 4 * column, &sum, 4);
        }
}

static void multiply_int8(int rows, int quads, int columns, int a_signed, int b_signed) {
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
            uint32_t sum;
            memcpy(&sum, sums[row] + 4 * column, 4);
            for (int i = 0; i < 4 * quads; i++) {
                uint8_t x = a[row][i], y = b[i / 4][4 * column + i % 4];
                sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
            }
            memcpy(wanted[row] + 4 * column, &sum, 4);
        }
}

/* floats: 0 for any bits, 1 for values around 1 and a few tiny ones, 2 for values whose products are denormal or just not */
static void fill(uint8_t rows[16][STRIDE], int floats) {
    for (int row = 0; row < 16; row++)
        for (int i = 0; i < STRIDE; i += 2) {
            uint16_t half = (uint16_t)rand();
            int exponent = floats == 2 ? 0x1F00 : rand() % 8 ? 0x3E00 + rand() % 4 * 256 : 0;
            if (floats) half = (uint16_t)((half & 0x80FF) | exponent);
            memcpy(rows[row] + i, &half, 2);
        }
}

/* compilers write a scale of 1; the kernels that are assembled at run time do not */
#define LOAD_SCALED(from) \
    __asm__ volatile("tileloadd (%0,%1,4), %%tmm1" ::"r"(from), "r"((int64_t)STRIDE / 4) : "memory")
#define MULTIPLY(instruction)                  \
    do {                                       \
        _tile_loadd(0, sums, STRIDE);          \
        LOAD_SCALED(a);                        \
        _tile_stream_loadd(7, b, STRIDE);      \
        instruction(0, 1, 7);                  \
        _tile_stored(0, got, STRIDE);          \
    } while (0)

int main(void) {
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA)) return puts("no permission for tiles"), 2;
    int equal = 0;
    for (int trial = 0; trial < 500; trial++) {
        int rows = 1 + rand() % 16, inner = 1 + rand() % 16, columns = 1 + rand() % 16, kind = trial % 5;
        struct config config = {.palette = 1}, stored;
        config.rows[0] = config.rows[1] = (uint8_t)rows;
        config.rows[7] = (uint8_t)inner;
        config.row_bytes[0] = config.row_bytes[7] = (uint16_t)(4 * columns);
        config.row_bytes[1] = (uint16_t)(4 * inner);
        _tile_loadconfig(&config);
        _tile_storeconfig(&stored);
        if (memcmp(&config, &stored, sizeof config)) return puts("STTILECFG"), 1;
        int floats = kind ? 0 : 1 + trial % 2;
        fill(a, floats), fill(b, floats), fill(sums, 0);
        if (floats == 2) memset(sums, 0, sizeof sums);
        if (floats == 1)
            for (int row = 0; row < 16; row++)
                for (int column = 0; column < 16; column++) {
                    float sum = (float)(rand() % 2001 - 1000) / 512;
                    memcpy(sums[row] + 4 * column, &sum, 4);
                }
        memset(got, 0x5A, sizeof got), memset(wanted, 0x5A, sizeof wanted);
        switch (kind) {
        case 0: MULTIPLY(_tile_dpbf16ps); multiply_bf16(rows, inner, columns); break;
        case 1: MULTIPLY(_tile_dpbssd); multiply_int8(rows, inner, columns, 1, 1); break;
        case 2: MULTIPLY(_tile_dpbsud); multiply_int8(rows, inner, columns, 1, 0); break;
        case 3: MULTIPLY(_tile_dpbusd); multiply_int8(rows, inner, columns, 0, 1); break;
        case 4: MULTIPLY(_tile_dpbuud); multiply_int8(rows, inner, columns, 0, 0); break;
        }
        if (memcmp(got, wanted, sizeof got)) return printf("kind %d, %d x %d x %d differs\n", kind, rows, inner, columns), 1;
        _tile_zero(0);
        _tile_stored(0, got, STRIDE);
        for (int i = 0; i < 4 * columns; i++)
            if (got[rows - 1][i]) return puts("TILEZERO"), 1;
        _tile_release();
        equal++;
    }
    return printf("%d tiles are equal\n", equal), 0;
}
