// Linear light of sRGB bytes, for the CPU.
#pragma once

#include <cmath>
#include <vector>

namespace pmvis {

// Of each of the 256 bytes (IEC 61966-2-1).
inline const float* linear_light() {
  static const std::vector<float> table = [] {
    std::vector<float> values(256);
    for (int byte = 0; byte < 256; ++byte) {
      const double v = byte / 255.0;
      values[byte] =
          static_cast<float>(v > 0.04045 ? std::pow((v + 0.055) / 1.055, 2.4) : v / 12.92);
    }
    return values;
  }();
  return table.data();
}

}  // namespace pmvis
