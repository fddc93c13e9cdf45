// Division by a number that stays the same: a multiplication instead of a division.
#pragma once

#include <cstdint>

namespace pmvis {

// Exact quotients of 32-bit numbers by a 32-bit divisor >= 1 (Lemire, Kaser, Kurz 2019).
class Divisor {
 public:
  explicit Divisor(uint32_t divisor) : divisor_(divisor), inverse_(UINT64_MAX / divisor + 1) {}

  uint32_t quotient(uint32_t number) const {
    // 2^64 / 1 does not fit, so that inverse is 0.
    if (inverse_ == 0) return number;
    return static_cast<uint32_t>((static_cast<unsigned __int128>(inverse_) * number) >> 64);
  }

  uint32_t rest(uint32_t number, uint32_t quotient) const { return number - quotient * divisor_; }

 private:
  uint32_t divisor_;
  uint64_t inverse_;
};

}  // namespace pmvis
