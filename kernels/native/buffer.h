// Scratch memory of a call.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace compress {

// Floats in cache lines of their own, zero at first; converts to null where there was no memory.
class Buffer {
   public:
    explicit Buffer(int64_t floats) {
        const size_t bytes = (4 * static_cast<size_t>(floats) + LINE) / LINE * LINE;
        at_.reset(static_cast<float*>(std::aligned_alloc(LINE, bytes)));
        if (at_ != nullptr) std::memset(at_.get(), 0, bytes);
    }

    operator float*() const { return at_.get(); }

   private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    static constexpr size_t LINE = 64;

    std::unique_ptr<float, Free> at_;
};

}  // namespace compress
