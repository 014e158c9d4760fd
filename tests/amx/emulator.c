/* Executes AMX instructions on an x86-64 processor that has AVX-512 but no AMX, for tests. Preloaded (LD_PRELOAD).
 *
 * An AMX instruction raises SIGILL on such a processor. The handler decodes it, does its work on tiles that each thread
 * keeps here, and goes on behind it. The instructions and their arithmetic are those of Intel's Software Developer's
 * Manual, volume 2 (TILELOADD, TDPBF16PS, TDPBSSD ...): TDPBF16PS sums even and odd products apart, each by fused
 * multiply-adds from zero, rounds to nearest even, treats denormals as zero, and adds both sums to the destination.
 *
 * Software finds AMX by CPUID and XGETBV, which raise nothing. In the libraries that are tested their first byte is
 * replaced by 0x06 (no instruction in 64-bit mode; tests/amx/patch.py), and the handler answers as a Sapphire Rapids
 * does, with this processor's other features. Linux' permission for tiles (arch_prctl) is granted without the kernel.
 *
 * An instruction that is neither (AVX512-FP16, which that processor has too, or a real fault) ends the process with its
 * bytes on standard error, as a SIGILL.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };
enum { ARCH_GET_XCOMP_SUPP = 0x1021, ARCH_GET_XCOMP_PERM = 0x1022, ARCH_REQ_XCOMP_PERM = 0x1023 };
#define XFEATURE_TILES 0x60000ull

struct tiles {
    uint8_t palette, start_row;
    uint16_t row_bytes[TILES];
    uint8_t rows[TILES];
    uint8_t data[TILES][ROWS][ROW_BYTES] __attribute__((aligned(64)));
};
static __thread struct tiles state __attribute__((tls_model("initial-exec"), aligned(64)));
static const char *record;
static pid_t recorded;

static void die(const uint8_t *at, const char *why) {
    char line[256];
    int used = snprintf(line, sizeof line, "amx emulator: %s at %p:", why, (const void *)at);
    for (int i = 0; i < 15; i++)
        used += snprintf(line + used, sizeof line - (size_t)used, " %02x", at[i]);
    line[used++] = '\n';
    if (write(2, line, (size_t)used) < 0) _exit(132);
    struct sigaction standard = {.sa_handler = SIG_DFL};
    extern int __sigaction(int, const struct sigaction *, struct sigaction *);
    __sigaction(SIGILL, &standard, NULL);
    raise(SIGILL);
    _exit(132);
}

/* ---- what the processor says of itself ---------------------------------------------------------------------------- */

static void answer_cpuid(uint32_t leaf, uint32_t part, uint32_t out[4]) {
    __cpuid_count(leaf, part, out[0], out[1], out[2], out[3]);
    switch (leaf) {
    case 0:
        out[0] = 0x20;
        out[1] = signature_INTEL_ebx, out[2] = signature_INTEL_ecx, out[3] = signature_INTEL_edx;
        break;
    case 1:
        out[0] = 0x000806F8; /* family 6, model 143: Sapphire Rapids */
        break;
    case 2:
        out[0] = 0x00FEFF01, out[1] = 0xF0, out[2] = out[3] = 0; /* caches: see leaf 4 */
        break;
    case 4: { /* L1 data 48 KiB, L1 instructions 32 KiB, L2 2 MiB, L3 of 15 ways */
        static const uint32_t caches[4][3] = {
            {0x121, (11u << 22) | 63, 63},
            {0x122, (7u << 22) | 63, 63},
            {0x143, (15u << 22) | 63, 2047},
            {0x163, (14u << 22) | 63, 32767},
        };
        memset(out, 0, 16);
        if (part < 4) out[0] = caches[part][0], out[1] = caches[part][1], out[2] = caches[part][2];
        break;
    }
    case 7:
        if (part == 0) {
            out[0] = out[0] < 1 ? 1 : out[0];
            out[3] |= 1u << 22 | 1u << 24 | 1u << 25; /* AMX-BF16, AMX-TILE, AMX-INT8 */
            out[3] |= 1u << 23;                       /* AVX512-FP16: oneDNN asks for it where it uses AMX */
        }
        if (part == 1) out[0] |= 1u << 4 | 1u << 5; /* AVX-VNNI (oneDNN asks for it too), AVX512-BF16 */
        break;
    case 0xD:
        if (part == 0) out[0] |= XFEATURE_TILES;
        if (part == 17) out[0] = 64, out[1] = 2752, out[2] = 2, out[3] = 0;
        if (part == 18) out[0] = 8192, out[1] = 2816, out[2] = 6, out[3] = 0;
        break;
    case 0x1D:
        memset(out, 0, 16);
        if (part == 0) out[0] = 1;
        if (part == 1) out[0] = 8192 | 1024u << 16, out[1] = 64 | 8u << 16, out[2] = ROWS;
        break;
    case 0x1E:
        memset(out, 0, 16);
        if (part == 0) out[1] = ROWS | 64u << 8;
        break;
    }
    if (leaf >= 0x80000002 && leaf <= 0x80000004) {
        static const char name[48] = "Intel(R) Xeon(R) Sapphire Rapids, AMX emulated";
        memcpy(out, name + 16 * (leaf - 0x80000002), 16);
    }
    if (leaf > 0x80000008) memset(out, 0, 16); /* AMD's own leaves */
}

/* One line for a process that executes its first AMX instruction: its command. A test run proves by it that AMX was used. */
static void tell(void) {
    recorded = getpid();
    char command[512];
    int own = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    int file = open(record, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    ssize_t length = own < 0 ? 0 : read(own, command, sizeof command - 1);
    for (ssize_t i = 0; i < length; i++)
        if (command[i] == 0 || command[i] == '\n') command[i] = ' ';
    command[length < 0 ? 0 : length] = '\n';
    if (file >= 0 && write(file, command, (size_t)(length < 0 ? 1 : length + 1)) < 0) _exit(132);
    close(own), close(file);
}

/* ---- tiles ---------------------------------------------------------------------------------------------------------- */

static uint64_t *reg(ucontext_t *context, unsigned number) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t *)&context->uc_mcontext.gregs[order[number]];
}

static void load_config(const uint8_t *from, const uint8_t *at) {
    memset(state.data, 0, sizeof state.data);
    state.palette = from[0];
    state.start_row = from[1];
    memcpy(state.row_bytes, from + 16, sizeof state.row_bytes);
    memcpy(state.rows, from + 48, sizeof state.rows);
    if (state.palette > 1) die(at, "LDTILECFG of an unknown palette");
    for (int t = 0; t < TILES; t++)
        if (state.palette && (state.rows[t] > ROWS || state.row_bytes[t] > ROW_BYTES ||
                              !state.rows[t] != !state.row_bytes[t]))
            die(at, "LDTILECFG of an impossible tile");
}

static void store_config(uint8_t *to) {
    memset(to, 0, 64);
    to[0] = state.palette;
    to[1] = state.start_row;
    memcpy(to + 16, state.row_bytes, sizeof state.row_bytes);
    memcpy(to + 48, state.rows, sizeof state.rows);
}

static void move_tile(unsigned tile, uint8_t *memory, int64_t stride, int store) {
    for (int row = 0; row < state.rows[tile]; row++, memory += stride) {
        if (store)
            memcpy(memory, state.data[tile][row], state.row_bytes[tile]);
        else {
            memset(state.data[tile][row], 0, ROW_BYTES);
            memcpy(state.data[tile][row], memory, state.row_bytes[tile]);
        }
    }
    if (!store)
        for (int row = state.rows[tile]; row < ROWS; row++) memset(state.data[tile][row], 0, ROW_BYTES);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) static void multiply_bf16(unsigned to, unsigned a, unsigned b) {
    unsigned old = _mm_getcsr();
    _mm_setcsr(0x9FC0); /* nearest even, denormals are zero, all exceptions masked */
    int pairs = state.row_bytes[a] / 4, columns = state.row_bytes[to] / 4;
    const __m512i high = _mm512_set1_epi32((int)0xFFFF0000);
    __mmask16 wanted = (__mmask16)((1u << columns) - 1);
    for (int row = 0; row < state.rows[to]; row++) {
        __m512 even = _mm512_setzero_ps(), odd = even;
        for (int pair = 0; pair < pairs; pair++) {
            uint32_t two;
            memcpy(&two, state.data[a][row] + 4 * pair, 4);
            __m512i weights = _mm512_loadu_si512(state.data[b][pair]);
            __m512 low_a = _mm512_castsi512_ps(_mm512_set1_epi32((int)(two << 16)));
            __m512 high_a = _mm512_castsi512_ps(_mm512_set1_epi32((int)(two & 0xFFFF0000u)));
            even = _mm512_fmadd_ps(low_a, _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), even);
            odd = _mm512_fmadd_ps(high_a, _mm512_castsi512_ps(_mm512_and_si512(weights, high)), odd);
        }
        float *sums = (float *)state.data[to][row];
        __m512 sum = _mm512_add_ps(_mm512_loadu_ps(sums), _mm512_add_ps(even, odd));
        _mm512_storeu_ps(sums, _mm512_maskz_mov_ps(wanted, sum));
    }
    _mm_setcsr(old);
}

static void multiply_int8(unsigned to, unsigned a, unsigned b, int a_signed, int b_signed) {
    int quads = state.row_bytes[a] / 4, columns = state.row_bytes[to] / 4;
    for (int row = 0; row < state.rows[to]; row++)
        for (int quad = 0; quad < quads; quad++)
            for (int column = 0; column < columns; column++) {
                uint32_t sum;
                memcpy(&sum, state.data[to][row] + 4 * column, 4);
                for (int i = 0; i < 4; i++) {
                    uint8_t x = state.data[a][row][4 * quad + i], y = state.data[b][quad][4 * column + i];
                    sum += (uint32_t)((a_signed ? (int8_t)x : x) * (b_signed ? (int8_t)y : y));
                }
                memcpy(state.data[to][row] + 4 * column, &sum, 4);
            }
}

/* The address of a ModRM operand in memory; *stride is index times scale (the rows' distance of a tile). */
static const uint8_t *operand(ucontext_t *context, const uint8_t *modrm, int rex_x, int rex_b, uint8_t **address,
                              int64_t *stride) {
    unsigned mode = modrm[0] >> 6, base = modrm[0] & 7;
    const uint8_t *next = modrm + 1;
    uint64_t at = 0;
    *stride = 0;
    int tail_relative = 0;
    if (base == 4) {
        unsigned sib = *next++, index = (sib >> 3 & 7) | (unsigned)rex_x << 3;
        base = sib & 7;
        if (index != 4) *stride = (int64_t)*reg(context, index) << (sib >> 6);
        if (base == 5 && mode == 0)
            mode = 4; /* no base, 32 bits */
        else
            at = *reg(context, base | (unsigned)rex_b << 3);
    } else if (base == 5 && mode == 0) {
        mode = 4, tail_relative = 1;
    } else
        at = *reg(context, base | (unsigned)rex_b << 3);
    if (mode == 1) at += (uint64_t)(int64_t)(int8_t)*next++;
    if (mode == 2 || mode == 4) {
        int32_t far;
        memcpy(&far, next, 4);
        next += 4;
        at += (uint64_t)(int64_t)far;
    }
    if (tail_relative) at += (uint64_t)next;
    *address = (uint8_t *)at;
    return next;
}

/* Executes the AMX instruction at `code`; returns what follows it, or NULL if it is none. */
static const uint8_t *execute(ucontext_t *context, const uint8_t *code) {
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return NULL; /* VEX.128.0F38.W0 */
    int rex_x = !(code[1] >> 6 & 1), rex_b = !(code[1] >> 5 & 1);
    unsigned prefix = code[2] & 3, third = ~(code[2] >> 3) & 15; /* prefix: none, 66, F3, F2 */
    const uint8_t *modrm = code + 4;
    unsigned mode = *modrm >> 6, tile = *modrm >> 3 & 7, second = *modrm & 7;
    uint8_t *address;
    int64_t stride;
    if (code[3] == 0x49) {
        if (mode == 3) {
            if (prefix == 0 && *modrm == 0xC0) { /* TILERELEASE */
                memset(&state, 0, sizeof state);
                return code + 5;
            }
            if (prefix == 3 && second == 0) { /* TILEZERO */
                memset(state.data[tile], 0, sizeof state.data[tile]);
                return code + 5;
            }
            return NULL;
        }
        if (tile || prefix > 1) return NULL;
        const uint8_t *next = operand(context, modrm, rex_x, rex_b, &address, &stride);
        address += stride; /* an index counts once in an address that is no tile's */
        if (prefix == 0)
            load_config(address, code);
        else
            store_config(address);
        return next;
    }
    if (code[3] == 0x4B && mode != 3 && second == 4 && prefix) {
        const uint8_t *next = operand(context, modrm, rex_x, rex_b, &address, &stride);
        if (!state.palette || !state.rows[tile]) die(code, "a tile that is not configured");
        move_tile(tile, address, stride, prefix == 2);
        return next;
    }
    if ((code[3] == 0x5C && prefix == 2) || code[3] == 0x5E) {
        if (mode != 3 || third > 7) return NULL;
        if (!state.palette || !state.rows[tile] || state.rows[second] != state.rows[tile] ||
            state.row_bytes[second] != 4 * state.rows[third] || state.row_bytes[third] != state.row_bytes[tile])
            die(code, "tiles whose shapes do not fit");
        if (code[3] == 0x5C)
            multiply_bf16(tile, second, third);
        else
            multiply_int8(tile, second, third, prefix >= 2, prefix & 1);
        return code + 5;
    }
    return NULL;
}

static void handle(int signal_number, siginfo_t *information, void *saved) {
    (void)signal_number, (void)information;
    ucontext_t *context = saved;
    const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP], *next;
    if (code[0] == 0x06 && code[1] == 0xA2) {
        uint32_t out[4];
        answer_cpuid((uint32_t)*reg(context, 0), (uint32_t)*reg(context, 1), out);
        *reg(context, 0) = out[0], *reg(context, 3) = out[1], *reg(context, 1) = out[2], *reg(context, 2) = out[3];
        context->uc_mcontext.gregs[REG_RIP] += 2;
        return;
    }
    if (code[0] == 0x06 && code[1] == 0x01 && code[2] == 0xD0) {
        uint32_t low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"((uint32_t)*reg(context, 1)));
        *reg(context, 0) = (uint32_t)*reg(context, 1) ? low : low | (uint32_t)XFEATURE_TILES;
        *reg(context, 2) = high;
        context->uc_mcontext.gregs[REG_RIP] += 3;
        return;
    }
    if (!(next = execute(context, code))) die(code, "neither AMX, CPUID nor XGETBV");
    if (record && recorded != getpid()) tell();
    do
        code = next;
    while ((next = execute(context, code))); /* each trap is dear */
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)code;
}

/* ---- the process around it ------------------------------------------------------------------------------------------ */

typedef int sigaction_function(int, const struct sigaction *, struct sigaction *);

/* Python's faulthandler, and others, would take SIGILL away. */
int sigaction(int number, const struct sigaction *wanted, struct sigaction *old) {
    static sigaction_function *real;
    if (!real) real = (sigaction_function *)dlsym(RTLD_NEXT, "sigaction");
    return real(number, number == SIGILL ? NULL : wanted, old);
}

long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (!real) real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    va_list list;
    va_start(list, number);
    long a[6];
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (number == SYS_arch_prctl && (a[0] == ARCH_GET_XCOMP_SUPP || a[0] == ARCH_GET_XCOMP_PERM)) {
        *(uint64_t *)a[1] = 0xE7 | XFEATURE_TILES;
        return 0;
    }
    if (number == SYS_arch_prctl && a[0] == ARCH_REQ_XCOMP_PERM) return 0;
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

__attribute__((constructor)) static void install(void) {
    record = getenv("AMX_EMULATOR_RECORD");
    struct sigaction ours = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction_function *real = (sigaction_function *)dlsym(RTLD_NEXT, "sigaction");
    real(SIGILL, &ours, NULL);
}
