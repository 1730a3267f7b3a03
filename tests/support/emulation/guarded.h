// How the emulated launchers report: null, or what went wrong.
#pragma once

#include <stdexcept>
#include <string>

#include "platform_emulated.h"

namespace {

std::string last_error;

template <class F>
const char* guarded(uint64_t seed, const F& body) {
  emulation::machine.failure.clear();
  emulation::machine.runs = true;
  emulation::machine.permute = seed != 0;  // seed 0: threads in their natural order
  emulation::machine.random.seed(seed);
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    last_error = error.what();
    return last_error.c_str();
  }
}

}  // namespace
