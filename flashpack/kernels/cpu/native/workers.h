/* What a call works with: threads, memory and an instruction set. */
#ifndef FLASHPACK_WORKERS_H
#define FLASHPACK_WORKERS_H

#include <new>
#include <vector>

#include "level.h"
#include "pool.h"

#if defined(_WIN32)
#define FP_EXPORT extern "C" __declspec(dllexport)
#else
#define FP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

/* Working memory of a call, kept for the next one. */
class Scratch {
  public:
    template <class T> T *take(int64_t count)
    {
        const size_t bytes = ((size_t)count * sizeof(T) + 63) / 64 * 64;
        if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
            const size_t size = bytes > LEAST ? bytes : LEAST;
            blocks_.push_back({static_cast<char *>(::operator new(size, std::align_val_t(64))), size});
            used_ = 0;
        }
        T *out = reinterpret_cast<T *>(blocks_.back().start + used_);
        used_ += bytes;
        return out;
    }

    /* Everything taken is given back; several blocks become one, large ones are freed. */
    void reset()
    {
        size_t size = 0;
        for (const Block &block : blocks_)
            size += block.size;
        if (blocks_.size() > 1 || size > MOST) {
            for (const Block &block : blocks_)
                ::operator delete(block.start, std::align_val_t(64));
            blocks_.clear();
            if (size <= MOST)
                blocks_.push_back({static_cast<char *>(::operator new(size, std::align_val_t(64))), size});
        }
        used_ = 0;
    }

  private:
    struct Block {
        char *start;
        size_t size;
    };
    static constexpr size_t LEAST = 1 << 20, MOST = 32 << 20;
    std::vector<Block> blocks_;
    size_t used_ = 0;
};

struct Workers {
    Pool pool;
    Scratch scratch;
    const Level *level;

    Workers(int threads, const Level *l) : pool(threads), level(l)
    {
    }
};

/* kernels.cpp */
FP_EXPORT int flashpack_linear(
    void *workers, const float *x, int64_t tokens, const fp_matrix *matrices, int count, float *const *out);
FP_EXPORT int flashpack_experts(
    void *workers, const float *x, int64_t tokens, const fp_expert *const *experts, const int32_t *counts, int count,
    const int32_t *rows, int function, float limit, float *out);
FP_EXPORT void flashpack_combine(
    void *workers, const float *outputs, const int32_t *places, const float *weights, int64_t tokens, int64_t top_k,
    int64_t width, float *out);

#endif
