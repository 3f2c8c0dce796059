/* Products and recurrent steps of every instruction set of this processor against double precision, without Python: for processors that are
 * only emulated.
 *
 *     cd flashpack/kernels/cpu/native
 *     aarch64-linux-gnu-g++ -std=c++17 -O2 -ffp-contract=off -static -pthread -I. \
 *         kernels.cpp steps.cpp level_*.cpp ../../../../tools/check_kernels.cpp -o check_kernels
 *     qemu-aarch64 ./check_kernels
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <vector>

#include "kernels.h"

extern "C" int flashpack_kernels_level(void);
extern "C" const char *flashpack_kernels_level_name(int level);
extern "C" void *flashpack_workers(int threads, int level);
extern "C" int flashpack_linear(
    void *workers, const float *x, int64_t tokens, const fp_matrix *matrices, int count, float *const *out);
extern "C" int flashpack_run(void *workers, const fp_step *const *steps, int count);

static uint32_t state = 1;

static uint32_t random_word()
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static float widened(uint16_t half)
{
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

/* Largest error, of the product of norms, and whether it is within what kernels.h promises. `bits` 0: MXFP4. */
static bool check(void *workers, int bits, int group, int units, int tokens, double *worst)
{
    static const double e2m1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6};
    const int stored = bits ? bits : 4, width = group * units, rows = 13, groups = width / group;
    std::vector<uint8_t> codes((size_t)rows * width * stored / 8), powers(rows * groups);
    std::vector<uint16_t> scales(rows * groups), biases(rows * groups);
    std::vector<float> x(tokens * width), out(tokens * rows, NAN);
    for (auto &code : codes)
        code = (uint8_t)random_word();
    for (int i = 0; i < rows * groups; i++) {
        scales[i] = (uint16_t)(0x3F00 | (random_word() & 0x7F));
        biases[i] = (uint16_t)(0xBF00 | (random_word() & 0x7F));
        powers[i] = (uint8_t)(120 + random_word() % 10);
    }
    for (auto &value : x)
        value = ((float)(random_word() % 2001) - 1000) / 500;
    const uint8_t *scale = bits ? (const uint8_t *)scales.data() : powers.data();
    const uint8_t *bias = bits ? (const uint8_t *)biases.data() : nullptr;
    const fp_matrix m = {codes.data(), scale, bias, nullptr, rows, width, bits ? FP_AFFINE : FP_MXFP4, stored,
                         group, FP_BF16, 0, 0};
    float *to = out.data();
    if (flashpack_linear(workers, x.data(), tokens, &m, 1, &to))
        return false;
    bool good = true;
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) {
            double product = 0, own = 0, other = 0;
            for (int i = 0; i < width; i++) {
                const size_t at = ((size_t)r * width + i) * stored;
                const unsigned pair = codes[at / 8] | (at / 8 + 1 < codes.size() ? codes[at / 8 + 1] << 8 : 0);
                const unsigned code = pair >> at % 8 & ((1u << stored) - 1);
                const int g = r * groups + i / group;
                const double w =
                    bits ? code * (double)widened(scales[g]) + widened(biases[g]) : e2m1[code] * ldexp(1, powers[g] - 127);
                product += w * x[t * width + i];
                own += w * w;
                other += x[t * width + i] * x[t * width + i];
            }
            const double error = fabs(out[t * rows + r] - product) / sqrt(own * other + 1e-30);
            *worst = error > *worst ? error : *worst;
            /* More tokens than three: weights are rounded too. */
            good = good && error < sqrt(width) / 56000 + (tokens > 3 ? 4e-4 : 4e-6);
        }
    return good;
}

static double silu(double x)
{
    return x / (1 + exp(-x));
}

/* Tokens of a gated delta layer whose heads lie behind each other; the largest error relative to the largest result. */
static double check_delta(void *workers, int key_heads, int value_heads, int keys, int values, int taps)
{
    const int channels = 2 * key_heads * keys + value_heads * values, group = value_heads / key_heads;
    const auto some = [](size_t count, double size) {
        std::vector<float> numbers(count);
        for (auto &number : numbers)
            number = (float)(((double)(random_word() % 2001) - 1000) / 1000 * size);
        return numbers;
    };
    std::vector<float> window = some((size_t)channels * taps, 1), memory = some((size_t)value_heads * keys * values, 1);
    const std::vector<float> filter = some((size_t)channels * taps, 1), bias = some(channels, 1), norm = some(values, 1);
    std::vector<float> rate = some(value_heads, 1), rate_bias = some(value_heads, 1), out((size_t)value_heads * values);
    for (auto &number : rate)
        number = -fabsf(number);
    std::vector<double> inputs(window.begin(), window.end()), states(memory.begin(), memory.end());
    const fp_delta layer = {window.data(), memory.data(), filter.data(), bias.data(), rate.data(), rate_bias.data(),
                            norm.data(), key_heads, value_heads, keys, values, taps, keys, group * values, group, 1e-6f};
    double error = 0, largest = 0;
    for (int token = 0; token < 20; token++) {
        const std::vector<float> x = some(channels, 2), gate = some((size_t)value_heads * values, 2);
        const std::vector<float> beta = some(value_heads, 3), alpha = some(value_heads, 30);
        const float *const inputs_of_it[] = {
            x.data(), x.data() + key_heads * keys, x.data() + 2 * key_heads * keys, gate.data(), beta.data(), alpha.data()};
        fp_step step = {};
        step.function = FP_DELTA;
        step.pointers[0] = const_cast<fp_delta *>(&layer);
        for (int i = 0; i < 6; i++)
            step.pointers[1 + i] = const_cast<float *>(inputs_of_it[i]);
        step.pointers[7] = out.data();
        const fp_step *const steps[] = {&step};
        if (flashpack_run(workers, steps, 1))
            return INFINITY;
        std::vector<double> mixed(channels);
        for (int c = 0; c < channels; c++) {
            double *own = &inputs[(size_t)c * taps], sum = bias[c];
            for (int i = 0; i < taps; i++) {
                own[i] = i + 1 < taps ? own[i + 1] : x[c];
                sum += own[i] * filter[(size_t)c * taps + i];
            }
            mixed[c] = silu(sum);
        }
        for (int h = 0; h < value_heads; h++) {
            const double *q = &mixed[h / group * keys], *k = &mixed[(key_heads + h / group) * keys];
            const double *v = &mixed[2 * key_heads * keys + h * values];
            double lengths[2] = {1e-6, 1e-6}, square = 0;
            for (int i = 0; i < keys; i++) {
                lengths[0] += q[i] * q[i];
                lengths[1] += k[i] * k[i];
            }
            const double fade = exp(rate[h] * log1p(exp((double)alpha[h] + rate_bias[h])));
            std::vector<double> answer(values);
            for (int j = 0; j < values; j++) {
                double *column = &states[(size_t)h * keys * values + j], known = 0;
                for (int i = 0; i < keys; i++)
                    known += (column[i * values] *= fade) * k[i] / sqrt(lengths[1]);
                for (int i = 0; i < keys; i++) {
                    column[i * values] += (v[j] - known) / (1 + exp(-(double)beta[h])) * k[i] / sqrt(lengths[1]);
                    answer[j] += column[i * values] * q[i] / sqrt(lengths[0] * keys);
                }
                square += answer[j] * answer[j];
            }
            for (int j = 0; j < values; j++) {
                const double expected =
                    answer[j] / sqrt(square / values + 1e-6) * norm[j] * silu(gate[(size_t)h * values + j]);
                error = fmax(error, fabs(out[(size_t)h * values + j] - expected));
                largest = fmax(largest, fabs(expected));
            }
        }
    }
    return error / largest;
}

static const char *const names[] = {"mxfp4", "", "2 bits", "3 bits", "4 bits", "5 bits", "6 bits", "", "8 bits"};

int main()
{
    int failures = 0;
    for (int level = 0; level <= flashpack_kernels_level(); level++) {
        void *workers = flashpack_workers(2, level);
        for (int bits : {0, 2, 3, 4, 5, 6, 8}) {
            double worst = 0;
            bool good = true;
            for (int group : {32, 64, 128})
                for (int units : {1, 3, 37})
                    for (int tokens : {1, 2, 3, 5, 70})
                        if (bits || group == 32)
                            good = check(workers, bits, group, units, tokens, &worst) && good;
            printf("%s, %s: largest error %.1e of the norms' product%s\n", flashpack_kernels_level_name(level),
                   names[bits], worst, good ? "" : ": WRONG");
            failures += !good;
        }
        double worst = 0;
        for (int taps : {1, 3, 4}) {
            worst = fmax(worst, check_delta(workers, 1, 1, 8, 8, taps));
            worst = fmax(worst, check_delta(workers, 3, 9, 24, 40, taps));
            worst = fmax(worst, check_delta(workers, 2, 4, 128, 128, taps));
        }
        const bool good = worst < 5e-6;
        printf("%s, gated delta: largest error %.1e%s\n", flashpack_kernels_level_name(level), worst, good ? "" : ": WRONG");
        failures += !good;
    }
    return failures != 0;
}
