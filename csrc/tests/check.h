// Checks for the C++ tests, and the report of failures.
#pragma once

#include <atomic>
#include <cstdio>
#include <exception>
#include <functional>
#include <string>

namespace realign {

inline std::atomic<int> failures{0};

inline void expect(bool held, const std::string& what) {
  if (held) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

// The message of the exception thrown by `call`, or an empty string.
inline std::string thrown(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

inline int report() {
  std::printf("%d failures\n", failures.load());
  return failures ? 1 : 0;
}

}  // namespace realign
