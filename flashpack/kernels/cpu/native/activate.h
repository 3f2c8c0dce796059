/* The functions between an expert's matrices. */

namespace {

/* exp for activations: 2^n times a polynomial; a relative error of about 1e-7. */
FP_INLINE float exponential(float x)
{
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float shift = 12582912.0f; /* 1.5 * 2^23: what is added to it loses its fraction; no call, so loops are vectors */
    const float n = x * 1.44269504f + shift - shift;
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * float_of((uint32_t)((int32_t)n + 127) << 23);
}

FP_INLINE float sigmoid(float x)
{
    return 1.0f / (1.0f + exponential(-x));
}

void activate(int function, float limit, const float *gate, const float *up, float *out, int64_t count)
{
    switch (function) {
    case FP_SILU:
        for (int64_t i = 0; i < count; i++)
            out[i] = gate[i] * sigmoid(gate[i]);
        break;
    case FP_GELU:
        for (int64_t i = 0; i < count; i++)
            out[i] = gate[i] * 0.5f * (1.0f + erff(gate[i] * 0.70710678f));
        break;
    case FP_GELU_TANH: /* 0.5 (1 + tanh y) = sigmoid(2 y) */
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i];
            out[i] = x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
        }
        break;
    case FP_RELU2:
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i] < 0 ? 0 : gate[i];
            out[i] = x * x;
        }
        break;
    case FP_SWIGLU_OAI:
        for (int64_t i = 0; i < count; i++) {
            float x = gate[i] > limit ? limit : gate[i];
            float y = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
            out[i] = x * sigmoid(1.702f * x) * (y + 1.0f);
        }
        return;
    }
    if (up)
        for (int64_t i = 0; i < count; i++)
            out[i] *= up[i];
}

} // namespace
