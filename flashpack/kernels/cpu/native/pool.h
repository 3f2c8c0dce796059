/* Threads that share a job's pieces. Which thread computes a piece never reaches a result.
 *
 * Helpers wait for the next job by looking for it for some microseconds and then sleeping, so that the steps of a
 * token follow each other quickly and an idle process costs nothing. A helper that is not scheduled takes no piece.
 */
#ifndef FLASHPACK_POOL_H
#define FLASHPACK_POOL_H

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define FP_RELAX() _mm_pause()
#elif defined(__aarch64__)
#define FP_RELAX() __asm__ __volatile__("yield")
#else
#define FP_RELAX() ((void)0)
#endif

class Pool {
  public:
    /* Lives as long as the process. Where the system gives fewer threads, those there are do all the work. */
    explicit Pool(int threads) : shares_(threads > 1 ? threads : 1)
    {
        for (int i = 1; i < threads; i++) {
            try {
                std::thread([this, i] { help((size_t)i); }).detach();
            } catch (const std::system_error &) {
                break;
            }
            helpers_++;
        }
    }

    Pool(const Pool &) = delete;

    /* Calls work(i) once for each i below `count`; returns when all are done. One job at a time. */
    template <class Work> void run(int64_t count, const Work &work)
    {
        if (!helpers_ || count < 2) {
            for (int64_t i = 0; i < count; i++)
                work(i);
            return;
        }
        call_ = [](const void *job, int64_t i) { (*static_cast<const Work *>(job))(i); };
        job_ = &work;
        const int64_t threads = (int64_t)shares_.size();
        for (int64_t i = 0; i < threads; i++) {
            shares_[i].next.store(count * i / threads, std::memory_order_relaxed);
            shares_[i].end = count * (i + 1) / threads;
        }
        open_.store(true);
        number_.fetch_add(1);
        if (sleepers_.load() > 0) {
            std::lock_guard<std::mutex> hold(sleeping_);
            wake_.notify_all();
        }
        drain(0);
        open_.store(false);
        for (int spins = 0; inside_.load() != 0; spins++) {
            FP_RELAX();
            if (spins > SPINS)
                std::this_thread::yield();
        }
    }

    /* Held while a caller gives jobs: several threads may share the pool. */
    std::mutex callers;

  private:
    static constexpr int SPINS = 4000;

    /* Pieces that lie together are a thread's own, so that what it asks memory for ahead of time is of use to it. When
     * it has no more, it takes others'. */
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    void drain(size_t own)
    {
        for (size_t i = 0; i < shares_.size(); i++) {
            Share &share = shares_[(own + i) % shares_.size()];
            for (int64_t piece; (piece = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
                call_(job_, piece);
        }
    }

    void help(size_t own)
    {
        uint64_t seen = 0;
        for (;;) {
            bool found = false;
            for (int spins = 0; spins < SPINS && !(found = number_.load() != seen); spins++)
                FP_RELAX();
            if (!found) {
                std::unique_lock<std::mutex> hold(sleeping_);
                sleepers_.fetch_add(1);
                wake_.wait(hold, [&] { return number_.load() != seen; });
                sleepers_.fetch_sub(1);
                continue;
            }
            seen = number_.load();
            // The job does not change while somebody is inside and it was open then.
            inside_.fetch_add(1);
            if (open_.load())
                drain(own);
            inside_.fetch_sub(1);
        }
    }

    std::vector<Share> shares_;
    int helpers_ = 0;
    std::mutex sleeping_;
    std::condition_variable wake_;
    void (*call_)(const void *, int64_t) = nullptr;
    const void *job_ = nullptr;
    alignas(64) std::atomic<uint64_t> number_{0};
    std::atomic<int> sleepers_{0};
    alignas(64) std::atomic<bool> open_{false};
    std::atomic<int> inside_{0};
};

#endif
